"""Whole runs on a tiny backbone: what a user gets, twice the same, split over ranks the same,
resumed the same."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

import pytest
import torch
from commands import command
from PIL import Image
from ranks import on_two_ranks
from safetensors.torch import load_file

from trainer.__main__ import main
from trainer.common.exit_codes import BAD_RECIPE
from trainer.config.load import load_recipe
from trainer.evaluation import questions, sprite_scores
from trainer.training.fit import fit as fit_here

FRENCH = "preview.negative=flou et gâché"
CLIP = Path(__file__).parents[2] / "data" / "tiny" / "clip"
RUN = [
    "run.steps=4",
    "run.batch_size=4",
    "run.validate_every=4",
    "run.checkpoint_every=2",
    "preview.every=2",
    "preview.steps=2",
    "data.prior_steps=2",
    "preview.prompts=[a <v1> on a blue background, a <v1> left of a fox]",
    "data.prior_images=4",
    "data.prior_prompts=[a fox, a cat left of a tree]",
    "data.class_word=null",
    "data.augment=false",
    "methods.new_token.init=animal",
    "optim.ema=0.9",
    "evaluate.steps=1",
    "evaluate.guidance=1",
    "evaluate.alone=[a <v1> on a blue background]",
    "evaluate.beside=[a <v1> left of a fox]",
    "evaluate.known=['{} on a white background']",
]

# nobody looks at how it does
BLIND = ["run.validate_every=0", "preview.every=0"]


def fit(
    folder: Path, backbone: Path, *words: str, code: int = 0
) -> subprocess.CompletedProcess[str]:
    """Runs the real command in `folder`."""
    given = {word.split("=")[0] for word in words}
    own = [word for word in RUN if word.split("=")[0] not in given]
    if "preview.every=0" in words:
        own = [word for word in own if not word.startswith("preview.")]
    line = ["fit", "recipe=custom_diffusion", f"backbone={backbone}", *own, *words]
    if "run.devices" in given:
        result = on_two_ranks(*line, printed=folder / "printed", cwd=folder)
    else:
        result = command(*line, cwd=folder)
    assert result.returncode == code, result.stderr[-3000:]
    return result


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter.safetensors")


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "adapter.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """One finished run, shared by the tests that only look at it."""
    folder = tmp_path_factory.mktemp("runs")
    fit(folder, tiny_folder, "run.id=first", FRENCH)
    return folder / "runs" / "custom_diffusion" / "first"


def test_run_folder_holds_all_a_user_needs(first: Path) -> None:
    assert "negative: flou et gâché\n" in (first / "recipe.yaml").read_text(encoding="utf-8")
    plan = json.loads((first / "plan.json").read_text())
    tensors = weights(first)
    assert sorted(tensors) == plan["trains"]
    assert sum(value.numel() for value in tensors.values()) == plan["trained"]
    size = (first / "adapter.safetensors").stat().st_size
    assert size <= 1.2 * plan["adapter_bytes"] + 8192  # the header carries the recipe
    assert list((first / "tensorboard").glob("events*"))


def test_preview_grid_has_a_row_a_look_and_maps(first: Path) -> None:
    grid = Image.open(first / "previews" / "grid.png")
    rows = 1 + 2 * 2  # base, then two looks with their maps
    assert grid.height > rows * 96
    assert len(set(grid.convert("L").tobytes())) > 20


def test_tensorboard_has_losses_and_previews(first: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next((first / "tensorboard").glob("events*"))))
    events.Reload()
    assert {"val/loss", "val/loss_t062", "val/loss_t938"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("train/loss")] == [1, 4]  # first and last
    assert "preview" in events.Tags()["images"]


def test_same_seed_twice_is_bit_identical(first: Path, tmp_path: Path, tiny_folder: Path) -> None:
    fit(tmp_path, tiny_folder, "run.id=again", FRENCH)
    assert digest(first) == digest(tmp_path / "runs" / "custom_diffusion" / "again")


def test_another_seed_is_another_adapter(first: Path, tmp_path: Path, tiny_folder: Path) -> None:
    said = fit(tmp_path, tiny_folder, "run.id=other", "run.seed=1", *BLIND)
    assert said.stdout == "runs/custom_diffusion/other\n"  # lines about a run are on stderr
    assert "adapter: " in said.stderr
    other = weights(tmp_path / "runs" / "custom_diffusion" / "other")
    assert not any(torch.equal(value, other[name]) for name, value in weights(first).items())


@pytest.mark.ddp
def test_two_ranks_train_the_same_model(first: Path, tmp_path: Path, tiny_folder: Path) -> None:
    fit(tmp_path, tiny_folder, "run.id=two", "run.devices=2")
    two = tmp_path / "runs" / "custom_diffusion" / "two"
    assert _losses(two) == pytest.approx(_losses(first), abs=1e-5)
    one, other = weights(first), weights(two)
    assert set(one) == set(other)
    assert all(torch.allclose(one[name], other[name], atol=1e-5) for name in one)


@pytest.mark.ddp
def test_two_ranks_share_a_denoiser_in_fp8(tmp_path: Path, tiny_folder: Path) -> None:
    """gloo, which connects ranks on CPUs, cannot send its weights, and has no need to."""
    words = ["run.steps=2", "run.base_precision.denoiser=fp8", "run.precision=fp32"]
    words += ["run.validate_every=2", "preview.every=0"]
    for name, ranks in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        fit(tmp_path / name, tiny_folder, "run.id=a", *words, *["run.devices=2"] * (ranks - 1))
    one, two = (tmp_path / name / "runs" / "custom_diffusion" / "a" for name in ("one", "two"))
    assert _losses(two) == pytest.approx(_losses(one), abs=1e-5)
    assert set(weights(one)) == set(weights(two))


def test_resumed_run_is_the_same_run(first: Path, tmp_path: Path, tiny_folder: Path) -> None:
    """Stopped after two of four steps by a shorter recipe, then continued in its folder."""
    fit(tmp_path, tiny_folder, "run.id=half", "run.steps=2")
    half = tmp_path / "runs" / "custom_diffusion" / "half"
    fit(tmp_path, tiny_folder, f"run={half}")
    one, other = weights(first), weights(half)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_an_earlier_run_left_can_stay(first: Path, tmp_path: Path, tiny_folder: Path) -> None:
    words = ["run.id=y", f"run.start_from={first}", "optim.lrs.new_token=0", *BLIND]
    words += ["run.checkpoint_every=1"]
    fit(tmp_path, tiny_folder, *words)
    nothing = fit(tmp_path, tiny_folder, "run.id=z", "optim.lrs.new_token=0", code=BAD_RECIPE)
    assert "optim.lrs.new_token=0 keeps it as an earlier run left it" in nothing.stderr
    run = tmp_path / "runs" / "custom_diffusion" / "y"
    before, after = (load_file(folder / "adapter.safetensors") for folder in (first, run))
    assert before.keys() == after.keys()
    same = {name for name, value in before.items() if torch.equal(value, after[name])}
    assert same and same == {name for name in before if "token_embedding" in name}
    assert (
        json.loads((run / "plan.json").read_text())["trained"]
        < json.loads((first / "plan.json").read_text())["trained"]
    )


def test_a_finished_run_is_not_written_over(first: Path, tiny_folder: Path) -> None:
    before = digest(first)
    result = fit(first.parents[2], tiny_folder, "run.id=first")
    assert "this run is finished" in result.stderr
    assert result.stdout.strip() == "runs/custom_diffusion/first"
    result = fit(first.parents[2], tiny_folder, f"run={first}", "optim.lr=1", code=78)
    assert "with another optim.lr; choose another run.id" in result.stderr
    assert digest(first) == before


def test_a_folder_is_named_once(tmp_path: Path, tiny_folder: Path) -> None:
    result = fit(tmp_path, tiny_folder, "run=here", "run.id=there", code=78)
    assert "run=here and run.id=there both name a folder" in result.stderr
    result = fit(tmp_path, tiny_folder, "run=", code=78)
    assert "run= is empty; name a folder" in result.stderr


def test_accumulation_sees_as_many_images(tmp_path: Path, tiny_folder: Path) -> None:
    fit(
        tmp_path,
        tiny_folder,
        "run.id=acc",
        "run.accumulate=2",
        "optim.ema=null",
        "run.precision=bf16",
        *BLIND,
    )
    tensors = load_file(tmp_path / "runs" / "custom_diffusion" / "acc" / "adapter.safetensors")
    assert all(torch.isfinite(value).all() for value in tensors.values())


def test_wandb_runs_offline_with_previews(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    fit(tmp_path, tiny_folder, "run.id=w", "run.validate_every=0", "tracker=wandb")
    folder = tmp_path / "runs" / "custom_diffusion" / "w"
    assert list(folder.glob("wandb/offline-run-*/*.wandb"))
    assert list(folder.glob("wandb/offline-run-*/files/media/images/*.png"))


def test_photos_of_a_folder_are_learned_from(tmp_path: Path, tiny_folder: Path) -> None:
    photos = tmp_path / "dog"
    photos.mkdir()
    for number, size in enumerate([(80, 60), (40, 90), (64, 64)]):
        Image.effect_noise(size, 90).convert("RGB").save(photos / f"{number}.jpg")
    words = ("data.concept=dog", "data.class_word=dog", "data.augment=true", "run.id=photos")
    fit(tmp_path, tiny_folder, *words, *BLIND)
    assert (tmp_path / "runs" / "custom_diffusion" / "photos" / "adapter.safetensors").is_file()


def test_evaluate_sets_base_beside_adapted(
    first: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With six of the known sprites, the closeness of two of which is measured: that of one takes a
    while."""
    monkeypatch.setattr(questions, "KNOWN", questions.KNOWN[:6])
    monkeypatch.setattr(sprite_scores, "CLOSE", 2)
    monkeypatch.chdir(first.parents[2])
    assert main(["evaluate", f"run={first}", f"judge={CLIP}", "images=4"]) == 0
    shown = capsys.readouterr().out
    table = json.loads((first / "evaluation.json").read_text())
    assert set(table["base"]) == set(table["adapted"])
    for line in ("concept accuracy", "concept beside another", "known sprites"):
        assert 0 <= table["adapted"][line] <= 1
        assert line in shown
    assert table["base"]["validation loss"] != table["adapted"]["validation loss"]


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("data.concept=nowhere", "nowhere"),
        ("methods.selective.sites=temporal", "matches no attention site"),
        (
            "methods.new_token.tokens=[fox] data.token=fox preview.prompts=[] evaluate.alone=[] "
            "evaluate.beside=[]",
            "exists already",
        ),
        ("methods.new_token.init=xylophone", "tokens; choose a word that is one"),
    ],
    ids=["missing-folder", "no-site", "known-token", "long-init"],
)
def test_mistakes_end_before_training(
    word: str, says: str, tmp_path: Path, tiny_folder: Path
) -> None:
    result = fit(tmp_path, tiny_folder, *word.split(), "run.id=bad", code=78)
    assert says in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "runs" / "custom_diffusion" / "bad" / "adapter.safetensors").exists()


def _losses(run: Path) -> list[float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next((run / "tensorboard").glob("events*"))))
    events.Reload()
    return [event.value for event in events.Scalars("val/loss")]


def test_freed_memory_goes_back_where_a_large_model_trains(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small model, whose steps new pages would slow, is left alone."""
    asked: list[str] = []
    given = {"data.prior_images", "data.prior_steps", "data.prior_prompts", "run.steps"}
    given |= {"run.validate_every", "run.checkpoint_every"}
    own = [word for word in RUN if word.split("=")[0] not in given and "preview." not in word]
    words = ["recipe=custom_diffusion", f"backbone={tiny_folder}", *own, "data.prior_weight=0"]
    words += ["run.steps=1", "run.validate_every=0", "run.checkpoint_every=0", "preview.every=0"]
    for size, name in ((10**9, "small"), (0, "large")):
        monkeypatch.setattr("trainer.training.fit.WORTH", size)
        monkeypatch.setattr(
            "trainer.training.fit.return_freed_memory", lambda own=name: asked.append(own)
        )
        fit_here(load_recipe(words), tmp_path / name)
    assert asked == ["large"]
