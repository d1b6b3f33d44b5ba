"""Other libraries, in an environment of their own (``make bench-setup`` makes .venv-peers), since they ask for packages
that rarefy has no use for.

Quantisers are run by its Python; Torch-Pruning, which asks for torch alone and cuts in the same run, is imported from
there.

    .venv-peers/bin/python bench/peers.py nncf FLOAT.onnx IMAGES.npy OUT.xml [--transformer]
    .venv-peers/bin/python bench/peers.py torchao MODEL IMAGES.npy BATCH THREADS SECONDS

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


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(json.dumps({"nncf": nncf, "torchao": torchao}[sys.argv[1]](*sys.argv[2:])))
