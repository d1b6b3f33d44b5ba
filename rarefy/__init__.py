"""rarefy makes a trained PyTorch model smaller and faster without making it worse, and proves it.

The public names stand below, one a line. They are imported when first used, so that ``import rarefy`` and ``rarefy
--help`` answer at once. ``rarefy.sources`` has models by text and weights by file (``load``, ``graph_of``,
``load_weights``); tasks are in ``rarefy.tasks``; what comes in several kinds lies in a folder each:
``rarefy.pruning.criteria``, ``rarefy.distillation.losses``, ``rarefy.quantization.rounding``,
``rarefy.quantization.calibration``, ``rarefy.runtimes``, ``rarefy.compression.schedules``,
``rarefy.pruning.selection``, ``rarefy.pruning.saliency``, ``rarefy.compression.students``,
``rarefy.tasks.detectors``, ``rarefy.system.loggers``.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# name -> module that defines it
_HOMES = {
    "capture": "rarefy.tasks.detector",
    "as_original": "rarefy.tasks.detector",
    "prune": "rarefy.pruning.prune",
    "mask": "rarefy.pruning.mask",
    "cluster": "rarefy.quantization.clustering.cluster",
    "distill": "rarefy.distillation.distill",
    "train": "rarefy.distillation.distill",
    "quantize": "rarefy.quantization.quantize",
    "evaluate": "rarefy.evaluation.evaluate",
    "measure": "rarefy.evaluation.measure",
    "compress": "rarefy.compression.compress",
    "Budget": "rarefy.compression.compress",
    "search": "rarefy.compression.search.search",
    "save": "rarefy.artifact.folder",
    "load": "rarefy.artifact.folder",
    "sign": "rarefy.artifact.signing",
    "verify": "rarefy.artifact.signing",
    "export": "rarefy.deployment.export",
    "certify": "rarefy.evaluation.certify",
    "report": "rarefy.reports.report",
    "push": "rarefy.evaluation.hub",
    "pull": "rarefy.evaluation.hub",
    "RarefyError": "rarefy.errors",
}
# name -> module that it is
_MODULES = {"sources": "rarefy.models.load"}

__all__ = [
    "Budget",
    "RarefyError",
    "__version__",
    "as_original",
    "capture",
    "certify",
    "cluster",
    "compress",
    "distill",
    "evaluate",
    "export",
    "load",
    "mask",
    "measure",
    "prune",
    "pull",
    "push",
    "quantize",
    "report",
    "save",
    "search",
    "sign",
    "sources",
    "train",
    "verify",
]

if TYPE_CHECKING:
    from rarefy.artifact.folder import load, save
    from rarefy.artifact.signing import sign, verify
    from rarefy.compression.budget import Budget
    from rarefy.compression.compress import compress
    from rarefy.compression.search.search import search
    from rarefy.deployment.export import export
    from rarefy.distillation.distill import distill, train
    from rarefy.errors import RarefyError
    from rarefy.evaluation.certify import certify
    from rarefy.evaluation.evaluate import evaluate
    from rarefy.evaluation.hub import pull, push
    from rarefy.evaluation.measure import measure
    from rarefy.models import load as sources
    from rarefy.pruning.mask import mask
    from rarefy.pruning.prune import prune
    from rarefy.quantization.clustering.cluster import cluster
    from rarefy.quantization.quantize import quantize
    from rarefy.reports.report import report
    from rarefy.tasks.detector import as_original, capture


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    if name not in _HOMES:
        raise AttributeError(f"module 'rarefy' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return __all__
