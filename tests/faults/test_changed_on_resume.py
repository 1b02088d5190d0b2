"""What changes between stopping and resuming: a key that may change holds from the next step on, as
seen in the weights; and data, starts and steps that cannot go on are refused by name."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from trainer.common.exit_codes import LeaveError
from trainer.config.load import load_recipe
from trainer.data.loader import loader
from trainer.training import fit as fit_file

pytestmark = pytest.mark.faults
PLAIN = ("run.steps=3", "optim.clip=null", "optim.scale_lr=false", "optim.weight_decay=0")
Weights = dict[str, torch.Tensor]


@pytest.fixture
def stopped(run: Any, fault: Any) -> Callable[..., Path]:
    """`stopped(folder, *words)`: a run whose last checkpoint is that of step 2."""

    def stop(folder: Path, *own: str) -> Path:
        with fault(signals={"numbers": [signal.SIGTERM], "step": 1}):
            assert run(folder, *own) == 143
        return folder

    return stop


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory, words: Any) -> Path:
    """A run of two steps, which the tests below copy and go on with."""
    folder = tmp_path_factory.mktemp("changed") / "two"
    return fit_file.fit(load_recipe(words(*PLAIN, "run.steps=2")), folder)


@pytest.fixture(scope="module")
def third_step(two_steps: Path, words: Any, look: Any) -> Weights:
    """The weights after one more step without a change."""
    folder = two_steps.with_name("plain")
    shutil.copytree(two_steps, folder)
    fit_file.fit(load_recipe(words(*PLAIN)), folder)
    before, after, _ = last_step(folder, look)
    assert 5e-4 < moved(before, after) < 2e-3
    return after


def last_step(folder: Path, look: Any) -> tuple[Weights, Weights, dict[str, Any]]:
    """The weights before and after the last step, and the state after it."""
    *_, one, other = look.checkpoints(folder)
    (before, _), (after, state) = look.read_checkpoint(one), look.read_checkpoint(other)
    return before, after, state


def moved(before: Weights, after: Weights) -> float:
    """The largest change of a value."""
    return max(float((after[name] - value).abs().max()) for name, value in before.items())


@pytest.mark.parametrize(
    ("word", "least", "most"),
    [
        ("optim.lr=1e-6", 1e-8, 2e-6),
        ("optim.betas=[0,0]", 9e-4, 1.0001e-3),  # lr times the sign of the gradient
        ("optim.eps=1e6", 0, 1e-8),
        ("optim.scale_lr=true", 1e-3, 4e-3),  # the batch has two pictures
        ("optim.schedule=cosine", 2e-4, 5e-4),  # of whose three steps two are done: 0.25
        ("optim.lrs={selective: 0.1}", 5e-2, 2e-1),
        ("optim.clip=1e-30", 0, 9e-4),
        ("objective.caption_dropout=0.99", 1e-5, 5e-3),
        ("objective.offset_noise=5", 1e-5, 5e-3),
        ("objective.weighting=min_snr", 1e-5, 5e-3),
    ],
)
def test_what_may_change_holds_from_the_next_step_on(
    word: str,
    least: float,
    most: float,
    tmp_path: Path,
    two_steps: Path,
    third_step: Weights,
    run: Any,
    look: Any,
) -> None:
    key, folder = word.partition("=")[0], tmp_path / "run"
    shutil.copytree(two_steps, folder)
    own = [each for each in PLAIN if not each.startswith(f"{key}=")]
    assert run(folder, *own, word) == 0
    before, after, _ = last_step(folder, look)
    assert least <= moved(before, after) <= most
    assert moved(third_step, after) > 0
    *_, event = look.events(folder, "started")
    assert set(event["changed"]) == {key, "run.steps"}


def test_weight_decay_is_applied(
    tmp_path: Path, two_steps: Path, third_step: Weights, run: Any, look: Any
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(two_steps, folder)
    assert run(folder, *PLAIN[:-1], "optim.weight_decay=500") == 0
    before, after, _ = last_step(folder, look)
    for name, value in before.items():  # w (1 - lr decay), then the step
        wanted = third_step[name] - 0.5 * value
        torch.testing.assert_close(after[name], wanted, rtol=0, atol=1e-5)


def test_a_new_decay_of_the_average_is_applied(
    tmp_path: Path, two_steps: Path, run: Any, look: Any
) -> None:
    """The average takes 1 - min(decay, 4 / 13) of the third step's weights."""
    folder = tmp_path / "run"
    shutil.copytree(two_steps, folder)
    assert run(folder, *PLAIN, "optim.ema=0.1") == 0
    *_, one, other = look.checkpoints(folder)
    (_, before), (weights, after) = look.read_checkpoint(one), look.read_checkpoint(other)
    for name, value in after["parts"]["ema"]["averaged"].items():
        old = before["parts"]["ema"]["averaged"][name]
        torch.testing.assert_close(value, 0.1 * old + 0.9 * weights[name])


