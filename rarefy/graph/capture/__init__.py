"""capture(): a user's ``nn.Module`` becomes a graph, the one representation every step works on (``trace.py``)."""

from rarefy.graph.capture.trace import as_graph, capture

__all__ = ["as_graph", "capture"]
