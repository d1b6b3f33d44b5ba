"""Selection: from scores to an order. One rule a file; the file name is what ``prune(select="...")`` takes.

A rule is a frozen dataclass with one method,

    keys(scores, seed) -> (classes,) float64: the larger, the earlier it is kept

where ``scores`` (classes,) float64 is what the criterion said, made comparable within what is ranked together.
"""

from __future__ import annotations
