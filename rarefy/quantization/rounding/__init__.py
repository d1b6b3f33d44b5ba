"""Rules that turn weights into codes, one a file; the file name is what ``rounding="..."`` takes. A rule is a frozen
dataclass with one of

    codes(scaled, grid, generator) -> codes                  looks at the weights only: scaled = w / s
    layer_codes(layer, generator) -> codes                   looks at what a layer reads and should make (``Layer``)
    reconstruct(block, generator) -> Rounded                 rounds all layers of a block together (``Block``)

The layers before have been rounded already, so that each rule mends their errors along with its own.
"""

from __future__ import annotations
