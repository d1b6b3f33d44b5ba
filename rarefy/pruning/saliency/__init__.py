"""Saliency: how much a single weight matters. One rule a file; the file name is what ``mask(criterion="...")`` takes.

A rule is a frozen dataclass with ``scope``, the set in which weights compete unless the caller says otherwise
("global", "layer" or "output"), and one method,

    scores(graph, weights, task, seed) -> {name: (shape of the weight) float, larger is more important}

where ``weights`` is {name: the nodes that multiply by it}; ``graph`` is in eval mode and not to be changed, ``task``
may be None.
"""

from __future__ import annotations
