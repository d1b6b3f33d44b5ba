"""Where a compressed model runs, one runtime a file: what it runs in integers, how to export, run and compare.

A runtime is a frozen dataclass named like its file, with the attributes of ``rarefy.deployment.runtime.Runtime``.
"""
