"""Where a compressed model runs, one runtime a file: what it runs in integers, how to export for it, run it and compare with it.

A runtime is a frozen dataclass with

    capabilities                      what it runs in integers (``rarefy.placing.Capabilities``)
    suffix                            of its files
    export(graph, path)               write the file
    open(path) -> session             a callable, tensor to tensor
    compare(graph, path, inputs)      parity of graph and file
"""
