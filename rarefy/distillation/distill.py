"""distill(): the student learns from its teacher. The training loop, written once.

    loss = hard_weight · task(student, labels) + Σ weight · distillation(student, teacher)

A loss (``rarefy/distillation/losses``) only says what the student is to copy; batches, schedule, precision, averaging and recovery are here, and
``train()`` is the same loop without a teacher. The options are in ``training.py``, what a step minimises in ``objective.py``, mixup and cutmix in
``mixing.py``, the file a killed run goes on from in ``checkpoint.py``. Choices made:

* Student and teacher see the same augmented, and the same mixed, picture (Beyer 2021, 2106.05237: consistent teaching).
* SGD with Nesterov momentum, or AdamW; linear warm-up, then a cosine to zero; no weight decay on biases and norms.
* Everything random in step k is drawn from (seed, k): resuming needs no generator's state, and a resumed run ends, on a CPU, with the bits
  of an undisturbed one. The price is one reseeding a step, some microseconds.
* The device is read every ``CHECK_STEPS`` steps and at the end of an epoch, not each step; a loss that is not finite is found then. The state
  of the last epoch's end is kept for that case.
* Where a masked weight (``meta["sparse"]``, see masking.py) is zero, its gradient is set to zero before anything sees it: so it, its momentum and
  its average stay zero, and a checkpoint needs no mask.
* A penalty (``schedules/group_sparse.py``) adds a gradient of its own in each step; what it knows is in the checkpoint.
* EMA (``ema=0.999``) is the bias-corrected mean, θ̄ₜ = Σ dᵗ⁻ⁱ θᵢ / Σ dᵗ⁻ⁱ, so it needs no warm-up; running statistics are averaged like weights.
* Under ``torchrun`` (accelerate finds it) a batch is split over the processes: ``batch_size`` is the whole, and batch norm's statistics are those of the whole (``syncing.py``), unless
  ``sync_norm="no"``; every process reads the whole batch from the task, and takes its share.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from rarefy import plugins
from rarefy.compression import students
from rarefy.distillation.checkpoint import Store, digest, load_into, tensors_of
from rarefy.distillation.distributed import _accelerator, _all_or_none
from rarefy.distillation.loop import MOMENT_BATCHES, _compiler_keeps_its_hints, _Run, _seeded
from rarefy.distillation.objective import Losses, terms
from rarefy.distillation.options import Penalty, Training, training_of
from rarefy.distillation.qat import is_quantized, suited, to_codes, to_trainable
from rarefy.distillation.qat_batch_norm import put_back
from rarefy.distillation.teachers import Teachers, teachers_of
from rarefy.distillation.tensorboard import Logs
from rarefy.errors import InputError, TrainingDiverged
from rarefy.graph.capture import as_graph
from rarefy.graph.nodes import device_of
from rarefy.graph.shapes import output_shapes
from rarefy.tasks.task import Task


def distill(
    student: nn.Module | str | students.Student,
    teacher: Teachers,
    task: Task,
    *,
    loss: Losses = "lskd",
    training: Training | str | None = None,
    device: torch.device | str | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_seconds: float = 60.0,
    validate: Callable[[fx.GraphModule], float] | None = None,
    penalty: Penalty | None = None,
    cache: str | Path | None = None,
    logs: str | Path | None = None,
    progress: bool = True,
    **options: Any,
) -> fx.GraphModule:
    """The student's graph with trained weights; student and teacher stay as they are. A quantised student is trained in its codes
    (quantization-aware training, ``trainable.py``) and comes back quantised.

    student: a network, or a word for one made from the (first) teacher (``"depth:keep=0.5"``, ``"timm:resnet18"``; rarefy/compression/students).
    teacher: a module, several, or [(weight, module), ...]: the mean of their losses. The student itself may be one.
    loss: text (``"lskd"``, ``"lskd + 50*mse:on=stages"``), a loss, or [(weight, loss), ...].
    training, options: a Training, or the name of one: fast, normal, patient; options are its fields and go before it. Where images have no labels,
        hard_weight=0 learns from the teacher alone.
    checkpoint: a folder; the run is saved there at each epoch's end and every ``checkpoint_seconds``, and goes on from there when it is called
        again with the same arguments. A finished run is returned at once.
    validate: graph -> a number that should rise, in place of top-1 on the val split.
    penalty: a gradient to add in each step (``Penalty``).
    cache: a folder for the teacher's answers (``answers.py``): each picture is shown to the teacher once.
    logs: a folder for TensorBoard.

    Raises InputError for options, models or checkpoints that do not fit; TrainingDiverged when the loss is not finite, whose ``graph`` is the
    last good state.
    """
    return _run(
        "distill", student, teacher, task, loss, training, device, checkpoint, checkpoint_seconds, validate, penalty, cache, logs, progress, options
    )  # fmt: skip


def train(
    model: nn.Module,
    task: Task,
    *,
    training: Training | str | None = None,
    device: torch.device | str | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_seconds: float = 60.0,
    validate: Callable[[fx.GraphModule], float] | None = None,
    penalty: Penalty | None = None,
    logs: str | Path | None = None,
    progress: bool = True,
    **options: Any,
) -> fx.GraphModule:
    """``distill`` without a teacher: the model's graph trained from labels alone."""
    return _run(
        "train",
        model,
        None,
        task,
        None,
        training,
        device,
        checkpoint,
        checkpoint_seconds,
        validate,
        penalty,
        None,
        logs,
        progress,
        options,
    )


