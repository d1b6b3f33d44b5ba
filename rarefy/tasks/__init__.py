"""Tasks: what "as good" means. A task holds the data, the loss and the preprocessing; a model is judged on it."""

from rarefy.tasks.classification import Classification
from rarefy.tasks.detection import Detection

__all__ = ["Classification", "Detection"]
