"""MLflow: a run with its parameters and metrics, in a server, a database or a folder, as its tracking URI says."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rarefy.errors import InputError, first_line
from rarefy.system.dependencies import needs
from rarefy.system.logs import Values, Writer


@dataclass(frozen=True)
class Mlflow:
    """A run of MLflow's. uri: of the tracking store; "": MLFLOW_TRACKING_URI's. name: of the run; "": what is done."""

    uri: str = ""
    experiment: str = "rarefy"
    name: str = ""

    def open(self, run: str, first: int, about: Mapping[str, object]) -> Writer:
        mlflow = needs("mlflow", "mlflow")
        try:
            client = mlflow.MlflowClient(tracking_uri=self.uri or None)
            found = client.get_experiment_by_name(self.experiment)
            experiment = client.create_experiment(self.experiment) if found is None else found.experiment_id
            return _Run(client, self._begun(client, experiment, self.name or run, first, about))
        except Exception as error:  # of the store: a server that is not there, a database that is another's
            raise InputError(
                f"logs=mlflow: {self.uri or 'MLFLOW_TRACKING_URI'} can't be written ({first_line(error)}); "
                "give the address of a server or a database, mlflow:uri=sqlite:///runs.db"
            ) from error

    def _begun(self, client: Any, experiment: str, name: str, first: int, about: Mapping[str, object]) -> str:
        """A new run's identity, or that of the killed one that this one goes on from."""
        if first:
            unfinished = f"attributes.run_name = '{name}' and attributes.status = 'RUNNING'"
            for one in client.search_runs([experiment], unfinished, max_results=1):
                return str(one.info.run_id)
        made = str(client.create_run(experiment, run_name=name).info.run_id)
        for key, value in about.items():
            client.log_param(made, key, str(value)[:_LONGEST])
        return made


_LONGEST = 500  # characters of a parameter


class _Run:
    def __init__(self, client: Any, identity: str):
        self.client, self.identity = client, identity

    def add(self, step: int, values: Values) -> None:
        now = int(time.time() * 1000)
        for name, value in values.items():
            self.client.log_metric(self.identity, name, value, timestamp=now, step=step)

    def close(self) -> None:
        self.client.set_terminated(self.identity)
