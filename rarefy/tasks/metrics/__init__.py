"""The metrics that tasks judge by, one a file (rarefy/tasks/metric.py is the protocol)."""
