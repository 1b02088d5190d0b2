"""The numbers of a run, and that every place counts its steps alike."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
from commands import command
from lightning.pytorch.loggers import Logger
from torch import nn

from trainer.__main__ import main
from trainer.training.callbacks import hang as hang_file
from trainer.training.callbacks.hang import HangGuard
from trainer.training.callbacks.metrics import (
    Measured,
    Metrics,
    StepFlops,
    group_names,
    memory_so_far,
    with_loss,
)
from trainer.training.module import DiffusionModule
from trainer.training.optim import Optim, make_optimizer
from trainer.training.trackers.tracker import MetricsFile

RECIPE = """
data: {source: world, count: 8, validation: 2}
methods: {lora: {sites: cross, rank: 2}, word_embedding: {tokens: [fox]}}
optim: {lr: 0.01, lrs: {word_embedding: 0.1}, warmup: 3}
run: {batch_size: 2, accumulate: 2, log_every: 2, validate_every: 2, checkpoint_every: 2,
      checkpoint_keep: 9}
preview: {every: 2, steps: 1, prompts: [a fox, a cat]}
"""


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> tuple[Path, str]:
    """A run of two steps, of two batches each, that went on to five, and what it printed."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "mine.yaml").write_text(RECIPE)
    words = [f"recipe={folder / 'mine.yaml'}", f"backbone={tiny_folder}", f"run={folder / 'run'}"]
    said = ""
    for steps in (2, 5):
        done = command("fit", *words, f"run.steps={steps}")
        assert done.returncode == 0, done.stderr[-3000:]
        said += done.stderr
    return folder / "run", said


