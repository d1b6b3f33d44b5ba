"""Where the numbers of a run go while it runs, one a file; the protocol is in ``rarefy/system/logs.py``."""
