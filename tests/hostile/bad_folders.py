"""Folders that break one promise of docs/format.md each, and are whole otherwise: manifest.json has their hashes.

``KINDS`` maps the promise that is broken to (a function that breaks it in a good folder, words of the refusal); the
words stand in words.txt, one line a promise. A folder by hand, to look at or to try on another reader:

    python tests/hostile/bad_folders.py a_node_reads_only_nodes_before_it bad/
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from torch import nn

from rarefy.artifact import folder as folder_
from rarefy.graph.capture import capture

CHANGES: dict[str, Callable[[Path], None]] = {}
HUGE = 2**40
NOISE = np.random.default_rng(0).bytes(5000)  # of as many codes as the tensor "eight" has


class Small(nn.Module):
    """Every kind of tensor a folder may hold, in few bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.linear = nn.Linear(4, 5)
        self.few = nn.Parameter(torch.tensor([0.0, 1.5, 0, 0, -2.0, 0, 0, 0, 0.25, 0]).repeat(3))
        self.register_buffer("four", torch.arange(-8, 7, dtype=torch.int8).reshape(5, 3))
        self.register_buffer("eight", (10 * torch.randn(50, 100)).clamp(-100, 100).to(torch.int8))
        self.register_buffer("mask", torch.tensor([True, False, True, True, False]), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(self.norm(self.conv(x)).relu().mean((2, 3)))
        y = y + self.four.to(torch.float32).mean(1) + self.eight.to(torch.float32).mean() + self.few.mean()
        return torch.where(self.mask, y, -y)


def small_graph() -> torch.fx.GraphModule:
    torch.manual_seed(0)
    graph = capture(Small(), torch.zeros(2, 3, 8, 8))
    graph.meta["bits"] = {"four": 4}
    graph.meta["sparse"] = ["few"]
    return graph


def good_folder(folder: Path) -> Path:
    return folder_.save(small_graph(), folder)


def seal(folder: Path) -> None:
    """Make manifest.json's sizes and hashes those of the files, as who forges a folder would."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for name in manifest["files"]:
        if (folder / name).is_file():
            data = (folder / name).read_bytes()
            manifest["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    path.write_text(json.dumps(manifest))


def breaks(change: Callable[[Path], None]) -> Callable[[Path], None]:
    """The whole folder is changed."""

    def broken(folder: Path) -> None:
        change(folder)
        if (folder / "manifest.json").is_file() and not change.__name__.startswith("manifest"):
            seal(folder)

    CHANGES[change.__name__] = broken
    return change


def in_text(change: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    """graph.json is changed as bytes."""

    def broken(folder: Path) -> None:
        (folder / "graph.json").write_bytes(change((folder / "graph.json").read_bytes()))
        seal(folder)

    CHANGES[change.__name__] = broken
    return change


def in_graph(change: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    """graph.json is changed as what it says."""

    def broken(folder: Path) -> None:
        value = json.loads((folder / "graph.json").read_text())
        change(value)
        (folder / "graph.json").write_text(json.dumps(value))
        seal(folder)

    CHANGES[change.__name__] = broken
    return change


def in_weights(change: Callable[[dict[str, Any], bytes], tuple[Any, bytes]]) -> Callable[..., Any]:
    """weights.safetensors is changed: (header, data) -> (header, data)."""

    def broken(folder: Path) -> None:
        path = folder / "weights.safetensors"
        whole = path.read_bytes()
        length = int.from_bytes(whole[:8], "little")
        header, data = change(json.loads(whole[8 : 8 + length]), whole[8 + length :])
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data)
        seal(folder)

    CHANGES[change.__name__] = broken
    return change


def node(graph: dict[str, Any], target: str) -> dict[str, Any]:
    return next(entry for entry in graph["nodes"] if entry.get("target") == target)


def call(graph: dict[str, Any], target: str, *args: Any, **kwargs: Any) -> None:
    """A call more, before the output."""
    graph["nodes"].insert(
        -1, {"op": "call_function", "name": "more", "target": target, "args": list(args), "kwargs": kwargs}
    )


def with_bytes(header: dict[str, Any], data: bytes, name: str, content: bytes) -> tuple[dict[str, Any], bytes]:
    """The tensor of that name holds ``content`` instead, as bytes in one axis."""
    parts, position = [], 0
    for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        part = content if key == name else data[begin:end]
        if key == name:
            entry.update(dtype="U8", shape=[len(content)])
        entry["data_offsets"] = [position, position + len(part)]
        position += len(part)
        parts.append(part)
    return header, b"".join(parts)


# ----------------------------------------------------------------------------------------------------------- the folder


@breaks
def there_is_a_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


@breaks
def manifest_is_json(folder: Path) -> None:
    (folder / "manifest.json").write_bytes(b"\x80\x04}q\x00.")


@breaks
def manifest_is_whole(folder: Path) -> None:
    data = (folder / "manifest.json").read_bytes()
    (folder / "manifest.json").write_bytes(data[: len(data) // 2])


def _manifest(name: str, change: Callable[[dict[str, Any]], None]) -> None:
    def broken(folder: Path) -> None:
        value = json.loads((folder / "manifest.json").read_text())
        change(value)
        (folder / "manifest.json").write_text(json.dumps(value))

    CHANGES[name] = broken


_manifest("manifest_is_of_a_known_schema", lambda value: value.update(schema=3))
_manifest("manifest_has_a_whole_schema", lambda value: value.update(schema=True))
_manifest("manifest_is_ours", lambda value: value.update(format="onnx"))
_manifest("manifest_lists_files", lambda value: value.pop("files"))
_manifest("manifest_lists_the_graph", lambda value: value["files"].pop("graph.json"))
_manifest("manifest_names_stay_inside", lambda value: value["files"].update({"../x": value["files"]["graph.json"]}))
_manifest("manifest_sizes_are_sizes", lambda value: value["files"]["graph.json"].update(size=-1))
_manifest("manifest_hashes_are_hashes", lambda value: value["files"]["graph.json"].update(sha256=["0" * 64]))
_manifest("manifest_hashes_fit", lambda value: value["files"]["graph.json"].update(sha256="0" * 64))


@breaks
def weights_are_there(folder: Path) -> None:
    (folder / "weights.safetensors").unlink()


@breaks
def weights_are_no_link(folder: Path) -> None:
    (folder / "weights.safetensors").rename(folder / "elsewhere")
    (folder / "weights.safetensors").symlink_to("elsewhere")


@breaks
def the_graph_is_no_link(folder: Path) -> None:
    (folder / "graph.json").unlink()
    (folder / "graph.json").symlink_to("/etc/hostname")


@breaks
def weights_are_no_pipe(folder: Path) -> None:
    (folder / "weights.safetensors").unlink()
    os.mkfifo(folder / "weights.safetensors")


@breaks
def the_graph_is_no_folder(folder: Path) -> None:
    (folder / "graph.json").unlink()
    (folder / "graph.json").mkdir()


@breaks
def manifest_fits_flipped_bits(folder: Path) -> None:
    data = bytearray((folder / "weights.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "weights.safetensors").write_bytes(data)


# --------------------------------------------------------------------------------------------------- graph.json as text

_text = {
    "the_graph_is_not_empty": lambda data: b"",
    "the_graph_is_whole": lambda data: data[:-20],
    "the_graph_is_utf8": lambda data: data.replace(b"conv2d", b"conv\xff\xfe"),
    "the_graph_is_json": lambda data: b"\x80\x04\x95\x0b\x00\x00\x00",
    "the_graph_is_an_object": lambda data: b"[" + data + b"]",
    "a_key_stands_once": lambda data: data.replace(b'"schema":1,', b'"schema":1,"schema":1,'),
    "numbers_are_not_nan": lambda data: data.replace(b'"schema":1,', b'"schema":NaN,'),
    "sizes_are_not_nan": lambda data: data.replace(b'"shape":[4]', b'"shape":[NaN]', 1),
    "numbers_are_finite": lambda data: data.replace(b"1e-05", b"1e999"),
    "numbers_are_not_endless": lambda data: data.replace(b'"schema":1,', b'"schema":1' + b"0" * 100_000 + b","),
    "text_is_not_deep": lambda data: b"[" * 1_000_000,
    "text_is_not_deep_in_objects": lambda data: b'{"a":' * 500_000,
    "text_is_not_deep_in_arguments": lambda data: data.replace(
        b'"args":[', b'"args":[' + b"[" * 100 + b"]" * 100 + b",", 1
    ),
    "text_has_few_values": lambda data: data.replace(b'"nodes":[', b'"nodes":[' + b"[]," * 3_000_000),
    "text_has_few_objects": lambda data: data.replace(
        b'"meta":{', b'"meta":{"history":[' + b"{}," * 1_500_000 + b"{}],"
    ),
    "text_is_short": lambda data: data + b" " * 17_000_000,
    "strings_end": lambda data: b'{"a":"' + b'\\"' * 5_000_000,
    "strings_end_after_an_escape": lambda data: b'{"a":"' + b'\\"' * 5_000_000 + b"\\",
}
for _name, _change in _text.items():
    _change.__name__ = _name
    in_text(_change)


# ------------------------------------------------------------------------------------------------- what graph.json says

_conv = "aten.conv2d.default"
_input = {"node": "x"}
_graph: dict[str, Callable[[dict[str, Any]], Any]] = {
    "the_schema_is_known": lambda graph: graph.update(schema=3),
    "the_format_is_ours": lambda graph: graph.update(format="pt2"),
    "there_are_no_other_keys": lambda graph: graph.update(code="import os"),
    "nodes_are_a_list": lambda graph: graph.update(nodes={}),
    "nodes_are_objects": lambda graph: graph["nodes"].insert(0, "x"),
    "nodes_are_not_without_end": lambda graph: graph.update(nodes=[0] * 200_000),
    "nodes_have_no_other_keys": lambda graph: graph["nodes"][0].update(type="os.system"),
    "operations_are_known": lambda graph: node(graph, _conv).update(op="call_method", target="__reduce__", args=[]),
    "submodules_are_not_called": lambda graph: node(graph, _conv).update(op="call_module", target="conv", args=[]),
    "only_operators_have_keywords": lambda graph: graph["nodes"][-1].update(kwargs={"x": _input}),
    "an_output_has_no_target": lambda graph: graph["nodes"][-1].update(target="output"),
    # calls
    "no_function_of_the_system_is_called": lambda graph: call(graph, "os.system", "touch /tmp/hostile"),
    "no_function_of_python_is_called": lambda graph: call(graph, "builtins.eval", "1"),
    "no_function_of_torch_is_called": lambda graph: call(graph, "torch.load", "x.pt"),
    "no_other_function_of_operator_is_called": lambda graph: call(graph, "operator.attrgetter", "__class__"),
    "no_other_library_is_called": lambda graph: call(graph, "prims.add.default", _input, _input),
    "no_attribute_of_a_namespace_is_called": lambda graph: call(graph, "aten.__class__.default"),
    "no_attribute_of_an_operator_is_called": lambda graph: call(graph, "aten.conv2d._schema"),
    "no_overload_is_invented": lambda graph: call(graph, "aten.relu.other", _input),
    "no_operator_of_ours_is_invented": lambda graph: call(graph, "rarefy.run.default", _input),
    "no_file_is_read": lambda graph: call(graph, "aten.from_file.default", "/etc/passwd", False, 10),
    "no_unwritten_memory_is_read": lambda graph: call(graph, "aten.empty.memory_format", [10]),
    "no_argument_is_changed": lambda graph: call(graph, "aten.relu_.default", _input),
    "no_result_is_written_to_an_argument": lambda graph: call(graph, "aten.add.out", _input, _input, out=_input),
    "no_storage_is_set": lambda graph: call(graph, "aten.set_.source_Tensor", _input, _input),
    "targets_are_text": lambda graph: node(graph, _conv).update(target=["aten", "conv2d"]),
    # arguments
    "arguments_are_enough": lambda graph: node(graph, _conv)["args"].__delitem__(slice(1, None)),
    "arguments_are_not_too_many": lambda graph: node(graph, "aten.relu.default")["args"].append(1),
    "arguments_are_not_given_twice": lambda graph: node(graph, "aten.relu.default").update(kwargs={"self": _input}),
    "arguments_are_of_the_schema": lambda graph: node(graph, "aten.relu.default").update(kwargs={"__class__": 1}),
    "arguments_are_of_their_type": lambda graph: node(graph, _conv)["args"].__setitem__(0, "x"),
    "lists_are_of_their_type": lambda graph: call(graph, "aten.cat.default", ["x"]),
    "results_are_of_their_type": lambda graph: call(graph, "aten.zeros.default", [_input]),
    "a_node_reads_only_nodes_before_it": lambda graph: node(graph, _conv)["args"].__setitem__(0, {"node": "relu"}),
    "a_node_does_not_read_itself": lambda graph: node(graph, _conv)["args"].__setitem__(0, {"node": "conv2d"}),
    "a_reference_is_a_name": lambda graph: node(graph, _conv)["args"].__setitem__(0, {"node": ["x"]}),
    "an_argument_has_one_type": lambda graph: node(graph, _conv)["args"].__setitem__(0, {"node": "x", "float": "inf"}),
    "an_argument_has_a_known_type": lambda graph: node(graph, _conv)["args"].__setitem__(0, {"pickle": "gASVCw=="}),
    "a_dtype_is_one": lambda graph: call(graph, "aten.zeros.default", [1], dtype={"dtype": "load"}),
    "a_device_is_the_cpu": lambda graph: call(graph, "aten.zeros.default", [1], device={"device": "cuda"}),
    "a_layout_is_strided": lambda graph: call(graph, "aten.zeros.default", [1], layout={"layout": "sparse_coo"}),
    "a_memory_format_is_one": lambda graph: call(
        graph, "aten.clone.default", _input, memory_format={"memory_format": "x"}
    ),
    "a_float_is_one": lambda graph: call(graph, "aten.mul.Tensor", _input, {"float": "1"}),
    "a_slice_has_three_parts": lambda graph: call(graph, "operator.getitem", _input, {"slice": [1, 2]}),
    "a_dict_has_text_keys": lambda graph: graph["nodes"][-1].update(args=[{"dict": [[1, _input]]}]),
    "a_text_is_short": lambda graph: call(graph, "aten.einsum.default", "a" * 20_000, [_input]),
    "a_number_has_64_bits": lambda graph: call(graph, "aten.mul.Tensor", _input, 2**70),
    "memory_is_bounded_in_zeros": lambda graph: call(graph, "aten.zeros.default", [HUGE]),
    "memory_is_bounded_in_products": lambda graph: call(graph, "aten.ones.default", [2**20, 2**20]),
    "memory_is_bounded_in_full": lambda graph: call(graph, "aten.full.default", [HUGE], 0.0),
    "memory_is_bounded_in_expand": lambda graph: call(graph, "aten.expand.default", _input, [HUGE, 3, 8, 8]),
    "memory_is_bounded_in_repeat": lambda graph: call(graph, "aten.repeat.default", _input, [HUGE, 1, 1, 1]),
    "memory_is_bounded_in_repeat_interleave": lambda graph: call(
        graph, "aten.repeat_interleave.self_int", _input, HUGE
    ),
    "memory_is_bounded_in_arange": lambda graph: call(graph, "aten.arange.default", HUGE),
    "memory_is_bounded_in_steps_of_arange": lambda graph: call(graph, "aten.arange.start_step", 0, 1.0, 1e-300),
    "memory_is_bounded_in_arange_without_numbers": lambda graph: call(graph, "aten.arange.default", {"float": "nan"}),
    "memory_is_bounded_in_arange_without_steps": lambda graph: call(graph, "aten.arange.start_step", 0, 1, 0),
    "memory_is_bounded_in_eye": lambda graph: call(graph, "aten.eye.default", HUGE),
    "memory_is_bounded_in_padding": lambda graph: call(graph, "aten.constant_pad_nd.default", _input, [HUGE, 0]),
    "memory_is_bounded_in_one_hot": lambda graph: call(graph, "aten.one_hot.default", _input, HUGE),
    "memory_is_bounded_in_what_fits_a_literal": lambda graph: call(
        graph, "aten.repeat.default", _input, [1, 1, 2000, 2000]
    ),
    "a_call_runs_on_an_example": lambda graph: call(graph, "aten.expand.default", _input, [3, 5]),
    "a_resize_stays_in_its_picture": lambda graph: call(
        graph, "aten.upsample_nearest2d.default", _input, [5, 5], 5e-324, 1.0
    ),
    "sizes_do_not_explode": lambda graph: call(graph, "operator.pow", 9, 10**9),
    "sizes_are_numbers": lambda graph: call(graph, "operator.mul", "a", 10**9),
    "tensors_are_not_indexed_by_python": lambda graph: call(graph, "operator.getitem", _input, 0),
    # names
    "a_node_has_a_name_of_its_own": lambda graph: node(graph, "aten.relu.default").update(name="conv2d"),
    "a_name_is_no_program": lambda graph: node(graph, "aten.relu.default").update(name="x = __import__('os')\nrelu"),
    "a_name_is_no_keyword": lambda graph: node(graph, "aten.relu.default").update(name="lambda"),
    "a_name_is_no_builtin": lambda graph: node(graph, "aten.relu.default").update(name="print"),
    "a_name_is_not_self": lambda graph: node(graph, "aten.relu.default").update(name="self"),
    "a_name_is_not_torch": lambda graph: node(graph, "aten.relu.default").update(name="torch"),
    "a_name_is_text": lambda graph: node(graph, "aten.relu.default").update(name=1),
    "an_input_is_no_program": lambda graph: node(graph, "x").update(target="x=__import__('os').system('id')"),
    "an_input_is_not_the_rest": lambda graph: node(graph, "x").update(target="*x"),
    "an_input_is_not_torch": lambda graph: node(graph, "x").update(target="torch"),
    "an_input_has_no_default": lambda graph: node(graph, "x").update(args=[1]),
    "an_input_has_a_name_of_its_own": lambda graph: graph["nodes"].insert(
        1, {"op": "placeholder", "name": "x_1", "target": "x"}
    ),
    "inputs_are_those_of_meta": lambda graph: graph["meta"].update(
        inputs=graph["meta"]["inputs"] * 2, names={"inputs": [], "outputs": []}, sizes=[[None, 1, 1]] * 2
    ),
    "the_stack_is_a_name": lambda graph: node(graph, _conv).update(stack="a\nb"),
    "there_is_an_output": lambda graph: graph["nodes"].pop(),
    "there_is_one_output": lambda graph: graph["nodes"].insert(-1, {**graph["nodes"][-1], "name": "output_1"}),
    "the_output_is_last": lambda graph: graph["nodes"].append({**node(graph, "aten.relu.default"), "name": "late"}),
    "there_are_nodes": lambda graph: graph.update(nodes=[]),
    # tensors
    "tensors_are_an_object": lambda graph: graph.update(tensors=[]),
    "a_tensor_read_is_there": lambda graph: node(graph, "conv.weight").update(target="conv.other"),
    "no_attribute_is_read": lambda graph: node(graph, "conv.weight").update(target="__class__.__init__.__globals__"),
    "no_method_is_read": lambda graph: node(graph, "conv.weight").update(target="forward"),
    **{
        promise: lambda graph, name=name: graph["tensors"].update(
            {name: {"kind": "parameter", "same_as": "conv.weight"}}  # the folder holds all that it names
        )
        for promise, name in {
            "tensor_names_stay_inside": "../x",
            "tensor_names_are_no_paths": "/etc/passwd",
            "tensor_names_have_no_empty_part": "a..b",
            "tensor_names_are_not_empty": "",
            "tensor_names_are_not_private_to_python": "__class__.weight",
            "tensor_names_are_no_keywords": "in.weight",
            "tensor_names_hide_no_method": "state_dict",
            "tensor_names_hide_no_method_of_a_submodule": "a.forward.b",
            "tensor_names_hide_no_graph": "graph",
            "tensor_names_hide_no_flag": "training",
            "tensor_names_are_short": "a." * 1000 + "b",
            "tensor_names_are_no_modules": "conv",
        }.items()
    },
    "tensors_are_in_the_weights": lambda graph: graph["tensors"].update(other=graph["tensors"]["conv.weight"]),
    "tensors_are_not_without_end": lambda graph: graph["tensors"].update(
        dict.fromkeys(map("t{}".format, range(30_000)), 0)
    ),
    "modules_are_not_without_end": lambda graph: graph["tensors"].update(
        {
            ".".join([f"m{index}", *"abcdefghijkl", "w"]): {"kind": "parameter", "same_as": "conv.weight"}
            for index in range(5_000)
        }
    ),
    "a_tensor_is_an_object": lambda graph: graph["tensors"].update(mask=1),
    "a_tensor_has_a_kind": lambda graph: graph["tensors"]["mask"].update(kind="module"),
    "a_tensor_has_no_other_keys": lambda graph: graph["tensors"]["mask"].update(hook="os.system"),
    "a_tensor_has_a_shape": lambda graph: graph["tensors"]["mask"].pop("shape"),
    "a_shape_is_not_negative": lambda graph: graph["tensors"]["mask"].update(shape=[-5]),
    "a_shape_is_whole": lambda graph: graph["tensors"]["mask"].update(shape=[5.0]),
    "a_shape_is_no_flag": lambda graph: graph["tensors"]["mask"].update(shape=[True]),
    "a_shape_is_that_of_the_weights": lambda graph: graph["tensors"]["conv.weight"].update(shape=[4, 27]),
    "a_shape_fits_the_bytes": lambda graph: graph["tensors"]["conv.weight"].update(shape=[HUGE]),
    "a_shape_fits_memory": lambda graph: graph["tensors"]["conv.weight"].update(shape=[HUGE, HUGE]),
    "a_shape_has_few_axes": lambda graph: graph["tensors"]["mask"].update(shape=[1] * 100),
    "a_dtype_is_known": lambda graph: graph["tensors"]["mask"].update(dtype="object"),
    "a_dtype_is_that_of_the_weights": lambda graph: graph["tensors"]["conv.weight"].update(
        dtype="int32", requires_grad=False
    ),
    "a_flag_is_a_flag": lambda graph: graph["tensors"]["conv.weight"].update(requires_grad=1),
    "codes_do_not_train": lambda graph: graph["tensors"].update(
        mask={"kind": "parameter", "requires_grad": True, "dtype": "int8", "shape": [5]}
    ),
    "channels_last_has_four_axes": lambda graph: graph["tensors"]["mask"].update(channels_last=True),
    "storing_is_known": lambda graph: graph["tensors"]["four"].update(stored="pickle"),
    "only_the_smallest_form_counts_values": lambda graph: graph["tensors"]["few"].update(values=3),
    "only_codes_are_packed": lambda graph: graph["tensors"]["mask"].update(stored="packed", bits=4),
    "bits_are_2_to_8": lambda graph: graph["tensors"]["four"].update(bits=1),
    "bits_are_a_number": lambda graph: graph["tensors"]["four"].update(bits=[4]),
    "packed_codes_have_their_length": lambda graph: graph["tensors"]["four"].update(shape=[5, 4]),
    "packed_codes_have_their_width": lambda graph: graph["tensors"]["four"].update(bits=5),
    "coded_codes_have_their_length": lambda graph: graph["tensors"]["eight"].update(shape=[50, 101]),
    "coded_codes_fit_memory": lambda graph: graph["tensors"]["eight"].update(shape=[HUGE]),
    "only_floats_are_sparse": lambda graph: graph["tensors"]["few"].update(dtype="int32", requires_grad=False),
    "sparse_weights_have_no_bits": lambda graph: graph["tensors"]["few"].update(bits=4),
    "sparse_weights_fit_memory": lambda graph: graph["tensors"]["few"].update(shape=[HUGE]),
    "sparse_weights_have_their_length": lambda graph: graph["tensors"]["few"].update(shape=[33]),
    "sparse_weights_are_not_read_as_they_are": lambda graph: graph["tensors"]["few"].pop("stored"),
    "what_is_sparse_is_a_list": lambda graph: graph["meta"].update(sparse="few"),
    "what_is_sparse_is_there": lambda graph: graph["meta"].update(sparse=["fewer"]),
    "a_shared_tensor_is_there": lambda graph: graph["tensors"].update(
        {"norm.bias": {"kind": "parameter", "same_as": "x"}}
    ),
    "a_shared_tensor_is_not_itself": lambda graph: graph["tensors"].update(mask={"kind": "buffer", "same_as": "mask"}),
    "a_shared_tensor_is_of_one_kind": lambda graph: graph["tensors"].update(
        mask={"kind": "buffer", "same_as": "conv.bias"}
    ),
    "a_shared_tensor_says_no_more": lambda graph: graph["tensors"].update(
        other={"kind": "parameter", "same_as": "conv.bias", "requires_grad": False}
    ),
    "a_shared_tensor_is_not_another_shared_one": lambda graph: graph["tensors"].update(
        other={"kind": "parameter", "same_as": "conv.bias"}, more={"kind": "parameter", "same_as": "other"}
    ),
    # meta
    "meta_has_inputs": lambda graph: graph["meta"].pop("inputs"),
    "meta_inputs_have_a_shape": lambda graph: graph["meta"]["inputs"][0].pop("shape"),
    "meta_inputs_have_a_dtype": lambda graph: graph["meta"]["inputs"][0].update(dtype="load"),
    "meta_inputs_fit_memory": lambda graph: graph["meta"]["inputs"][0].update(shape=[HUGE]),
    "meta_core_is_a_name": lambda graph: graph["meta"].update(core=[1]),
    "meta_history_is_a_list": lambda graph: graph["meta"].update(history={"step": "prune"}),
    "meta_history_is_of_records": lambda graph: graph["meta"].update(history=["prune"]),
    "meta_bits_are_an_object": lambda graph: graph["meta"].update(bits=["four"]),
    "meta_bits_are_of_tensors": lambda graph: graph["meta"].update(bits={"other": 4}),
    "meta_bits_are_2_to_8": lambda graph: graph["meta"].update(bits={"four": 64}),
    "meta_bits_are_no_flags": lambda graph: graph["meta"].update(bits={"four": True}),
    "meta_floats_are_floats": lambda graph: graph["meta"].update(facts={"$float": "1 + 1"}),
}
for _name, _change in _graph.items():
    _change.__name__ = _name
    in_graph(_change)


# ---------------------------------------------------------------------------------------------------------- the weights


@breaks
def weights_are_not_empty(folder: Path) -> None:
    (folder / "weights.safetensors").write_bytes(b"")


@breaks
def a_header_is_shorter_than_the_file(folder: Path) -> None:
    (folder / "weights.safetensors").write_bytes((2**63 - 1).to_bytes(8, "little") + b"{}")


@breaks
def weights_are_no_pickle(folder: Path) -> None:
    torch.save({"conv.weight": torch.zeros(4)}, folder / "weights.safetensors")


@in_weights
def a_header_is_json(header, data):
    return b"\x80\x04}.", data


@in_weights
def a_header_is_not_deep(header, data):
    return b'{"a":' * 100_000, data


@in_weights
def weights_are_complete(header, data):
    header, data = with_bytes(header, data, "mask", b"")
    header.pop("mask")
    return header, data


@in_weights
def a_header_covers_the_file(header, data):
    header.pop("mask")
    return header, data


@in_weights
def weights_have_no_other_tensor(header, data):
    end = len(data)
    return {**header, "other": {"dtype": "U8", "shape": [4], "data_offsets": [end, end + 4]}}, data + b"abcd"


@in_weights
def a_header_has_no_other_keys(header, data):
    header["mask"]["layout"] = "strided"
    return header, data


@in_weights
def a_header_shape_is_of_sizes(header, data):
    """Of a tensor that is stored in another form, whose shape there is not compared with graph.json."""
    header["eight"]["shape"] = [str(size) for size in header["eight"]["shape"]]
    return header, data


@in_weights
def a_tensor_has_the_bytes_of_its_shape(header, data):
    begin, end = header["norm.weight"]["data_offsets"]
    shape, dtype = header["norm.weight"]["shape"], header["norm.weight"]["dtype"]
    header, data = with_bytes(header, data, "norm.weight", data[begin:end] + bytes(4))
    header["norm.weight"].update(shape=shape, dtype=dtype)
    return header, data


@in_weights
def offsets_are_inside(header, data):
    last = max(header.values(), key=lambda entry: entry["data_offsets"])
    last["data_offsets"][1] += HUGE
    last["shape"] = [HUGE]
    return header, data


@in_weights
def offsets_are_not_negative(header, data):
    first = min(header.values(), key=lambda entry: entry["data_offsets"])
    first["data_offsets"][0] = -8
    return header, data


@in_weights
def offsets_are_whole(header, data):
    header["mask"]["data_offsets"] = [0.0, 5.0]
    return header, data


@in_weights
def tensors_do_not_overlap(header, data):
    header["norm.weight"]["data_offsets"] = header["norm.bias"]["data_offsets"]
    return header, data


@in_weights
def tensors_leave_no_gap(header, data):
    for entry in header.values():
        entry["data_offsets"] = [offset + 8 for offset in entry["data_offsets"]]
    return header, bytes(8) + data


@in_weights
def tensors_are_followed_by_nothing(header, data):
    return header, data + b"PK\x03\x04"


@in_weights
def a_header_has_the_dtype_of_the_graph(header, data):
    header["norm.weight"]["dtype"] = "I32"
    return header, data


@in_weights
def a_header_has_the_shape_of_the_graph(header, data):
    header["norm.weight"]["shape"] = [2, 2]
    return header, data


@in_weights
def a_header_shape_fits_its_bytes(header, data):
    header["norm.weight"]["dtype"] = "F64"
    return header, data


@in_weights
def a_flag_is_0_or_1(header, data):
    begin, end = header["mask"]["data_offsets"]
    return header, data[:begin] + b"\x02" * (end - begin) + data[end:]


@in_weights
def packed_codes_end_in_zero_bits(header, data):
    end = header["four"]["data_offsets"][1]
    return header, data[: end - 1] + b"\xff" + data[end:]


@in_weights
def sparse_weights_end_with_the_last_value(header, data):
    begin, end = header["few"]["data_offsets"]
    return with_bytes(header, data, "few", data[begin:end] + bytes(4))


@in_weights
def sparse_weights_are_as_many_as_their_bits(header, data):
    begin, end = header["few"]["data_offsets"]
    return with_bytes(header, data, "few", bytes([data[begin] | 1]) + data[begin + 1 : end])


@in_weights
def sparse_bits_end_in_zero_bits(header, data):
    begin, end = header["few"]["data_offsets"]
    return with_bytes(
        header, data, "few", data[begin : begin + 3] + bytes([data[begin + 3] | 0x80]) + data[begin + 4 : end]
    )


@in_weights
def a_sparse_value_is_not_zero(header, data):
    begin, end = header["few"]["data_offsets"]
    return with_bytes(header, data, "few", data[begin : end - 4] + bytes(4))


@in_weights
def a_frame_is_zstandard(header, data):
    return with_bytes(header, data, "eight", b"not a frame at all, but long enough to hold it")


@in_weights
def a_frame_is_whole(header, data):
    begin, end = header["eight"]["data_offsets"]
    return with_bytes(header, data, "eight", data[begin : end - 1])


@in_weights
def a_frame_says_its_size(header, data):
    return with_bytes(header, data, "eight", zstandard.ZstdCompressor(write_content_size=False).compress(NOISE))


@in_weights
def a_frame_says_its_true_size(header, data):
    """A bomb: the header of a frame of 5,000 bytes before the blocks of one of 200 MB."""
    bomb = bytearray(zstandard.ZstdCompressor(write_content_size=False).compress(bytes(200_000_000)))
    honest = zstandard.ZstdCompressor().compress(NOISE)
    parameters = zstandard.frame_header_size(honest)
    return with_bytes(
        header, data, "eight", honest[:parameters] + bytes(bomb[zstandard.frame_header_size(bytes(bomb)) :])
    )


@in_weights
def a_frame_is_no_bomb(header, data):
    return with_bytes(header, data, "eight", zstandard.ZstdCompressor().compress(bytes(100_000_000)))


@in_weights
def a_frame_is_followed_by_nothing(header, data):
    begin, end = header["eight"]["data_offsets"]
    return with_bytes(header, data, "eight", data[begin:end] * 2)


@in_graph
def _seven_bits(graph):
    graph["tensors"]["eight"]["bits"] = 7


@in_weights
def _hundreds(header, data):
    return with_bytes(
        header, data, "eight", zstandard.ZstdCompressor().compress(bytes(64 + byte % 64 for byte in NOISE))
    )


_steps = CHANGES.pop("_seven_bits"), CHANGES.pop("_hundreds")
CHANGES["coded_codes_stay_in_their_bits"] = lambda folder: [step(folder) for step in _steps] and None

_words = (Path(__file__).parent / "words.txt").read_text().splitlines()
WORDS = dict(line.split(": ", 1) for line in _words)
KINDS = {promise: (change, WORDS[promise]) for promise, change in CHANGES.items()}


if __name__ == "__main__":
    CHANGES[sys.argv[1]](good_folder(Path(sys.argv[2])))
