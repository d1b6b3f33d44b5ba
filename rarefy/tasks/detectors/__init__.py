"""Detector families, one a file: ``rarefy/tasks/detector.py`` says what one is.

What several of them share: ``_ends`` (how a graph's outputs are put together), ``_grid`` (places, distances, reading of
outputs), ``_nms`` (from scored boxes to what was found), ``_assign`` (which place learns which box), ``_losses``,
``_numbered`` (models whose layers go by number).
"""

from __future__ import annotations
