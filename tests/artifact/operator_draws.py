"""Arguments drawn from an operator's schema, and what the operator does with them: the process of its own that
test_drawn_operators.py starts, watches and, where an operator kills it, starts again.

    python operator_draws.py SEED COUNT [unchecked]     reads lines of an overload's name and the draw to begin with,
                                                        writes a line of JSON before and after each draw

A draw is a graph of one call, whose tensors lie flush against pages that nobody may touch, so that reading or writing
one byte past them is a signal. What ``load`` refuses of it, is refused here by the same functions. What is left is run
twice, on a heap full of other bytes each time: the same answers both times, and the same inputs afterwards.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import io
import json
import math
import mmap
import os
import random
import resource
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from rarefy.artifact import allowlist
from rarefy.artifact.operators import trial
from rarefy.artifact.operators.schema import TENSOR
from rarefy.errors import FormatError

SECONDS = 8.0  # of computing, for one draw
HELD = 1 << 24  # bytes that load allows here, so that a draw is quick
MEMORY = 1 << 29  # bytes of addresses beyond what the process has mapped, for what is tried
MOST_NUMBERS = 10_000  # of a tensor that is drawn
PAGE = mmap.PAGESIZE
ROOM = 64 * PAGE  # bytes of a guarded piece

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

FLOATS = [torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16]
INTEGERS = [torch.int64, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
OTHERS = [torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2]
WHOLE = [0, 1, 1, 1, 2, 2, 3, -1, -1, -2, -3, 4, 5, 7, 8, 16, 17, 64, 255, 256, 1000, 65535, 65536, 65537]
WILD = [2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**32, 2**40, 2**62, 2**63 - 1, -(2**63) + 1, -(2**63)]
REAL = [0.0, -0.0, 1.0, -1.0, 0.5, 2.0, 1e-5, 0.1, 3.7, 1e30, -1e30, 1e308, 5e-324, math.inf, -math.inf, math.nan]
WORDS = [
    *("none", "tanh", "floor", "trunc", "same", "valid", "constant", "reflect", "replicate", "circular", "sum", "mean"),
    *("prod", "amax", "amin", "linear", "nearest", "ij", "xy", "fro", "nuc", "ortho", "forward", "backward", "", "x"),
    *("add", "multiply"),
    *("ij,jk->ik", "...i,...i->...", "i,j->ij", "ii->i", "bij,bjk->bik", "ij->ji", "i,i->", "abc,cd->abd", "->", "i->"),
]

# Values of arguments that are mostly so, in lists as long as the operator's name says.
USUAL: dict[str, list[Any]] = {
    **{key: [1, 2, 2, 3, 5] for key in ("output_size", "kernel_size", "kernel", "size")},
    **{key: [1, 1, 2, 3] for key in ("stride", "dilation", "upscale_factor", "downscale_factor", "block_size")},
    **{key: [0, 0, 1, 2] for key in ("padding", "output_padding")},
    **{key: [0, 1, -1, 2, -2] for key in ("dim", "dim0", "dim1", "start_dim", "end_dim", "axis0", "axis1", "axis")},
    **{key: [1, 1, 1, 2, 4] for key in ("groups", "num_groups")},
    **{key: [0.5, 1.0, 2.0, 1.7] for key in ("scale_factors", "scales", "scales_h", "scales_w", "scales_d")},
    **{key: [0, 1, 2] for key in ("interpolation_mode", "padding_mode")},
    "n_fft": [4, 8], "hop_length": [1, 2], "win_length": [4, 8], "reduce": ["sum", "amax", "mean", "prod", "add"],
    "qmin": [-128, 0, -8], "qmax": [127, 255, 7], "group": [0, 0, 1, 2, 3],
}  # fmt: skip

# Shapes that belong together, an axis a letter: what makes a structured operator get as far as its loops.
SHAPES: dict[str, dict[str, str]] = {
    "conv1d": {"input": "ncw", "weight": "ock", "bias": "o"},
    "conv2d": {"input": "nchw", "weight": "ockk", "bias": "o"},
    "conv3d": {"input": "ncdhw", "weight": "ockkk", "bias": "o"},
    "conv_transpose1d": {"input": "ncw", "weight": "cok", "bias": "o"},
    "conv_transpose2d": {"input": "nchw", "weight": "cokk", "bias": "o"},
    "conv_transpose3d": {"input": "ncdhw", "weight": "cokkk", "bias": "o"},
    "convolution": {"input": "nchw", "weight": "ockk", "bias": "o"},
    "batch_norm": {"input": "nchw", **dict.fromkeys(("weight", "bias", "running_mean", "running_var"), "c")},
    "instance_norm": {"input": "nchw", **dict.fromkeys(("weight", "bias", "running_mean", "running_var"), "c")},
    "native_batch_norm": {"input": "nchw", **dict.fromkeys(("weight", "bias", "running_mean", "running_var"), "c")},
    "group_norm": {"input": "nchw", "weight": "c", "bias": "c"},
    "layer_norm": {"input": "nhc", "weight": "c", "bias": "c", "normalized_shape": "c"},
    "rms_norm": {"input": "nhc", "weight": "c", "normalized_shape": "c"},
    "native_layer_norm": {"input": "nhc", "weight": "c", "bias": "c", "normalized_shape": "c"},
    "linear": {"input": "nhc", "weight": "oc", "bias": "o"},
    "bilinear": {"input1": "nc", "input2": "nd", "weight": "ocd", "bias": "o"},
    "matmul": {"self": "nhc", "other": "nco"},
    "bmm": {"self": "nhc", "mat2": "nco"},
    "baddbmm": {"self": "nho", "batch1": "nhc", "batch2": "nco"},
    "mm": {"self": "hc", "mat2": "co"},
    "addmm": {"self": "o", "mat1": "hc", "mat2": "co"},
    "mv": {"self": "hc", "vec": "c"},
    "scaled_dot_product_attention": {"query": "nohc", "key": "nowc", "value": "nowc", "attn_mask": "hw"},
    "embedding": {"weight": "oc", "indices": "nh"},
    "native_group_norm": {"input": "nchw", "weight": "c", "bias": "c"},
    **{
        key: {"self": "nchw", "index": "c", "source": "nchw", "value": ""}
        for key in ("index_select", "index_copy", "index_add", "index_reduce", "index_fill")
    },
    **{
        key: {"self": "nchw", "index": "nchw", "indices": "nchw", "src": "nchw"}
        for key in ("gather", "scatter", "scatter_add", "scatter_reduce", "take_along_dim")
    },
    "select_scatter": {"self": "nchw", "src": "nhw"},
    "slice_scatter": {"self": "nchw", "src": "nchw"},
    "diagonal_scatter": {"self": "cc", "src": "c"},
    "masked_fill": {"self": "nchw", "mask": "chw", "value": ""},
    "addmv": {"self": "h", "mat": "hc", "vec": "c"},
    "affine_grid_generator": {"theta": "n23", "size": "nchw"},
    "stft": {"self": "n17", "window": "8"},
    "gru": {"input": "whc", "hx": "1ho"},
    "lstm": {"input": "whc"},
    "rnn_tanh": {"input": "whc", "hx": "1ho"},
    "rnn_relu": {"input": "whc", "hx": "1ho"},
    "grid_sampler": {"input": "nchw", "grid": "nho2"},
    "pixel_shuffle": {"self": "n8hw"},
    "pixel_unshuffle": {"self": "nc44"},
    "col2im": {"self": "n84", "output_size": "44", "kernel_size": "22", "stride": "22"},
    "_weight_norm": {"v": "ock", "g": "o11"},
    "prelu": {"self": "nchw", "weight": "c"},
    "_prelu_kernel": {"self": "nchw", "weight": "1c11"},
    "quantize": {"x": "ochw", "scale": "o", "zero_point": "o"},
    "dequantize": {"q": "ochw", "scale": "o", "zero_point": "o"},
    "dequantize_fp4": {"q": "oc", "scale": "o1", "tensor_scale": ""},
    "mean": {"x": "nchw", **dict.fromkeys(("x_scale", "x_zero_point", "scale", "zero_point"), "")},
    "avg_pool2d": {
        "self": "nchw",
        "x": "nchw",
        **dict.fromkeys(("x_scale", "x_zero_point", "scale", "zero_point"), ""),
    },
    **{
        name: {"self": axes, "input": axes, "x": axes}
        for kind, axes in (("1d", "ncw"), ("2d", "nchw"), ("3d", "ncdhw"))
        for name in (
            *(f"{pool}_pool{kind}" for pool in ("avg", "max", "adaptive_avg", "adaptive_max")),
            *(f"{pad}_pad{kind}" for pad in ("reflection", "replication")),
            *(f"upsample_{mode}{kind}" for mode in ("nearest", "linear", "bilinear", "bicubic", "trilinear")),
        )
    },
}
for _axes, _letters in ((1, "nci"), (2, "nchw"), (3, "ncdhw")):
    for _name in (f"rarefy.conv{_axes}d", f"rarefy.conv{_axes}d_codes"):
        SHAPES[_name] = {"x": _letters, "weight": "oc" + "k" * _axes, "bias": "o", "weight_scale": "o"}
        SHAPES[_name] |= dict.fromkeys(("x_scale", "x_zero_point", "scale", "zero_point"), "")
for _name in ("rarefy.linear", "rarefy.linear_codes"):
    SHAPES[_name] = {"x": "nhc", "weight": "oc", "bias": "o", "weight_scale": "o"}
    SHAPES[_name] |= dict.fromkeys(("x_scale", "x_zero_point", "scale", "zero_point"), "")


class Guard:
    """Memory whose last byte lies before a page that may not be read, and whose first behind another such."""

    def __init__(self) -> None:
        self._pieces: list[tuple[Any, int]] = []
        self._used = 0

    def begin(self) -> None:
        self._used = 0

    def tensor(self, like: Tensor) -> Tensor:
        """A copy of the contiguous ``like``, its end flush against the page."""
        size = like.numel() * like.element_size()
        if not size or size > ROOM:
            return like.clone()
        if self._used == len(self._pieces):
            raw = mmap.mmap(-1, ROOM + 2 * PAGE)
            start = ctypes.addressof(ctypes.c_char.from_buffer(raw))
            for page in (start, start + ROOM + PAGE):
                assert _libc.mprotect(page, PAGE, 0) == 0
            self._pieces.append((raw, start))
        raw, _ = self._pieces[self._used]
        self._used += 1
        place = torch.frombuffer(raw, dtype=torch.uint8, count=size, offset=PAGE + ROOM - size)
        made = place.view(like.dtype) if like.dtype != torch.bool else place.view(torch.bool)
        return made.view(like.shape).copy_(like)


class Draws:
    """Arguments for one overload."""

    def __init__(self, overload: Any, seed: str):
        self.overload, self.schema = overload, overload._schema
        self.random = random.Random(seed)
        self.name = self.schema.name.split("::")[1]
        ours = f"rarefy.{self.name}"
        self.shapes = SHAPES.get(ours if self.schema.name.startswith("rarefy") else self.name, SHAPES.get(self.name))
        self.shapes = self.shapes or {}

    def call(self) -> tuple[list[Any], dict[str, Any]]:
        """Positional arguments and keywords, tensors among them."""
        draw = self.random
        self.sizes = {letter: draw.choice([1, 2, 2, 3, 4, 5]) for letter in "nodkhwi"} | {
            "c": draw.choice([1, 2, 4, 8])
        }
        self.sizes["h"], self.sizes["w"] = (draw.choice([1, 3, 4, 6, 7, 8]) for _ in range(2))
        self.base = [
            draw.choice([0, 1, 1, 2, 3, 4, 5, 8, 17, 67]) for _ in range(draw.choice([0, 1, 2, 2, 3, 3, 4, 4, 5]))
        ]
        while math.prod(self.base) > MOST_NUMBERS:
            self.base.remove(max(self.base))
        self.dtype = draw.choice(FLOATS if draw.random() < 0.7 else INTEGERS if draw.random() < 0.85 else OTHERS)
        self.plain = draw.random() < 0.6  # shapes and types that fit
        if self.name in ("gru", "lstm", "rnn_tanh", "rnn_relu") and draw.random() < 0.8:
            return self._recurrent(), {}
        if self.name == "einsum":
            return self._summed(), {}
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for argument in self.schema.arguments:
            if argument.has_default_value() and draw.random() < (0.5 if argument.kwarg_only else 0.25):
                if not argument.kwarg_only:
                    break
                continue
            value = self.value(argument.name, str(argument.real_type))
            if argument.kwarg_only:
                kwargs[argument.name] = value
            else:
                args.append(value)
        return args, kwargs

    def value(self, name: str, kind: str) -> Any:
        draw = self.random
        if kind.startswith("Optional["):
            return None if draw.random() < 0.35 else self.value(name, kind[9:-1])
        if kind.startswith("List["):
            if kind == "List[int]" and name in self.shapes:
                return [self.sizes.get(letter) or int(letter) for letter in self.shapes[name]]
            if name in ("dims", "source", "destination") and draw.random() < 0.8:
                return draw.sample(
                    range(len(self.base)), len(self.base) if draw.random() < 0.7 else len(self.base) // 2
                )
            if name == "split_sizes" and self.base and draw.random() < 0.7:
                return [self.base[0] - self.base[0] // 2, self.base[0] // 2]
            if name in USUAL and draw.random() < 0.75:
                return [draw.choice(USUAL[name]) for _ in range(next((int(c) for c in self.name if c.isdigit()), 2))]
            if kind == "List[int]" and draw.random() < 0.15:
                return self.value(name, "int")
            length = draw.choice([0, 1, 1, 2, 2, 2, 3, 3, 4, 6])
            if kind == "List[int]" and draw.random() < 0.4:  # sizes that the tensor has, and their like
                return draw.choice([self.base, self.base[::-1], [math.prod(self.base)], [-1], [*self.base, 1]])
            small = draw.random() < 0.6
            return [
                draw.choice([0, 1, 1, 2, 3]) if small and kind == "List[int]" else self.value(name, kind[5:-1])
                for _ in range(length)
            ]
        if kind == "Tensor":
            return self.tensor(name)
        if name in ("N", "C", "HxW") and self.plain:
            return {"N": self.sizes["n"], "C": self.sizes["c"], "HxW": self.sizes["h"] * self.sizes["w"]}[name]
        if name in USUAL and kind != "Tensor" and draw.random() < 0.75:
            return draw.choice(USUAL[name])
        if kind == "int":
            return draw.choice(WHOLE if draw.random() < 0.85 else WILD)
        if kind == "float":
            return draw.choice(REAL)
        if kind == "number":
            return draw.choice([*WHOLE, *WILD, *REAL, True, False])
        if kind == "bool":
            return draw.random() < 0.5
        if kind == "str":
            return draw.choice(WORDS)
        if kind == "ScalarType":
            return draw.choice([*FLOATS, *INTEGERS, *OTHERS])
        if kind == "MemoryFormat":
            return draw.choice([torch.contiguous_format, torch.preserve_format, torch.channels_last])
        return {"Layout": torch.strided, "Device": torch.device("cpu")}.get(kind)

    def tensor(self, name: str) -> Tensor | int | float:
        draw = self.random
        if draw.random() < 0.03:
            return draw.choice([*WHOLE, *REAL])  # a number stands for a tensor of one element
        shape = list(self.base)
        if name in self.shapes:
            shape = [int(letter) if letter.isdigit() else self.sizes[letter] for letter in self.shapes[name]]
        elif draw.random() < 0.3:
            shape = [size if draw.random() < 0.7 else 1 for size in shape[draw.randrange(len(shape) + 1) :]]
        if not self.plain and draw.random() < 0.5:
            shape = self.bent(shape)
        dtype = self.dtype
        if (
            name in ("index", "indices", "sorter", "boundaries", "offsets", "batch_sizes", "zero_point")
            and draw.random() < 0.8
        ):
            dtype = draw.choice([torch.int64, torch.int64, torch.int32])
        elif name in ("mask", "condition"):
            dtype = torch.bool
        elif not self.plain and draw.random() < 0.4:
            dtype = draw.choice([*FLOATS, *INTEGERS, *OTHERS])
        return self.filled(shape, dtype)

    def bent(self, shape: list[int]) -> list[int]:
        """A shape that is wrong in one place."""
        draw, shape = self.random, list(shape)
        place = draw.randrange(len(shape)) if shape else 0
        change = draw.randrange(6)
        if change == 0 or not shape:
            shape.insert(place, draw.choice([1, 2, 3]))
        elif change == 1:
            del shape[place]
        else:
            shape[place] = [0, 1, max(0, shape[place] - 1), shape[place] + 1][change - 2]
        return shape

    def filled(self, shape: list[int], dtype: torch.dtype) -> Tensor:
        draw, count = self.random, math.prod(shape)
        generator = torch.Generator().manual_seed(draw.randrange(2**31))
        if dtype == torch.bool:
            return torch.randint(0, 2, shape, generator=generator).bool()
        if dtype.is_floating_point or dtype.is_complex:
            made = torch.randn(shape, generator=generator, dtype=torch.float32)
            for value in (REAL if draw.random() < 0.3 else [])[: 16 if count else 0]:
                made.view(-1)[draw.randrange(count)] = max(min(value, 3e38), -3e38) if math.isfinite(value) else value
            return made.to(dtype)
        info, most = torch.iinfo(dtype), draw.choice([1, 2, 4, 9])
        made = torch.randint(0, min(most, info.max), shape, generator=generator).to(dtype)
        for value in ([info.min, info.max, 0, -1 if info.min else info.max, 1] if draw.random() < 0.4 else []) * bool(
            count
        ):
            made.view(-1)[draw.randrange(count)] = value
        return made

    def _summed(self) -> list[Any]:
        formula = self.random.choice([word for word in WORDS if "->" in word])
        parts = formula.partition("->")[0].split(",")
        shapes = [[self.sizes.setdefault(letter, 3) for letter in part if letter.isalpha()] for part in parts]
        return [formula, [self.filled(one if self.plain else self.bent(one), self.dtype) for one in shapes]]

    def _recurrent(self) -> list[Any]:
        """Weights of a recurrent layer, one of which may be wrong."""
        draw, gates = self.random, {"lstm": 4, "gru": 3}.get(self.name, 1)
        both, layers, biases, first = (
            draw.random() < 0.4,
            draw.choice([1, 1, 2]),
            draw.random() < 0.7,
            draw.random() < 0.5,
        )
        steps, batch, width, hidden = (self.sizes[letter] for letter in "whco")
        self.dtype = draw.choice(FLOATS)
        ways = 2 if both else 1
        weights = []
        for layer in range(layers):
            for _ in range(ways):
                given = width if not layer else hidden * ways
                shapes = [[gates * hidden, given], [gates * hidden, hidden]] + [[gates * hidden]] * 2 * biases
                weights += [
                    self.filled(shape if self.plain or draw.random() < 0.8 else self.bent(shape), self.dtype)
                    for shape in shapes
                ]
        if not self.plain and draw.random() < 0.2:
            weights = weights[: draw.randrange(len(weights) + 1)]
        state = [ways * layers, batch, hidden]
        states = [
            self.filled(state if self.plain or draw.random() < 0.7 else self.bent(state), self.dtype)
            for _ in range(2 if gates == 4 else 1)
        ]
        source = [batch, steps, width] if first else [steps, batch, width]
        given = self.filled(source if self.plain or draw.random() < 0.7 else self.bent(source), self.dtype)
        layers = layers if self.plain or draw.random() < 0.8 else draw.choice(WHOLE + WILD)
        return [
            given,
            states if gates == 4 else states[0],
            weights,
            biases,
            layers,
            0.0,
            draw.random() < 0.05,
            both,
            first,
        ]


def one_call(overload: Any, args: list[Any], kwargs: dict[str, Any]) -> fx.GraphModule:
    """A module of that call alone, as a folder would give it."""
    root, graph = nn.Module(), fx.Graph()

    def kept(value: Any) -> Any:
        if isinstance(value, Tensor):
            name = f"t{len(root._buffers)}"
            root.register_buffer(name, value)
            return graph.get_attr(name)
        return [kept(item) for item in value] if isinstance(value, list) else value

    given = [kept(value) for value in args], {key: kept(value) for key, value in kwargs.items()}
    node = graph.call_function(overload, tuple(given[0]), given[1])
    graph.output(node)
    module = fx.GraphModule(root, graph)
    module.meta = {"inputs": []}
    return module


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """For what is tried alone: this file's own copies, and what draws before have left, are not the operator's."""
    with open("/proc/self/statm", encoding="ascii") as file:
        mapped = int(file.read().split()[0]) * PAGE
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def poisoned(byte: int) -> None:
    """Leaves freed memory full of that byte."""
    blocks = [
        torch.full((size,), byte, dtype=torch.uint8)
        for size in (64, 128, 256, 512, 1024, 4096, 2**14, 2**16, 2**18)
        for _ in range(4)
    ]
    del blocks


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from leaves(item)
    else:
        yield value


def bits(value: Any) -> Any:
    """What two answers are compared by."""
    if not isinstance(value, Tensor):
        return repr(value)
    plain = value.detach().resolve_conj().resolve_neg()
    plain = (torch.view_as_real(plain) if plain.is_complex() else plain).reshape(-1)
    digest = hashlib.sha256()
    for part in plain.split(2**16):  # a large answer is held once
        if part.is_floating_point():  # any NaN is as good as another
            part = torch.nan_to_num(part.double(), nan=1.2345e-300)
        digest.update(
            part.clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy().tobytes()
            if part.numel()
            else b""
        )
    return tuple(value.shape), digest.hexdigest()


def is_refused(graph: fx.GraphModule) -> bool:
    """By what looks at a folder's graph."""
    yields = dict.fromkeys((one for one in graph.graph.nodes if one.op == "get_attr"), TENSOR)
    (node,) = (node for node in graph.graph.nodes if node.op == "call_function")
    try:
        with little_memory():
            allowlist.check_call(node.target, node.args, node.kwargs, yields)
            trial.check(graph, "drawn")
    except FormatError:
        return True
    return False


