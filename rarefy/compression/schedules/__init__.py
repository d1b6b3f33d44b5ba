"""Schedules: when to prune, and what to train meanwhile. One a file, whose name is what ``prune(schedule=...)`` takes.

A schedule is a frozen dataclass, its fields its options, with one method (``rarefy.pruning.schedule.Schedule``):

    run(graph, once, asked, setting) -> the pruned graph, with one new record in meta["history"]

A schedule that trains does so by the one loop (rarefy/distillation/loop.py), each training in a folder of its own below
``setting.checkpoint``: pruning depends on nothing but the weights and the seed, so a killed run that is started again
finds the trainings it had finished, goes on in the middle of the next one, and ends with the same bits.
"""
