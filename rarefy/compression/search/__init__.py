"""search(): many recipes under one budget, on any number of workers, and the front of what they found.

::

    space.py      what a trial may choose, and the recipe that it is
    profile.py    measured once: what each width costs, and what each alone does to the answers
    first.py      where the integer program and level switches at constant cost lead, before anything is trained
    plans.py      which trials come next, from what the finished ones found
    journal.py    the trials of a folder (Optuna's storage), and who works at which
    trial.py      one trial: a run of ``compress`` without its clock; then timed, on the host that counts
    front.py      the points, which of them are beaten, and how one is picked
    worker.py     the loop of a worker
    search.py     the verb
"""
