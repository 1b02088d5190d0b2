"""MLflow: on the server that `MLFLOW_TRACKING_URI` names, else in `mlflow.db` of a run folder,
which `mlflow ui --backend-store-uri sqlite:///<run folder>/mlflow.db` shows."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL.Image import Image

from trainer.training.trackers.tracker import PROJECT, PlainTracker

TAG = "attention_trainer.id"
PARAMS = 100  # in one call, at most
LETTERS = 500  # of a value that every server takes


class MlflowTracker(PlainTracker):
    """own: the id of the run, a tag by which one that goes on is found again."""

    def __init__(self, name: str, own: str, folder: Path) -> None:
        super().__init__()
        self.run_name, self.own, self.folder = name, own, folder

    @cached_property
    def client(self) -> Any:
        from mlflow import MlflowClient

        here = f"sqlite:///{(self.folder / 'mlflow.db').resolve()}"
        return MlflowClient(tracking_uri=os.environ.get("MLFLOW_TRACKING_URI") or here)

    @cached_property
    def experiment(self) -> Any:
        """MLflow's run."""
        client, known = self.client, self.client.get_experiment_by_name(PROJECT)
        home = known.experiment_id if known else client.create_experiment(
            PROJECT, artifact_location=None if os.environ.get("MLFLOW_TRACKING_URI") else
            (self.folder / "mlflow").resolve().as_uri(),
        )  # fmt: skip
        found = client.search_runs([home], f"tags.`{TAG}` = '{self.own}'", max_results=1)
        if found:
            client.update_run(found[0].info.run_id, status="RUNNING")
            return found[0]
        return client.create_run(home, run_name=self.run_name, tags={TAG: self.own})

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        import time

        from mlflow.entities import Metric

        now = int(1000 * time.time())
        own = [
            Metric(name, value, timestamp=now, step=step or 0) for name, value in metrics.items()
        ]
        self.client.log_batch(self.experiment.info.run_id, metrics=own)

    def log_settings(self, settings: Mapping[str, Any], metrics: Sequence[str]) -> None:
        """MLflow keeps a parameter as it was first: one with another value now becomes a tag."""
        from mlflow.entities import Param

        run, had = self.experiment.info.run_id, self.experiment.data.params
        texts = {key: str(value)[:LETTERS] for key, value in settings.items()}
        new = [Param(key, value) for key, value in texts.items() if key not in had]
        for first in range(0, len(new), PARAMS):
            self.client.log_batch(run, params=new[first : first + PARAMS])
        for key, value in texts.items():
            if had.get(key, value) != value:
                self.client.set_tag(run, f"changed.{key}", value)

    def log_pictures(
        self, name: str, pictures: Sequence[Image], *, prompts: Sequence[str], step: int
    ) -> None:
        for number, picture in enumerate(pictures):
            place = f"{name}/step-{step:06d}-{number:02d}.png"
            self.client.log_image(self.experiment.info.run_id, picture, artifact_file=place)

    def log_clip(self, name: str, files: Sequence[Path], *, step: int) -> None:
        self.client.log_artifact(self.experiment.info.run_id, str(files[0]), name)

    def finalize(self, status: str) -> None:
        if "experiment" in self.__dict__:
            ended = "FINISHED" if status == "success" else "FAILED"
            self.client.set_terminated(self.experiment.info.run_id, ended)