def examined(graph: fx.GraphModule, guard: Guard, laid: Callable[[Tensor], Tensor]) -> str:
    """What happened: ``raised``, ``ran``, or what is wrong."""
    (node,) = (node for node in graph.graph.nodes if node.op == "call_function")
    guard.begin()
    stored = {name: laid(guard.tensor(value)) for name, value in graph.named_buffers()}
    before = {name: bits(value) for name, value in stored.items()}
    answers = []
    for byte in (0x11, 0xEE):
        poisoned(byte)
        torch.manual_seed(0)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda one: stored[one.target])
        try:
            with torch.no_grad(), little_memory():
                answer = node.target(*args, **kwargs)
        except (
            RuntimeError,
            IndexError,
            ValueError,
            TypeError,
            NotImplementedError,
            MemoryError,
            OverflowError,
            ZeroDivisionError,
            AssertionError,
        ) as error:
            answers.append(type(error).__name__)
            if "alloc" in str(error) and not isinstance(error, AssertionError):
                return f"wants memory: {str(error).splitlines()[0][:150]}"
        else:
            answers.append([bits(value) for value in leaves(answer)])
            del answer
    if {name: bits(value) for name, value in stored.items()} != before:
        return "changes what it is given"
    if answers[0] != answers[1]:
        return "answers differ"
    return "ran" if isinstance(answers[0], list) else "raised"