def _run(
    step_name: str,
    student: nn.Module | str | students.Student,
    teacher: Teachers,
    task: Task,
    loss: Losses,
    given: Training | str | None,
    device: torch.device | str | None,
    checkpoint: str | Path | None,
    checkpoint_seconds: float,
    validate: Callable[[fx.GraphModule], float] | None,
    penalty: Penalty | None,
    cache: str | Path | None,
    logs: str | Path | None,
    progress: bool,
    options: Mapping[str, Any],
    origin: str | None = None,
) -> fx.GraphModule:
    """origin: digest of what the student was made from, where that is not the student itself."""
    training = training_of(given, options, step_name)
    if isinstance(student, fx.GraphModule) and is_quantized(student):
        common: Any = (
            teacher, task, loss, suited(training), device, checkpoint, checkpoint_seconds, validate, penalty, cache, logs, progress, {}, digest(student)
        )  # fmt: skip
        try:
            return to_codes(student, _run(step_name, _normed(student, task, training, device), *common))
        except TrainingDiverged as error:
            error.graph = to_codes(student, error.graph)  # type: ignore[attr-defined]
            raise
    sum_of = terms(loss)
    if bool(sum_of) != (teacher is not None):
        raise InputError("distill: a loss needs a teacher, and a teacher a loss; train() learns from labels alone")
    if not sum_of and not training.hard_weight:
        raise InputError(
            "train: hard_weight=0 leaves nothing to learn from; give it a weight, or distil from a teacher"
        )
    if training.dot and not (sum_of and training.hard_weight):
        raise InputError(
            f"{step_name}: dot={training.dot} weighs labels and teacher apart, so it needs both; pass dot=0"
        )
    if training.patience and validate is None and task.val is None:
        raise InputError(
            f"{step_name}: patience={training.patience} needs a val split to look at, or validate=; pass patience=0"
        )
    guides = [(share, _graph(one, task, "teacher")) for share, one in teachers_of(teacher)]
    if not isinstance(student, nn.Module):
        if not guides:
            raise InputError(f"student={student!r}: is made from a teacher; pass one, or a network")
        student = students.made(student, guides[0][1], task=task, seed=training.seed)
    home = device_of(student)
    graph = _graph(student, task, "student")
    for _, guide in guides if any(one.on == "logits" for _, one in sum_of) else ():
        ours, theirs = output_shapes(graph), output_shapes(guide)
        if ours != theirs:
            raise InputError(
                f"student answers {ours}, the teacher {theirs}; give both the same classes, or compare features alone (loss='mse')"
            )
    described = {
        **dataclasses.asdict(training),
        "loss": " + ".join(f"{weight:g}*{plugins.describe(one)}" for weight, one in sum_of) or None,
        **({"penalty": penalty.describe()} if penalty is not None else {}),
        **({"shares": [share for share, _ in guides]} if len(guides) > 1 else {}),
        **({"cache": True} if cache is not None else {}),
    }
    accelerator = _accelerator(device, any(one.on == "logits" for _, one in sum_of) or training.hard_weight > 0)
    if accelerator.num_processes > 1 and training.dot:
        raise InputError(
            f"{step_name}: dot={training.dot} takes two passes backwards, which several processes can't share; pass dot=0"
        )
    if accelerator.num_processes > 1 or device is None:
        device = accelerator.device
    device = torch.device(device)
    store = None
    if checkpoint is not None:
        splits = [split for split in ("train", "val") if split == "train" or task.val is not None]
        identity = {
            "options": described,
            "student": origin or digest(graph),
            "teacher": " ".join(digest(guide) for _, guide in guides) or None,
            "data": {split: task.fingerprint(split) for split in splits},
            "task": {
                key: value for key, value in task.describe().items() if key not in splits
            },  # those name places, not content
        }
        store = Store(Path(checkpoint), identity, checkpoint_seconds, accelerator.is_main_process)
        finished = store.finished()
        if finished is not None:
            load_into(graph, {name: value.to(home) for name, value in store.tensors("result.").items()})
            graph.meta.setdefault("history", []).append(finished)
            return graph

    with _seeded(training.seed, device), _compiler_keeps_its_hints(), _all_or_none(accelerator, checkpoint):
        known = [digest(guide) for _, guide in guides] if cache is not None else []
        run = _Run(graph, guides, task, training, sum_of, accelerator, device, penalty)
        if store is not None:
            run.restore(store)
            accelerator.wait_for_everyone()
        if cache is not None:
            run.remember(cache, known)
        if logs is not None and accelerator.is_main_process:
            run.logs = Logs(logs, run.step)
        facts = run.fit(step_name, store, validate, progress)
    record = {"step": step_name, "options": described, "facts": facts}
    graph.to(home)
    graph.meta.setdefault("history", []).append(record)
    if store is not None:
        store.finish(record, tensors_of(graph))
        accelerator.wait_for_everyone()
    return graph


