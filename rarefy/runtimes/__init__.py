"""Where a compressed model runs, one runtime a file: what it runs in integers, how to export for it, run it and compare with it.

A runtime is a frozen dataclass with

    capabilities                      what it runs in integers (``rarefy.deployment.runtime.Capabilities``)
    threads                           of one operator; 0: one a core
    floats                            runtimes that a float network may run on instead: itself, and what is faster at a lower precision
    weight_bits                       most bits of a weight whose products add up exactly
    suffix                            of its files
    package                           it needs: what is imported, and whose version counts
    export(graph, path)               write the file
    open(path) -> session             a callable, tensor to tensor
    compare(graph, path, inputs, on)  parity of graph and file, run by this runtime or another one
    decoded                           compare by the numbers that codes stand for
    kernel_times(path, inputs)        of one run, kernel by kernel; where it has none, nothing is pruned to a latency
"""
