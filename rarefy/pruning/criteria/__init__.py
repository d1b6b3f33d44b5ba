"""Criteria: how much a channel matters. One scoring rule a file; the file name is what ``criterion="..."`` takes.

A criterion is a score over a group. It is a frozen dataclass with one method,

    scores(graph, coupling, task, seed) -> (coupling.count,) float64, larger is more important

where ``graph`` is in eval mode and not to be changed, ``task`` may be None, and a class is what leaves together. Most
score the elements of parameters and let ``coupling.gather`` sum them by class; one that needs the interactions within a
group has the coupling itself.
"""

from __future__ import annotations
