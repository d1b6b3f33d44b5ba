"""NVIDIA GPUs from Ampere on: int8 convolutions and linear layers, each with all that follows it in one kernel.

The file is the saved model (as ``inductor``'s: graph.json, weights.safetensors and manifest.json in one ZIP); it holds
no machine code, and is planned where it is opened, once for each shape of its inputs:

* each layer is run by the fastest of cuDNN's fused int8 plans and our Triton kernels, timed on the GPU at hand;
* pictures lie with their channels last throughout; one CUDA graph is the whole network;
* linear layers whose weights alone have codes of 2 to 4 bits multiply by them as they are packed, for batches of few
  rows, where that is faster than float16 (``_cuda_low_bit``);
* what has no integer kernel (softmax, norms, odd pooling) is fused by torch.compile;
* the whole is timed against torch.compile(mode="reduce-overhead") in float16, and the faster one is what runs.

What was chosen is remembered in the user's cache folder, for the device, the versions and the sizes.

Grids: cuDNN pads with the code 0 and multiplies signed codes, so that what a padded convolution reads is either on 7
bits without a sign (behind ReLU) or around zero (``Capabilities.padded_zero``); layers without padding take any 8 bits,
their zero point going into the bias. Sums into which a layer leads are added before it rounds (``residuals``). Channels
in multiples of 16 are the fast ones: prune with ``round_to=16``.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import hashlib
import importlib
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, fx

from rarefy.deployment import parity
from rarefy.deployment.runtime import ACTIVATIONS, PLANAR, Capabilities, Inputs, Kernel, Parity, Runtime, several
from rarefy.errors import InputError, RarefyError, first_line
from rarefy.graph.nodes import Value, share_copy
from rarefy.kernels import is_quantised
from rarefy.runtimes._cuda_refusals import devices_of, is_memory, reported
from rarefy.runtimes.inductor import Inductor, opened
from rarefy.system.dependencies import needs
from rarefy.system.files import cache_folder, content, replacing
from rarefy.system.strict_json import parse

aten = torch.ops.aten
KEPT = 3  # shapes a session stays planned for
MOST = 16 * 2**20  # bytes of what is remembered

Shapes = tuple[object, ...]


@dataclasses.dataclass(frozen=True)
class Cuda:
    """NVIDIA GPUs from Ampere on. devices: a number, or all, among which batches are split.

    For whoever has one: int8 convolutions by cuDNN and Triton, one CUDA graph, never slower than float16 compiled.
    """

    devices: str = "0"

    suffix = ".cuda"
    decoded = False
    package = "cudnn"
    threads = 1
    capabilities = Capabilities(
        layers=PLANAR,
        float_result=PLANAR,
        posts=ACTIVATIONS,
        has_kernel_times=True,
        has_threads=False,
        padded_zero=True,
        residuals=True,
    )

    def __post_init__(self) -> None:
        if self.devices != "all" and not str(self.devices).isdecimal():
            raise InputError(f"cuda: devices={self.devices!r}: give the number of one, such as 0, or all")

    @property
    def weight_bits(self) -> int:
        """The most bits of a weight whose products add up exactly."""
        return 8

    @property
    def floats(self) -> tuple[Cuda, ...]:
        """Ways to run a float network."""
        return (self,)

    def export(self, graph: fx.GraphModule, path: str | os.PathLike[str]) -> Path:
        """Write ``graph`` (in eval mode) as one file. Raises InputError for a graph that can't be saved."""
        return Inductor().export(graph, path)

    def open(self, path: str | os.PathLike[str]) -> Session:
        """The file, or a folder that rarefy saved, ready to be planned for what it is called with."""
        return Session(path, self.devices)

    def compare(
        self,
        graph: fx.GraphModule,
        path: str | os.PathLike[str],
        inputs: Inputs,
        batch: int = 32,
        on: Runtime | None = None,
    ) -> Parity:
        """Parity of ``graph`` and the file it was exported to, in integers on the GPU of ``on`` (None: this one)."""
        reader = on if isinstance(on, Cuda) else self
        session = Session(path, reader.devices)
        program = importlib.import_module("rarefy.runtimes._cuda_program")
        integer = program.integers_of(graph)
        low_bit = importlib.import_module("rarefy.runtimes._cuda_low_bit")
        if not is_quantised(integer) or low_bit.weights_alone(graph):
            return parity.against(integer, [], lambda *part: (session.outputs(*part), {}), inputs, batch)
        read = _Tapped(session, integer)
        return parity.against(integer, read.names, read, inputs, batch)

    def kernel_times(self, path: str | os.PathLike[str], inputs: Inputs, seconds: float = 1.5) -> list[Kernel]:
        """The kernels of one run, in order, each by itself; of a float network, what multiplies, in float16."""
        session = Session(path, self.devices)
        program = importlib.import_module("rarefy.runtimes._cuda_program")
        given = [one.to(session.devices[0]) for one in several(inputs)]
        with reported(path, given), torch.no_grad():
            if is_quantised(session.graph):
                planned = session.integer(given)
                return [Kernel(*one) for one in program.step_times(planned)]
            return [Kernel(*one) for one in program.float_times(session.graph, given)]


