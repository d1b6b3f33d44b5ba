"""Boxes: pictures with boxes on them, from a file to a batch."""
