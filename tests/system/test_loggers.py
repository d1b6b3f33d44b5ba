"""Loggers: what each writes is read back by its own tool, a part of a run lies apart, and texts and paths make them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rarefy import plugins
from rarefy.errors import InputError
from rarefy.system import logs as logs_
from rarefy.system.logs import Logs

CURVES = [(1, {"loss": 2.0, "val": 0.5}), (2, {"loss": 1.0})]


def written(logger: Any, first: int = 0, curves: Any = CURVES) -> None:
    logs = Logs([logger], "train", first, {"epochs": 2})
    for step, values in curves:
        logs.add(step, **values, nothing=None)
    logs.close()


@pytest.mark.parametrize(
    ("given", "described"),
    [
        ("runs/a.b", ["tensorboard:folder=runs/a.b"]),
        (Path("here"), ["tensorboard:folder=here"]),
        ("C:/runs", ["tensorboard:folder=C:/runs"]),
        ("tensorboard", ["tensorboard"]),
        (["mlflow:uri=sqlite:///a.db,name=x", "wandb"], ["mlflow:uri=sqlite:///a.db,name=x", "wandb"]),
        (None, []),
    ],
)  # fmt: skip
def test_texts_and_paths(given: Any, described: list[str]) -> None:
    assert [plugins.describe(one) for one in plugins.several("loggers", given)] == described


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("wandb:mode=loud", "wandb:mode=loud"),
        ("mlflow:place=x", "unknown option"),
        ("no.such:Logger", "can't be imported"),
    ],
)
def test_what_is_no_logger_is_told(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        plugins.several("loggers", text)


def test_one_that_cannot_be_opened_closes_the_others() -> None:
    closed: list[str] = []

    class Good:
        def open(self, run: str, first: int, about: object) -> Good:
            return self

        def add(self, step: int, values: object) -> None: ...

        def close(self) -> None:
            closed.append("good")

    class Bad(Good):
        def open(self, run: str, first: int, about: object) -> Good:
            raise InputError("no")

    with pytest.raises(InputError, match="no"):
        Logs([Good(), Bad()], "train", 0, {})
    assert closed == ["good"]


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard needs the extra `logs`")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (logger,) = plugins.several("loggers", tmp_path)
    written(logger)
    written(logs_.part([logger], "compress/2-distill")[0], curves=[(7, {"loss": 3.0})])
    told = EventAccumulator(str(tmp_path))
    told.Reload()
    assert [(one.step, one.value) for one in told.Scalars("loss")] == [(1, 2.0), (2, 1.0)]
    told = EventAccumulator(str(tmp_path / "2-distill"))
    told.Reload()
    assert [(one.step, one.value) for one in told.Scalars("loss")] == [(7, 3.0)]


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="MLflow needs the extra `mlflow`")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "runs").as_uri()
    (logger,) = plugins.several("loggers", f"mlflow:uri={uri}")
    written(logger)
    client = mlflow.MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("rarefy").experiment_id])
    assert run.info.run_name == "train" and run.info.status == "FINISHED" and run.data.params == {"epochs": "2"}
    points = client.get_metric_history(run.info.run_id, "loss")
    assert [(one.step, one.value) for one in points] == [(1, 2.0), (2, 1.0)]
    Logs([logger], "distill", 0, {})  # killed: it never ends
    written(logger, 0)
    logs = Logs([logger], "distill", 5, {})
    logs.add(6, loss=0.5)
    logs.close()
    found = client.search_runs([run.info.experiment_id], "attributes.run_name = 'distill'")
    assert [one.info.status for one in found] == ["FINISHED"]
    (point,) = client.get_metric_history(found[0].info.run_id, "loss")
    assert (point.step, point.value) == (6, 0.5)


def test_a_store_that_is_none_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("mlflow", reason="MLflow needs the extra `mlflow`")
    (logger,) = plugins.several("loggers", "mlflow:uri=nosuch://place")
    with pytest.raises(InputError, match="can't be written"):
        written(logger)


@pytest.mark.slow
def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="Weights & Biases needs the extra `wandb`")
    monkeypatch.setenv("WANDB_SILENT", "true")
    (logger,) = plugins.several("loggers", f"wandb:mode=offline,folder={tmp_path},name=mine")
    written(logger)
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    assert any(path.suffix == ".wandb" and path.stat().st_size > 0 for path in run.iterdir())