class Session:
    """An opened file, planned for each shape that it is called with; ``outputs`` takes tensors (N, ...).

    ran: of each shape, what it runs in ("int8", "few bits" or "float16"), and the milliseconds of both where they were
    timed.
    """

    def __init__(self, path: str | os.PathLike[str], devices: str = "0"):
        self.devices = devices_of(devices)
        needs("cudnn", "cuda")
        needs("triton", "cuda")
        self.path, self.threads = path, 1
        self.graph = opened(path)
        self.ran: dict[Shapes, dict[str, object]] = {}
        self.programs: collections.OrderedDict[Shapes, Value] = collections.OrderedDict()
        self.memory = _Memory(self.devices[0])
        self.copies: dict[torch.device, fx.GraphModule] = {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.outputs(*inputs)[0]

    def outputs(self, *inputs: Tensor) -> list[Tensor]:
        """All outputs of the network, on the CPU."""
        count = min(len(self.devices), len(inputs[0]))
        parts = list(zip(*(one.detach().tensor_split(count) for one in inputs), strict=True))
        found = [self.on_gpu(*part, device=device) for part, device in zip(parts, self.devices, strict=False)]
        if count == 1:
            return [value.cpu() for value in found[0]]
        return [torch.cat([value.cpu() for value in values]) for values in zip(*found, strict=True)]

    def on_gpu(self, *inputs: Tensor, device: torch.device | None = None) -> list[Tensor]:
        """All outputs, on the device; the next call overwrites them."""
        device = device or self.devices[0]
        with torch.cuda.device(device), reported(self.path, inputs), torch.no_grad():
            given = [one.to(device, non_blocking=True) for one in inputs]
            answers: list[Tensor] = self._program(given)(*given)
        return answers

    def integers(self, device: torch.device) -> fx.GraphModule:
        """The graph in integers, its tensors on the device."""
        if device not in self.copies:
            program = importlib.import_module("rarefy.runtimes._cuda_program")
            self.copies[device] = program.integers_of(share_copy(self.graph)).to(device)
        return self.copies[device]

    def integer(self, given: Sequence[Tensor], taps: Sequence[fx.Node] = ()) -> Value:
        """The program in integers for what is given, planned."""
        program = importlib.import_module("rarefy.runtimes._cuda_program")
        made = program.Integer(self.integers(given[0].device), given, self.memory.kernels, taps)
        self.memory.save()
        return made

    def _program(self, given: Sequence[Tensor]) -> Value:
        shape = tuple((one.device, tuple(one.shape), one.stride(), one.dtype) for one in given)
        if shape not in self.programs:
            self.programs[shape] = self._planned(given, shape)
            if len(self.programs) > KEPT:
                self.programs.popitem(last=False)
        self.programs.move_to_end(shape)
        return self.programs[shape]

    def _planned(self, given: Sequence[Tensor], shape: Shapes) -> Value:
        program = importlib.import_module("rarefy.runtimes._cuda_program")
        if not is_quantised(self.graph):
            self.ran[shape] = {"form": "float16"}
            return program.Half(self.graph, given)
        low_bit = importlib.import_module("rarefy.runtimes._cuda_low_bit")
        few = None
        if low_bit.weights_alone(self.graph):
            few = low_bit.packed(self.graph, len(given[0]), given[0].device)
        ways = "int8" if few is None else "few bits"
        key = f"{self._structure} {ways} {[(tuple(one.shape), one.stride(), str(one.dtype)) for one in given]}"
        known = self._known(key)
        if known is not None and known["form"] == "float16":
            half = program.Half(self.graph, given)
            if _finite(half, given):
                self.ran[shape] = known
                return half
            known = None  # weights of other values, which half precision can't hold
        if few is not None:
            return self._few_bits(few, given, shape, key, known)
        try:
            integer = self.integer(given)
        except Exception as error:  # of a driver or a library that no test has seen: the answers do not hang on it
            if is_memory(error):
                raise
            return self._in_half(error, "int8", given, shape)
        if known is None:
            half = program.Half(self.graph, given)
            form, ms = program.faster(integer, half, given)
            known = self._remembered(key, {"form": form, "ms": ms})
            integer = integer if form == "int8" else half
        self.ran[shape] = known
        return integer

    def _few_bits(
        self, few: fx.GraphModule, given: Sequence[Tensor], shape: Shapes, key: str, known: dict[str, object] | None
    ) -> Value:
        """Weights as they are packed, or decoded to float16 once: the faster, which is remembered."""
        program = importlib.import_module("rarefy.runtimes._cuda_program")
        try:
            made = program.Half(few, given)
        except Exception as error:  # as in ``_planned``
            if is_memory(error):
                raise
            return self._in_half(error, "few bits", given, shape)
        if known is None:
            half = program.Half(self.graph, given)
            form, ms = program.faster(made, half, given)
            form = "few bits" if form == "int8" else form
            ms = {"few bits": ms["int8"], "float16": ms["float16"]}
            known = self._remembered(key, {"form": form, "ms": ms})
            made = made if form == "few bits" else half
        self.ran[shape] = known
        return made

    def _in_half(self, error: Exception, form: str, given: Sequence[Tensor], shape: Shapes) -> Value:
        program = importlib.import_module("rarefy.runtimes._cuda_program")
        why = first_line(error)
        warnings.warn(f"{self.path}: no plan in {form} ({why}); it runs in float16", stacklevel=3)
        self.ran[shape] = {"form": "float16", "why": why}
        return program.Half(self.graph, given)

    def _known(self, key: str) -> dict[str, object] | None:
        """What was found for networks of this form, or for this very one."""
        return self.memory.forms.get(key) or self.memory.forms.get(f"{key} {self._values}")

    def _remembered(self, key: str, known: dict[str, object]) -> dict[str, object]:
        """What was found, kept for all networks of this form; for this one alone where the slower was taken, its values
        being too large for half precision."""
        form, ms = known["form"], known["ms"]
        by_time = isinstance(ms, dict) and form == min(ms, key=ms.__getitem__)
        self.memory.forms[key if by_time else f"{key} {self._values}"] = known
        self.memory.save()
        return known

    @functools.cached_property
    def _structure(self) -> str:
        """Of all that times hang on: operators with their numbers, sizes and types of tensors; not of the weights'
        values, so that what is trained on runs as before."""
        digest = hashlib.sha256(str(self.graph.graph).encode())
        for name, tensor in sorted(self.graph.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        return digest.hexdigest()[:24]

    @functools.cached_property
    def _values(self) -> str:
        """Of every tensor's bytes; read where no network of this form is known."""
        digest = hashlib.sha256()
        for _, tensor in sorted(self.graph.state_dict().items()):
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()[:24]


def _finite(program: Value, given: Sequence[Tensor]) -> bool:
    return all(bool(torch.isfinite(one).all()) for one in program(*given))


class _Tapped:
    """Answers and codes of a file, each batch on the GPU; names: of the rounded values that are values there too."""

    def __init__(self, session: Session, integer: fx.GraphModule):
        self.session = session
        device = session.devices[0]
        stored = parity.coded(session.integers(device))
        steps = importlib.import_module("rarefy.runtimes._cuda_steps").Steps
        graph = session.integers(device)
        (last,) = (node for node in graph.graph.nodes if node.op == "output")
        made = {one for step in steps(graph, last.all_input_nodes, device, {}).steps for one in step.yields}
        self.names = [name for name in parity.coded(integer) if name in stored and stored[name] in made]
        self.taps = [stored[name] for name in self.names]
        self.programs: dict[Shapes, Value] = {}

    def __call__(self, *part: Tensor) -> parity.Reading:
        device = self.session.devices[0]
        with torch.cuda.device(device), reported(self.session.path, part), torch.no_grad():
            given = [one.to(device) for one in part]
            shape = tuple(tuple(one.shape) for one in given)
            if shape not in self.programs:
                self.programs = {shape: self.session.integer(given, self.taps)}
            found = [one.cpu() for one in self.programs[shape](*given)]
        count = len(found) - len(self.names)
        return found[:count], dict(zip(self.names, found[count:], strict=True))


class _Memory:
    """What was the fastest on this device with these versions: kernels by sizes, forms by model and sizes."""

    def __init__(self, device: torch.device):
        cudnn, triton = needs("cudnn", "cuda"), needs("triton", "cuda")
        name = torch.cuda.get_device_name(device)
        versions = (torch.__version__, triton.__version__, cudnn.__version__, cudnn.backend_version())
        digest = hashlib.sha256(repr((name, versions, _sources())).encode()).hexdigest()[:16]
        self.path = cache_folder() / "cuda" / f"{digest}.json"
        self.kernels: dict[str, str] = {}
        self.forms: dict[str, dict[str, object]] = {}
        with contextlib.suppress(RarefyError, OSError, ValueError):
            read: Value = parse(content(self.path, MOST), self.path)
            if all(isinstance(one, str) for one in read["kernels"].values()) and all(
                one.get("form") in ("int8", "float16", "few bits") for one in read["forms"].values()
            ):
                self.kernels, self.forms = dict(read["kernels"]), dict(read["forms"])
        self.saved = (len(self.kernels), len(self.forms))

    def save(self) -> None:
        """Where something was found; a folder that can't be written to is no reason to stop."""
        if self.saved == (len(self.kernels), len(self.forms)):
            return
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path) as file:
                file.write_text(json.dumps({"kernels": self.kernels, "forms": self.forms}, indent=0, sort_keys=True))
            self.saved = (len(self.kernels), len(self.forms))


def _sources() -> str:
    """Of the kernels that a choice was made among."""
    folder = Path(__file__).parents[1] / "kernels" / "cuda" / "convolution"
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(folder.glob("*.py")))).hexdigest()