def logged(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def tensorboard(run: Path) -> Iterator[Any]:
    """What TensorBoard reads of each time that the run was begun or resumed."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for path in sorted(
        (run / "tensorboard").glob("events*"), key=lambda path: path.stat().st_mtime
    ):
        events = EventAccumulator(str(path))
        events.Reload()
        yield events


def test_every_place_counts_the_same_steps(resumed: tuple[Path, str]) -> None:
    """With batches that are added up, validation between, and a resume after step 2."""
    run, said = resumed
    lines = logged(run)
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 4, 5]
    assert [line["step"] for line in lines if "val/loss" in line] == [2, 4]
    scalars = [
        (tag, event.step, pytest.approx(event.value, rel=1e-5))
        for events in tensorboard(run)
        for tag in events.Tags()["scalars"]
        for event in events.Scalars(tag)
    ]
    assert sorted((tag, step) for tag, step, _ in scalars) == sorted(
        (tag, line["step"]) for line in lines for tag in line if tag not in ("step", "time")
    )
    own = {(tag, line["step"]): line[tag] for line in lines for tag in line if "/" in tag}
    assert all(own[tag, step] == value for tag, step, value in scalars)
    images = [look.step for events in tensorboard(run) for look in events.Images("preview")]
    assert images == [0, 2, 4, 5]
    names = [f"step-{step:06d}" for step in (0, 2, 4, 5)]
    assert sorted(path.name for path in (run / "previews").glob("step-*")) == names
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == names[1:]
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [(each["event"], each["step"]) for each in events] == [
        ("started", 0), ("finished", 2), ("started", 2), ("finished", 5)
    ]  # fmt: skip
    assert re.findall(r"^step (\d+/\d+)", said, re.M) == ["1/2", "2/2", "3/5", "4/5", "5/5"]
    assert "resumes after step 2" in said


def test_the_lr_is_that_of_the_step(resumed: tuple[Path, str]) -> None:
    """It rises over three steps; each group of parameters has its own."""
    rows = {line["step"]: line for line in logged(resumed[0]) if "train/loss" in line}
    for step, share in {1: 0.25, 2: 0.5, 4: 1.0, 5: 1.0}.items():
        assert rows[step]["lr/lora"] == pytest.approx(0.01 * share)
        assert rows[step]["lr/word_embedding"] == pytest.approx(0.1 * share)
    for row in rows.values():
        assert row["train/images_per_second"] > 0
        assert row["train/peak_memory_mib"] > 50  # torch alone takes more


def test_tensorboard_lists_the_recipe(resumed: tuple[Path, str]) -> None:
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    (first, _) = tensorboard(resumed[0])
    content = first.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    own = HParamsPluginData.FromString(content).session_start_info.hparams
    assert own["optim.lr"].number_value == 0.01 and own["optim.lrs.word_embedding"].number_value
    assert own["run.accumulate"].number_value == 2 and own["run.steps"].number_value == 2
    assert own["methods.lora.rank"].number_value == 2 and own["optim.schedule"].string_value
    assert own["data.source"].string_value == "world"
    assert own["preview.prompts"].string_value == '["a fox", "a cat"]'
    content = first.SummaryMetadata("_hparams_/experiment").plugin_data.content
    metrics = HParamsPluginData.FromString(content).experiment.metric_infos
    assert [each.name.tag for each in metrics] == ["train/loss", "val/loss"]


@pytest.mark.parametrize("clip", ["null", "1e-4"])
def test_the_norm_is_that_before_clipping(
    clip: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[float] = []

    def seen(self: DiffusionModule, optimizer: torch.optim.Optimizer) -> None:
        """Lightning calls this after the callbacks have clipped."""
        squares = [float((value.grad.double() ** 2).sum()) for value in self.trainable().values()]
        left.append(sum(squares) ** 0.5)

    monkeypatch.setattr(DiffusionModule, "on_before_optimizer_step", seen)
    (tmp_path / "mine.yaml").write_text(RECIPE)
    words = [f"recipe={tmp_path / 'mine.yaml'}", f"backbone={tiny_folder}", "tracker=none"]
    words += ["optim.warmup=0", "preview.every=0", "run.validate_every=0", "run.steps=1"]
    for limit in ("null", clip):
        run = tmp_path / f"run-{limit}"
        if not run.exists():
            assert main(["fit", *words, f"optim.clip={limit}", f"run={run}"]) == 0
    whole, *cut = left
    assert logged(tmp_path / f"run-{clip}")[0]["train/grad_norm"] == pytest.approx(whole, rel=1e-5)
    assert cut == ([] if clip == "null" else [pytest.approx(1e-4, rel=1e-2)])


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, which a test sets."""
    now = [100.0]
    monkeypatch.setattr(hang_file.time, "monotonic", lambda: now[0])
    return now


def test_speed_counts_the_time_of_steps_alone(clock: list[float], tmp_path: Path) -> None:
    """Batches of 6 clips: data and steps count, a preview, a save and a validation do not."""
    hang, watch = HangGuard({}, tmp_path), SimpleNamespace(norm=torch.tensor(3.0), spent=2)
    metrics = Metrics(2, Measured(6, "clips", 9), hang=hang, watch=watch)  # type: ignore[arg-type]
    module = Nothing()
    record: Logger = MetricsFile(tmp_path)

    def after(step: int) -> Any:
        return SimpleNamespace(
            global_step=step, max_steps=5, is_global_zero=True, loggers=[record],
            strategy=SimpleNamespace(root_device=torch.device("cpu")),
            callback_metrics={"train/loss": torch.tensor(0.5 * step)},
        )  # fmt: skip

    for step in (1, 2, 3, 4, 5):
        hang.enter("data")
        clock[0] += 1
        hang.enter("step")
        clock[0] += step
        metrics.on_train_batch_end(after(step - 1), module)
        metrics.on_train_batch_end(after(step), module)
        with hang.inside("preview"):
            clock[0] += 50
        hang.enter("validate")
        clock[0] += 30
    rows = logged(tmp_path)
    assert [(row["step"], row["train/clips_per_second"]) for row in rows] == [
        (1, 6 / 2), (2, 6 / 3), (4, 12 / 9), (5, 6 / 6)
    ]  # fmt: skip
    assert {row["train/grad_norm"] for row in rows} == {3.0}
    assert [row["time/data_ms"] for row in rows] == [1000.0] * 4
    assert [row["data/samples"] for row in rows] == [6, 12, 24, 30]
    assert [row["data/passes"] for row in rows] == pytest.approx([6 / 9, 12 / 9, 24 / 9, 30 / 9])
    assert {row["data/skipped_steps"] for row in rows} == {2}
    smooth = [0.5, 0.98 * 0.5 + 0.02 * 1.0]
    for step in (3, 4, 5):
        smooth.append(0.98 * smooth[-1] + 0.02 * 0.5 * step)
    shown = [row["train/loss_smooth"] for row in rows]
    assert shown == pytest.approx([smooth[0], smooth[1], smooth[3], smooth[4]])


class Nothing(DiffusionModule):
    """A module without parameters and without losses."""

    def __init__(self) -> None:
        lightning.LightningModule.__init__(self)
        self.trained, self.losses = (), None


def test_a_loss_that_is_not_finite_does_not_smooth() -> None:
    before = torch.tensor(1.0)
    assert with_loss(before, torch.tensor(float("nan"))) == 1.0
    assert with_loss(None, torch.tensor(3.0)) == 3.0
    first = with_loss(None, torch.tensor(float("nan")))
    assert with_loss(first, torch.tensor(2.0)) == 2.0, "one at the start would stay for ever"


def test_a_batch_that_encodes_its_pictures_has_more_operations_than_one_with_latents() -> None:
    """As those of a stream, whose latents are kept in the first epoch."""
    flops, x = StepFlops(True), torch.ones(2, 3)  # 24 operations a product
    rank = SimpleNamespace(
        world_size=2, strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )  # fmt: skip
    module = SimpleNamespace(backbone=SimpleNamespace(computes_in=torch.float32))

    def rate(*products: int) -> float:
        for count in products:
            flops.begin(encodes=count == 2)
            for _ in range(count):
                x @ x.T
            flops.end()
        return flops.numbers(rank, module, 4.0)["train/model_tflops"]  # type: ignore[arg-type]

    assert rate(2) == pytest.approx(2 * 48 / 4 / 1e12)
    assert rate(2, 1, 1) == pytest.approx(2 * (48 + 24 + 24) / 4 / 1e12)
    assert rate(1) == pytest.approx(2 * 24 / 4 / 1e12)


def test_what_a_run_logs_of_its_weights_and_its_work(resumed: tuple[Path, str]) -> None:
    """Of LoRA and a word: norms by block, the parts of a step, and what was counted."""
    run, _ = resumed
    rows = [line for line in logged(run) if "train/loss" in line]
    blocks = [name.removeprefix("weight_norm/") for name in rows[0] if "weight_norm/" in name]
    assert {"unet.down_blocks.0", "unet.mid_block.attentions.0", "unet.up_blocks.1"} <= set(blocks)
    assert any(block.startswith("text_encoder.") for block in blocks) and len(blocks) < 10
    for row in rows:
        assert 0 < row["train/update_ratio"] < 1
        assert row["train/model_tflops"] > 0 and "train/mfu" not in row  # of a CPU it is not known
        parts = [row[f"time/{part}_ms"] for part in ("data", "forward", "backward", "optimizer")]
        assert all(part > 0 for part in parts)
        whole = 1000 * 4 / row["train/images_per_second"]  # of a step, two batches of two
        assert sum(parts) == pytest.approx(whole, rel=0.2)
        assert any(re.fullmatch(r"train/loss_t\d{3}", name) for name in row)
    assert [row["data/samples"] for row in rows] == [4, 8, 16, 20]
    assert [row["data/passes"] for row in rows] == [0.5, 1, 2, 2.5]


def test_a_run_has_its_page(resumed: tuple[Path, str]) -> None:
    run, _ = resumed
    text = (run / "report.html").read_text(encoding="utf-8")
    assert "finished after 5 steps" in text and "Norm of the trained weights by block" in text
    assert re.findall(r"each step|<h3>(a \w+)</h3>", text) == ["a fox", "a cat"]


def test_memory_is_the_largest_resident_set() -> None:
    status = Path("/proc/self/status")
    if not status.is_file():
        pytest.skip("the system does not say")
    most = float(re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())[0])
    assert memory_so_far(torch.device("cpu"))["peak"] == pytest.approx(most / 1024, rel=0.05)


