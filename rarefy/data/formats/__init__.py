"""Forms of data, one a file: ``coco:PATH`` would be read by ``read`` in ``coco.py``, and nothing else knows of it.

``read(text, rest, split) -> (what, divided)``: text is all that the user gave ("coco:PATH"), rest what follows the
colon, split "train" or "val". what: ``Arrays``, ``Items``, or an object that ``rarefy.data.items.from_object`` takes.
divided: is it the asked split's alone? Raises DataError for what is missing, empty or of a kind that can't be read,
MissingDependency for a library.
"""
