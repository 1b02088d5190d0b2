"""MLflow itself, in a file: numbers, settings, pictures, and a run that goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from trainer.training.trackers.mlflow_runs import MlflowTracker


def test_a_run_that_goes_on_is_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    settings = {f"option.{i}": i for i in range(120)} | {"optim.lr": 0.1, "long": "x" * 900}
    for lineage, steps in (("a", (1, 2)), ("b", (4,))):
        own = MlflowTracker("lora/x", "0123456789", tmp_path)
        own.log_settings({**settings, "lineage": lineage}, [])
        for step in steps:
            own.log_metrics({"train/loss": 1 / step, "lr/lora": 0.1}, step)
            picture = [Image.new("RGB", (8, 8))]
            own.log_pictures("preview", picture, prompts=["a fox"], step=step)
        own.finalize("success")
    client = own.client
    (run,) = client.search_runs([own.experiment.info.experiment_id])
    assert run.info.run_name == "lora/x" and run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert {each.step: each.value for each in history} == {1: 1.0, 2: 0.5, 4: 0.25}
    params, tags = run.data.params, run.data.tags
    assert params["optim.lr"] == "0.1" and len(params) == 123 and params["long"] == "x" * 500
    assert (params["lineage"], tags["changed.lineage"]) == ("a", "b")
    assert "changed.optim.lr" not in tags and "changed.long" not in tags
    shown = [each.path for each in client.list_artifacts(run.info.run_id, "preview")]
    assert shown == [f"preview/step-{step:06d}-00.png" for step in (1, 2, 4)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mlflow", "mlflow.db"]