LAYOUTS: list[Callable[[Tensor], Tensor]] = [
    *[lambda x: x] * 6,
    lambda x: x.mT.contiguous().mT if x.dim() > 1 else x,
    lambda x: x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x,
    lambda x: x[:1].expand_as(x) if x.dim() and len(x) else x,
]


def main() -> None:
    seed, count, free = sys.argv[1], int(sys.argv[2]), "unchecked" in sys.argv
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    ones = torch.ones(2, 2)
    trial.check(one_call(torch.ops.aten.einsum.default, ["ij,jk->ik", [ones, ones]], {}), "")  # the first imports much
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    trial.MOST_HELD = HELD
    guard = Guard()
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        name, first = line.split()
        _, packet, overload = name.split(".")
        function = getattr(getattr(torch.ops.aten, packet), overload) if free else allowlist.function_named(name)
        for index in range(int(first), count):
            draws = Draws(function, f"{seed} {name} {index}")
            args, kwargs = draws.call()
            out.write(json.dumps(["draw", name, index]) + "\n")
            signal.setitimer(signal.ITIMER_PROF, SECONDS)  # nobody handles it, so that it ends the process anywhere
            with contextlib.redirect_stderr(io.StringIO()):
                graph = one_call(function, args, kwargs)
                refused = not free and is_refused(graph)
                what = "refused" if refused else examined(graph, guard, draws.random.choice(LAYOUTS))
            out.write(json.dumps(["done", what]) + "\n")


if __name__ == "__main__":
    main()
