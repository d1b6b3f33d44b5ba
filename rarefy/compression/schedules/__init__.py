"""Schedules: when to prune, and what to train meanwhile. One a file; the file name is what ``prune(schedule="...")`` takes.

A schedule is a frozen dataclass with one method,

    run(graph, once, asked, setting) -> the pruned graph, with one new record in meta["history"]

where ``once(graph, keep=0.5)`` prunes at once with all the caller's other options (``was={layer: outputs}``: of which ``floor`` is a share, where layers have
lost some before), ``asked`` is the target, such as {"macs": 0.5}, and
``setting`` is what training needs. A schedule that trains does so by the one loop (``distilling.py``), each training in a folder of its own
below ``setting.checkpoint``: pruning depends on nothing but the weights and the seed, so a killed run that is started again finds the
trainings it had finished, goes on in the middle of the next one, and ends with the same bits.
"""

from __future__ import annotations