@pytest.mark.parametrize(
    ("name", "lrs", "wanted"),
    [
        ("adamw", {}, ["lora-new_token"]),
        ("adamw", {"b.weight": 0.1}, ["lora-1", "lora-2"]),
        ("adamw", {"c.row": 0.1}, ["lora", "new_token"]),
        ("muon", {}, ["lora-muon", "lora-new_token-adamw"]),
    ],
)
def test_groups_are_called_by_their_methods(
    name: str, lrs: dict[str, float], wanted: list[str]
) -> None:
    shapes = {"a.weight": (2, 2), "b.weight": (2, 2), "b.bias": (2,), "c.row": (2,)}
    named = {key: nn.Parameter(torch.zeros(shape)) for key, shape in shapes.items()}
    owners = {"lora": ["a.weight", "b.weight", "b.bias"], "new_token": ["c.row"]}
    if lrs.get("b.weight"):
        del named["c.row"]
    made = make_optimizer(Optim(1e-3, 5, name=name), named, lrs=lrs, blocks=["a."], device="cpu")
    assert group_names(made, named, owners=owners) == wanted
    assert group_names(made, named, owners={})[0].startswith("all")


@pytest.mark.parametrize(("system", "used"), [("linux", 3 * 2**10), ("darwin", 3 * 2**20)])
def test_the_memory_of_a_process_is_in_mib(
    system: str, used: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux gives KiB and macOS bytes."""
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=used))
    assert memory_so_far(torch.device("cpu")) == {"peak": 3.0}
