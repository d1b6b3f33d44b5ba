"""Other libraries, in an environment of their own (``make bench-setup`` makes .venv-peers), since they ask for packages
that rarefy has no use for.

Quantisers are run by its Python; Torch-Pruning, which asks for torch alone and cuts in the same run, is imported from
there.

    .venv-peers/bin/python bench/peers.py nncf FLOAT.onnx IMAGES.npy OUT.xml [--transformer]
    .venv-peers/bin/python bench/peers.py torchao MODEL IMAGES.npy BATCH THREADS SECONDS
    .venv-peers/bin/python bench/peers.py weights VARIANT FLOAT.onnx TARGET
    .venv-peers/bin/python bench/peers.py panel VARIANT FOLDER COUNT [--mixed] [--transformer]

Imports nothing of rarefy. The last line it prints is JSON.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any


def python() -> str | None:
    """The peers' Python: ``$RAREFY_PEERS``, or the repository's .venv-peers; None where there is none."""
    named = os.environ.get("RAREFY_PEERS")
    file = Path(named) if named else Path(__file__).resolve().parents[1] / ".venv-peers" / "bin" / "python"
    return str(file) if file.exists() else None


def torch_pruning() -> Any:
    """The module: this environment's, or the peers' one, of which nothing else is looked at. Raises ImportError where
    there is none."""
    name = "torch_pruning"
    interpreter = python()
    places = (
        Path(interpreter).parents[1].glob(f"lib/python*/site-packages/{name}/__init__.py") if interpreter else iter(())
    )
    found = next(places, None)
    if name in sys.modules or importlib.util.find_spec(name) is not None or found is None:
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(name, found, submodule_search_locations=[str(found.parent)])
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def nncf(source: str, images: str, target: str, *flags: str) -> dict[str, Any]:
    """NNCF's default post-training int8 of an ONNX file, written as OpenVINO's IR."""
    import nncf as library
    import numpy
    import openvino

    stored = numpy.load(images)
    model = openvino.Core().read_model(source)
    begun = time.process_time()
    quantized = library.quantize(
        model,
        library.Dataset([image[None] for image in stored]),
        subset_size=len(stored),
        model_type=library.ModelType.TRANSFORMER if "--transformer" in flags else None,
    )
    seconds = time.process_time() - begun
    openvino.save_model(quantized, target, compress_to_fp16=False)
    return {"nncf": library.__version__, "openvino": openvino.__version__, "cpu_s": seconds}


def torchao(model: str, images: str, batch: str, threads: str, seconds: str) -> dict[str, Any]:
    """torchao's PT2E int8 for x86 through Inductor: median milliseconds of one run, taking turns with the float model,
    compiled too."""
    import statistics

    import numpy
    import torch
    import torch._inductor.config as config
    from torchao.quantization.pt2e import move_exported_model_to_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from bench.speed_models import build

    torch.set_num_threads(int(threads))
    config.freezing = True
    network = build(model)
    stored = torch.from_numpy(numpy.load(images))
    example = stored[: int(batch)]
    with torch.no_grad():
        exported = torch.export.export(network, (example,)).module()
        quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
        prepared = prepare_pt2e(exported, quantizer)
        for start in range(0, len(stored) - len(example) + 1, len(example)):
            prepared(stored[start : start + len(example)])
        converted = convert_pt2e(prepared)
        move_exported_model_to_eval(converted)
        compiled = {"int8": torch.compile(converted), "float": torch.compile(network)}
        for run in compiled.values():
            for _ in range(5):
                run(example)
        taken: dict[str, list[float]] = {name: [] for name in compiled}
        begun = time.perf_counter()
        while time.perf_counter() - begun < float(seconds) or len(taken["int8"]) < 10:
            for name, run in compiled.items():
                at = time.perf_counter()
                run(example)
                taken[name].append(1000 * (time.perf_counter() - at))
    return {"torch": torch.__version__, "ms": {name: statistics.median(one) for name, one in taken.items()}}


# ---- bench/quantization_panel.py: FOLDER holds float.onnx, calibration_K.npy and judged_K.npy for its input K


def peak_mb() -> float:
    """The most memory of this process so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith("VmHWM:"))


def stored(folder: Path, kind: str) -> list[Any]:
    """The arrays (N, ...) of each input, which stay on the disk."""
    import numpy

    files = sorted(folder.glob(f"{kind}_[0-9].npy"))
    return [numpy.load(file, mmap_mode="r") for file in files]


def answers(file: Path, arrays: list[Any], count: int, target: Path) -> None:
    """Writes what ONNX Runtime or OpenVINO, on one thread, answers to the first ``count`` samples, all outputs."""
    import numpy

    run, batch = opened(file)
    outputs: list[list[Any]] = []
    for start in range(0, count, batch):
        outputs.append([numpy.array(one) for one in run([array[start : start + batch] for array in arrays])])
    numpy.savez(target, *[numpy.concatenate(parts)[:count] for parts in zip(*outputs, strict=True)])


