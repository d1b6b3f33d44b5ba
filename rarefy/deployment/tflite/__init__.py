"""Graphs as TensorFlow Lite files: the graph by a table, one row an ATen operator."""
