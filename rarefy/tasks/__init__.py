"""Tasks: what "as good" means. A task holds the data, the loss and the preprocessing; a model is judged on it."""

from rarefy.tasks.classification import Classification

__all__ = ["Classification"]