def opened(file: Path, batch: int = 8) -> tuple[Any, int]:
    """What runs the file, and so many samples at a time."""
    if file.suffix == ".xml":
        import openvino

        model = openvino.Core().read_model(file)
        fixed = model.inputs[0].get_partial_shape()[0]
        hints = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
        compiled = openvino.compile_model(model, "CPU", hints)
        return (lambda arrays: list(compiled(arrays).values())), fixed.get_length() if fixed.is_static else batch
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    fixed = session.get_inputs()[0].shape[0]
    run = lambda arrays: session.run(None, dict(zip(names, arrays, strict=True)))
    return run, fixed if isinstance(fixed, int) else batch


def panel_ort(source: Path, arrays: list[Any], target: Path, *, per_channel: bool) -> str:
    """ONNX Runtime's static quantiser: its preparation, then QDQ, uint8 by min-max, int8 weights."""
    import contextlib
    import io
    import logging

    import onnx
    import onnxruntime
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):
        def __init__(self, names: list[str]) -> None:
            self.left = ({name: array[i : i + 1] for name, array in zip(names, arrays)} for i in range(len(arrays[0])))

        def get_next(self) -> Any:
            return next(self.left, None)

    prepared = target.with_name(target.stem + "-prepared.onnx")
    logging.getLogger().setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            quant_pre_process(str(source), str(prepared))
        except Exception:  # its symbolic shapes are refused by some operators; its own advice is to go without
            quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        quantization.quantize_static(
            str(prepared),
            str(target),
            Reader([one.name for one in onnx.load(prepared).graph.input]),
            quant_format=quantization.QuantFormat.QDQ,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            per_channel=per_channel,
            calibrate_method=quantization.CalibrationMethod.MinMax,
        )
    return str(onnxruntime.__version__)


def panel_nncf(source: Path, arrays: list[Any], target: Path, *flags: str) -> str:
    """NNCF's post-training default on the ONNX file (target .onnx) or OpenVINO's model of it (.xml)."""
    import logging

    import nncf as library

    library.set_log_level(logging.ERROR)
    samples = range(len(arrays[0]))
    chosen: dict[str, Any] = {"subset_size": len(samples)}
    if "--mixed" in flags:
        chosen["preset"] = library.QuantizationPreset.MIXED
    if "--transformer" in flags:
        chosen["model_type"] = library.ModelType.TRANSFORMER
    if target.suffix == ".onnx":
        import onnx

        model: Any = onnx.load(source)
        names = [one.name for one in model.graph.input]
        feed = lambda index: {name: array[index : index + 1] for name, array in zip(names, arrays)}
        onnx.save(library.quantize(model, library.Dataset(samples, feed), **chosen), target)
    else:
        import openvino

        model = openvino.Core().read_model(source)
        feed = lambda index: [array[index : index + 1] for array in arrays]
        quantized = library.quantize(model, library.Dataset(samples, feed), **chosen)
        openvino.save_model(quantized, target, compress_to_fp16=False)
    return str(library.__version__)


def panel(variant: str, folder: str, count: str, *flags: str) -> dict[str, Any]:
    """Quantises FOLDER's float.onnx in one way and writes its answers to the judged samples, VARIANT.npz."""
    place = Path(folder)
    target = place / f"{variant}{'.xml' if variant == 'nncf-openvino' else '.onnx'}"
    source, arrays = place / "float.onnx", stored(place, "calibration")
    begun = time.process_time()
    if variant.startswith("ort"):
        version = panel_ort(source, arrays, target, per_channel=variant == "ort-channel")
    else:
        version = panel_nncf(source, arrays, target, *flags)
    found = {"version": version, "cpu_s": time.process_time() - begun, "peak_mb": peak_mb()}
    answers(target, stored(place, "judged"), int(count), place / f"{variant}.npz")
    return found


def weights(variant: str, source: str, target: str) -> dict[str, Any]:
    """Weights alone in few bits: ort-int8 (an ONNX file), nncf-int8, nncf-int4 (OpenVINO's IR), without data."""
    if variant == "ort-int8":
        from onnxruntime import __version__, quantization

        kind = quantization.QuantType.QInt8
        quantization.quantize_dynamic(source, target, weight_type=kind, per_channel=True)
        return {"version": __version__}
    import nncf as library
    import openvino

    four = {"mode": library.CompressWeightsMode.INT4_SYM, "group_size": -1, "all_layers": True}
    options: dict[str, Any] = four if variant == "nncf-int4" else {"mode": library.CompressWeightsMode.INT8_SYM}
    model = library.compress_weights(openvino.Core().read_model(source), **options)
    openvino.save_model(model, target, compress_to_fp16=False)
    return {"version": library.__version__}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(
        json.dumps({"nncf": nncf, "torchao": torchao, "weights": weights, "panel": panel}[sys.argv[1]](*sys.argv[2:]))
    )