# -- small parts


def _graph(model: nn.Module, task: Task, which: str) -> fx.GraphModule:
    graph = as_graph(model, torch.zeros(2, *task.input_shape, device=device_of(model))).eval()
    wanted = tuple(graph.meta["inputs"][0]["shape"])
    if graph.meta.get("core") is None and wanted != tuple(task.input_shape):
        raise InputError(
            f"{which}: takes inputs of shape {wanted}, the task gives {tuple(task.input_shape)}; give the task that size=, or capture it anew"
        )
    return graph


def _normed(
    student: fx.GraphModule, task: Task, training: Training, device: torch.device | str | None
) -> fx.GraphModule:
    """The trainable form of a quantised student; with ``live_norm`` the batch norm that was folded into it is put back."""
    learns = to_trainable(student)
    weights = {
        name
        for record in student.meta.get("history", [])
        if record["step"] == "quantize"
        for name in record["facts"].get("batch_norm", ())
    }
    if not weights or training.live_norm == "no":
        return learns
    home = device_of(learns)
    device = (
        torch.device(device) if device is not None else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    )
    fitting = {} if training.hard_weight else {"labelled": False}
    batches = task.batches(
        "train", min(training.batch_size, 64), shuffle_seed=training.seed, augment=True, device=device, **fitting
    )
    return put_back(learns.to(device), weights, (inputs for inputs, _ in itertools.islice(batches, MOMENT_BATCHES))).to(
        home
    )
