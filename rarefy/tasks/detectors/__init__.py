"""Detector families, one a file: ``rarefy/tasks/detector.py`` says what one is."""