def test_batches_of_another_size_are_refused(tmp_path: Path, run: Any, stopped: Any) -> None:
    own = ("run.accumulate=4", *PLAIN)
    folder = stopped(tmp_path / "run", *own)
    for word in ("run.accumulate=1", "run.accumulate=2", "run.batch_size=1"):
        says = rf"begun with {word.partition('=')[0]}=. \(now .\); give what it was begun"
        with pytest.raises(ValueError, match=says):
            run(folder, *own, word)
    assert run(folder, *own) == 0


def test_a_loop_without_batches_ends(
    tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However it comes about: Lightning would begin epoch after epoch of nothing."""

    def short(items: Any, total: int, **more: Any) -> Any:
        return loader(items, total - 2, **more)

    monkeypatch.setattr(fit_file, "loader", short)
    with pytest.raises(ValueError, match="the batches ended after step 3 of 5"):
        run(tmp_path / "run")


def test_fewer_steps_than_are_done(tmp_path: Path, run: Any, stopped: Any) -> None:
    folder = stopped(tmp_path / "run")
    with pytest.raises(ValueError, match=r"run\.steps=1 is below step 2, which the run"):
        run(folder, "run.steps=1")
    assert not (folder / "adapter.safetensors").exists()
    assert run(folder, "run.steps=2") == 0  # only the adapter is made
    with pytest.raises(ValueError, match=r"finished run of 2 steps, more than run\.steps=1"):
        run(folder, "run.steps=1")


def test_more_steps_of_a_finished_run_need_its_checkpoint(
    tmp_path: Path, run: Any, look: Any
) -> None:
    folder = tmp_path / "run"
    assert run(folder, "run.steps=2", "run.checkpoint_every=0") == 0
    made = (folder / "adapter.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"no checkpoint to go on from to run\.steps=3"):
        run(folder, "run.steps=3")
    assert (folder / "adapter.safetensors").read_bytes() == made
    assert run(tmp_path / "further", "run.steps=1", f"run.start_from={folder}") == 0


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "dog"
    folder.mkdir()
    for number in range(3):
        Image.effect_noise((32, 32), 40 + number).convert("RGB").save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a <v1> number {number}")
    return folder


def added(folder: Path) -> None:
    shutil.copy(folder / "1.png", folder / "3.png")
    (folder / "3.txt").write_text("a <v1>")


def removed(folder: Path) -> None:
    (folder / "1.png").unlink()


def rewritten(folder: Path) -> None:
    with Image.open(folder / "1.png") as image:
        image.rotate(90).save(folder / "1.png")


def captioned(folder: Path) -> None:
    (folder / "1.txt").write_text("a big <v1>")


def renamed(folder: Path) -> None:
    (folder / "1.png").rename(folder / "9.png")
    (folder / "1.txt").rename(folder / "9.txt")


CHANGES = {
    added: "3.png is new",
    removed: "1.png is gone",
    rewritten: "1.png was rewritten",
    captioned: "the caption of 1.png has changed",
    renamed: "9.png is new, 1.png is gone",
}


@pytest.mark.parametrize("source", ["concept", "folder"])
def test_changed_data_are_refused_by_name(
    source: str, tmp_path: Path, photos: Path, run: Any, stopped: Any
) -> None:
    own = [f"data.concept={photos}"]
    if source == "folder":
        recipe = tmp_path / "own.yaml"
        recipe.write_text(
            f"data: {{source: folder, folder: '{photos}', flip: true}}\n"
            "methods: {selective: {sites: cross, projections: [k, v]}}\n"
        )
        own = [f"recipe={recipe}"]
    folder, kept = stopped(tmp_path / "run", *own), tmp_path / "kept"
    photos.rename(kept)
    for change, says in CHANGES.items():
        shutil.copytree(kept, photos)
        change(photos)
        with pytest.raises(ValueError, match=f"its data have changed since: .*{says}.*; put back"):
            run(folder, *own)
        shutil.rmtree(photos)
    kept.rename(photos)
    assert run(folder, *own) == 0


def test_data_that_were_moved_are_the_same(
    tmp_path: Path, photos: Path, run: Any, stopped: Any
) -> None:
    folder = stopped(tmp_path / "run", f"data.concept={photos}")
    photos.rename(tmp_path / "moved")
    assert run(folder, f"data.concept={tmp_path / 'moved'}") == 0


def test_a_backbone_that_was_replaced_is_refused_by_its_part(
    tmp_path: Path, tiny_folder: Path, run: Any, stopped: Any
) -> None:
    """By another of the same shapes, as a finer one of the same family."""
    mine = tmp_path / "mine"
    shutil.copytree(tiny_folder, mine)
    folder, kept = stopped(tmp_path / "run", f"backbone={mine}"), tmp_path / "kept"
    shutil.copytree(mine, kept)
    weights = mine / "vae" / "diffusion_pytorch_model.safetensors"
    config = mine / "scheduler" / "scheduler_config.json"
    for file, part in ((weights, "vae"), (config, "scheduler")):
        if part == "vae":
            tensors = load_file(file)
            save_file({name: value + 1e-3 for name, value in tensors.items()}, file)
        else:
            facts = json.loads(file.read_text())
            file.write_text(json.dumps({**facts, "beta_end": 0.02}))
        with pytest.raises(ValueError, match=f"its backbone has changed since: {part}; put back"):
            run(folder, f"backbone={mine}")
        shutil.copytree(kept, mine, dirs_exist_ok=True)
    (mine / "unet" / "README.md").write_text("hello")
    assert run(folder, f"backbone={mine}") == 0


def test_another_start_is_refused(tmp_path: Path, run: Any, stopped: Any, look: Any) -> None:
    for name in ("one", "other"):
        assert run(tmp_path / name, "run.steps=1", f"run.seed={len(name)}") == 0
    folder = stopped(tmp_path / "run", f"run.start_from={tmp_path / 'one'}")
    with pytest.raises(ValueError, match=r"begun with another adapter, so run\.start_from="):
        run(folder, f"run.start_from={tmp_path / 'other'}")
    (tmp_path / "one").rename(tmp_path / "moved")
    shutil.copytree(folder, tmp_path / "again")
    assert run(folder, f"run.start_from={tmp_path / 'moved'}") == 0
    assert run(tmp_path / "again") == 0  # what it brought is in the checkpoint
    begun = {each.manifest["start_from"] for each in look.checkpoints(tmp_path / "again")}
    assert len(begun) == 1 and None not in begun  # and stays known
    plain = stopped(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"begun with no run\.start_from"):
        run(plain, f"run.start_from={tmp_path / 'moved'}")


def test_checkpoints_of_an_earlier_version_are_read(
    tmp_path: Path,
    run: Any,
    whole: Any,
    stopped: Any,
    capfd: pytest.CaptureFixture[str],
    look: Any,
) -> None:
    """They do not say what the data were, nor in which order the moments are."""
    folder = stopped(tmp_path / "run")
    for found in look.checkpoints(folder):
        weights, state = look.read_checkpoint(found)
        new = (
            "data",
            "backbone",
            "parts",
            "precision",
            "start_from",
            "sha256",
            "files",
            "versions",
        )
        facts = {key: value for key, value in found.manifest.items() if key not in new}
        del state["order"], facts["format"]
        look.write_checkpoint(folder / "checkpoints", weights, state, facts)
    capfd.readouterr()
    with pytest.raises((ValueError, LeaveError), match=r"keep optim\.lrs as it was"):
        run(folder, "optim.lrs={selective: 1e-5}")
    assert run(folder) == 0
    assert "kept no record of the data; whether they have changed is not" in capfd.readouterr().err
    pairs = zip(look.checkpoints(whole()), look.checkpoints(folder), strict=True)
    assert not any(look.differing(one, other) for one, other in pairs)
    events = (folder / "events.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in events][-1] == "finished"
