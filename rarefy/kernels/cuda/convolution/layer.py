"""A layer on codes and the kernels that can run it: cuDNN's plans and our own tiles, the fastest of which is taken."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator

import torch
from torch import Tensor

from rarefy.kernels.cuda.convolution import depthwise, int8_conv, stem
from rarefy.kernels.cuda.convolution.epilogue import Result
from rarefy.kernels.cuda.convolution.int8_conv import Places, Tile
from rarefy.kernels.cuda.convolution.timing import Launch, Make, Remembered, fastest

SMALL = 4096  # places up to which large tiles leave multiprocessors idle


class Layer:
    """A convolution or a linear layer (a kernel of one place).

    weight: int8 codes (o, c / groups, kh, kw). pad_code: of the padding, in the input's codes.
    grid: (scale, zero, qmin, qmax) of the input, where it is a picture of floats that the layer rounds itself.
    """

    def __init__(
        self,
        weight: Tensor,
        result: Result,
        places: Places,
        pad_code: int = 0,
        grid: tuple[float, int, int, int] | None = None,
    ):
        self.result, self.places, self.pad_code, self.grid = result, places, pad_code, grid
        outputs, inputs, *self.kernel = weight.shape
        self.outputs = outputs
        if grid is not None:
            self.weight = stem.packed_weight(weight)
        elif places.groups == outputs and inputs == 1:
            self.weight = weight.permute(2, 3, 1, 0).squeeze(2).contiguous()
        else:
            self.weight = weight.permute(0, 2, 3, 1).contiguous()
        self.chosen: dict[tuple[int, ...], Launch] = {}

    def __call__(self, x: Tensor, residual: Tensor | None, remembered: Remembered) -> Tensor:
        """x: codes (n, h, w, c), or a picture of floats (n, c, h, w). residual: codes like the result.

        Returns (n, h', w', o).
        """
        height, width = x.shape[2:] if self.grid is not None else x.shape[1:3]
        size = self.places.out(height, width, (self.kernel[0], self.kernel[1]))
        out = torch.empty((len(x), *size, self.outputs), dtype=self.result.dtype, device=x.device)
        shape = (*x.shape, *x.stride(), x.element_size())
        if shape not in self.chosen:
            key = (
                f"{'x'.join(map(str, x.shape))} {x.dtype} {'x'.join(map(str, self.weight.shape))} {tuple(self.places)} "
            )
            key += f"{self.result} {residual is not None} {self.pad_code != 0}"
            self.chosen[shape] = fastest(key, _Ways(self, x, residual, out), remembered, x, residual, out)
        self.chosen[shape](x, residual, out)
        return out


class _Ways:
    """May be gone through again."""

    def __init__(self, layer: Layer, x: Tensor, residual: Tensor | None, out: Tensor):
        self.layer, self.x, self.residual, self.out = layer, x, residual, out

    def __iter__(self) -> Iterator[tuple[str, Make]]:
        layer = self.layer
        if layer.grid is not None:
            buffer = stem.buffer_for(tuple(self.x.shape), layer.kernel[1], layer.places, layer.pad_code, self.x.device)
            for tile in stem.TILES:
                yield f"stem {tuple(tile)}", functools.partial(_stem, layer, buffer, tile)
        elif layer.weight.dim() == 3:
            for one in depthwise.TILES:
                yield f"depthwise {tuple(one)}", functools.partial(_depthwise, layer, one)
        else:
            for tile in self._tiles():
                yield f"conv {tuple(tile)}", functools.partial(_conv, layer, tile)
            if self.x.is_cuda:
                cudnn_conv = importlib.import_module("rarefy.kernels.cuda.convolution.cudnn_conv")
                yield from cudnn_conv.ways(
                    self.x, layer.weight, layer.result, layer.places, layer.pad_code, self.residual, self.out
                )

    def _tiles(self) -> list[Tile]:
        """Those that suit the number of places; few for large kernels, of which cuDNN's are the better."""
        count = self.out.shape[0] * self.out.shape[1] * self.out.shape[2]
        tiles = list(int8_conv.TILES[4:] if count <= SMALL else int8_conv.TILES[:5])
        has_other = self.layer.places.groups == 1 and self.layer.weight.shape[3] % 16 == 0
        return tiles[:3] if has_other and self.layer.kernel != [1, 1] else tiles


def _conv(layer: Layer, tile: Tile) -> Launch:
    def launch(x: Tensor, residual: Tensor | None, out: Tensor) -> Tensor:
        return int8_conv.conv(x, layer.weight, layer.result, layer.places, layer.pad_code, residual, tile, out)

    return launch


def _depthwise(layer: Layer, tile: depthwise.Tile) -> Launch:
    def launch(x: Tensor, residual: Tensor | None, out: Tensor) -> Tensor:
        return depthwise.depthwise(x, layer.weight, layer.result, layer.places, layer.pad_code, residual, tile, out)

    return launch


def _stem(layer: Layer, buffer: Tensor, tile: Tile) -> Launch:
    assert layer.grid is not None
    grid = layer.grid

    def launch(x: Tensor, residual: Tensor | None, out: Tensor) -> Tensor:
        stem.pack(x, *grid, layer.places, buffer)
        return stem.stem(buffer, layer.weight, layer.result, layer.places, (out.shape[1], out.shape[2]), tile, out)

    return launch
