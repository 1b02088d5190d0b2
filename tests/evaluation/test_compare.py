"""Several runs, and one run along the way: the figures are those of each adapter alone, and what
cannot be compared is refused by name."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn.functional import normalize

from trainer.__main__ import main
from trainer.common.exit_codes import BAD_RECIPE
from trainer.common.paths import DATA
from trainer.config.header import read_header
from trainer.config.load import load_recipe
from trainer.data.caption_templates import CONCEPT_PROMPTS, fill
from trainer.data.world.scenes import draw_scene
from trainer.diffusion.sampler import sample
from trainer.diffusion.sampling_settings import Sampling
from trainer.evaluation.compare import _named, _run_of, draw_steps
from trainer.evaluation.dino import Dino
from trainer.evaluation.evaluate import evaluation_file
from trainer.evaluation.judge import Judge
from trainer.evaluation.score_table import Table
from trainer.evaluation.which_step import Choice
from trainer.media.images import read_image, resize_cover, to_tensor
from trainer.media.made_by import ENTRY
from trainer.runs.adapter import load_adapted, save_adapter
from trainer.runs.run_folder import kept_adapters
from trainer.training.fit import fit

CLIP, COUNT, PHOTOS = DATA / "tiny" / "clip", 10, 10
Runs = dict[str, Path]
Printed = pytest.CaptureFixture[str]


def drawn(folder: Path, word: str) -> Path:
    """Scenes of a sprite, of which the last is held out."""
    folder.mkdir()
    for index in range(PHOTOS + 1):
        scene = Image.fromarray(draw_scene(3, index, (word,), count=1).image)
        scene.save(folder / f"{index:02d}.png")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return drawn(tmp_path_factory.mktemp("photos") / "cars", "car")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, photos: Path) -> Runs:
    """One of four steps that keeps an adapter after two, and a shorter one with another word."""
    root = tmp_path_factory.mktemp("runs")
    words = [
        "recipe=lora", f"backbone={tiny_folder}", f"data.concept={photos}", "data.class_word=car",
        "data.prior_weight=0", "data.augment=false", "run.batch_size=1", "run.validate_every=0",
        "preview.every=0", "tracker=none", "evaluate.steps=1", "evaluate.guidance=1",
        "optim.lr=0.05", "run.checkpoint_every=0",
    ]  # fmt: skip
    own = {
        "one": ("run.steps=4", "run.keep_adapters=2"),
        "two": ("run.steps=1", "data.token=<w>", "methods.lora.rank=2"),
    }
    return {
        name: fit(load_recipe([*words, *more]), root / "lora" / name) for name, more in own.items()
    }


@pytest.fixture(scope="module")
def judges(dino_folder: Path) -> str:
    return f"judge=[{CLIP},{dino_folder}]"


@pytest.fixture(scope="module")
def stepped(runs: Runs, judges: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `every=true` has written of the first run, with a cache of its own."""
    cache, before = tmp_path_factory.mktemp("cache"), os.environ["TRAINER_CACHE"]
    os.environ["TRAINER_CACHE"] = str(cache)
    try:
        words = [f"run={runs['one']}", "every=true", judges, f"images={COUNT}"]
        assert main(["evaluate", *words]) == 0
    finally:
        os.environ["TRAINER_CACHE"] = before
    assert len(list((cache / "generated").iterdir())) == 2  # the base's of two questions
    facts: dict[str, Any] = json.loads((runs["one"] / "evaluation_by_step.json").read_text())
    return facts


def sampled(model: Any, prompts: list[str]) -> torch.Tensor:
    """In eight bits a colour, with the seeds of an evaluation."""
    seeds = [10_000 + number for number in range(len(prompts))]
    pictures = sample(model, prompts, seeds, settings=Sampling(steps=1, guidance=1))
    return ((pictures + 1) * 127.5).round() / 127.5 - 1


def test_every_adapter_of_a_run_has_its_own_figures(
    runs: Runs, stepped: dict[str, Any], photos: Path, dino_folder: Path
) -> None:
    """By hand: the pictures of the adapter kept after two steps, and what the judges make of
    them."""
    table = stepped["table"]
    assert list(table) == ["base", "step 2", "step 4"]
    model, _ = load_adapted(kept_adapters(runs["one"])[2])
    texts = [fill(CONCEPT_PROMPTS[i % 8], "<v1>", "car") for i in range(COUNT)]
    alone = sampled(model, texts)
    plain = sampled(model, ["a car", "a photo of a car"] * (COUNT // 2))
    real = [resize_cover(read_image(path), 32) for path in sorted(photos.iterdir())[:PHOTOS]]
    shown = torch.stack([to_tensor(each) for each in real])
    found, clip = table["step 2"], Judge(CLIP)
    for judge, line, kind in ((clip, "CLIP-I", "CLIP"), (Dino(dino_folder), "DINO", "DINO")):
        own, other, photographed = (
            normalize(judge.features(each), dim=-1) for each in (alone, plain, shown)
        )
        assert found[line] == pytest.approx(float((own @ photographed.T).mean()), abs=1e-3)
        pres = float((other @ photographed.T).mean())
        assert found[f"PRES ({kind})"] == pytest.approx(pres, abs=1e-3)
        drift = found[f"PRES ({kind})"] - table["base"][f"PRES ({kind})"]
        assert found[f"prior drift ({kind})"] == pytest.approx(drift, abs=1e-9)
        pairs = float((own[:2] * own[8:]).sum(1).mean())  # the two prompts that come again
        assert found[f"DIV ({kind})"] == pytest.approx(1 - pairs, abs=1e-3)
        assert found[f"KID ({kind})"] is not None
    words = clip.texts([each.replace("<v1> ", "") for each in texts])
    aligned = float((clip.images(alone) * words).sum(1).mean())
    assert found["CLIP-T"] == pytest.approx(aligned, abs=1e-3)
    assert "DINO-T" not in found and found["validation loss"] is not None
    assert table["step 2"]["CLIP-I"] != table["step 4"]["CLIP-I"] != table["base"]["CLIP-I"]


def test_it_says_which_step_to_keep_and_draws(runs: Runs, stepped: dict[str, Any]) -> None:
    assert stepped["step"] in (2, 4) and stepped["why"].startswith(f"keep step {stepped['step']}:")
    names = {2: "adapters/step_000002.safetensors", 4: "adapter.safetensors"}
    assert stepped["adapter"] == names[stepped["step"]]
    assert set(stepped["points"]) == {"2", "4"} and stepped["images"] == COUNT
    chart = Image.open(runs["one"] / "evaluation_by_step.png")
    facts = json.loads(chart.info[ENTRY])
    assert facts["run"] == runs["one"].name and facts["rows"] == [2, 4]
    assert str(runs["one"].parent) not in str(facts)
    assert chart.size[0] == 3 * 380 and len(set(chart.convert("L").tobytes())) > 20


def test_several_runs_are_set_beside_each_other(
    runs: Runs, stepped: dict[str, Any], judges: str, capsys: Printed
) -> None:
    both = f"runs=[{runs['one']},{runs['two']}]"
    assert main(["evaluate", both, judges, f"images={COUNT}"]) == 0
    out, err = capsys.readouterr()
    header = next(line for line in out.splitlines() if "base" in line)
    assert header.index("base") < header.index("one") < header.index("two")
    assert " is best in " in out
    assert f"pictures to judge: {3 * 2 * COUNT} of {3 * 2 * COUNT} after" in err
    table = json.loads((runs["one"] / "evaluation.json").read_text())
    for column, same in (("base", "base"), ("adapted", "step 4")):
        assert table[column] == pytest.approx(stepped["table"][same], abs=1e-4), column
    # the base was asked for the first one's word
    assert not (runs["two"] / "evaluation.json").exists()


def test_without_two_known_values_there_is_no_picture() -> None:
    table: Table = {"base": {"CLIP-I": 0.4}, "step 2": {"CLIP-I": 0.5, "validation loss": None}}
    assert draw_steps(table, [2], Choice(None, "no score tells", {})) is None


def test_an_adapter_file_stands_for_its_run(runs: Runs) -> None:
    own = runs["one"]
    assert _run_of(own / "adapter.safetensors") == own
    assert _run_of(kept_adapters(own)[2]) == own
    assert _run_of(own) == own


def test_each_adapter_has_a_file_for_its_scores(runs: Runs) -> None:
    assert evaluation_file(runs["one"] / "adapter.safetensors") == runs["one"] / "evaluation.json"
    kept = kept_adapters(runs["one"])[2]
    assert evaluation_file(kept) == kept.with_name("step_000002_evaluation.json")


def refusal(capsys: Printed, *words: str) -> str:
    capsys.readouterr()
    assert main(["evaluate", *words, f"judge={CLIP}", "images=2"]) == BAD_RECIPE
    return capsys.readouterr().err


def test_what_cannot_be_compared_is_refused_by_name(
    runs: Runs, other_folder: Path, tmp_path: Path, capsys: Printed
) -> None:
    tree, identity = read_header(runs["one"] / "adapter.safetensors")
    tensors = load_file(runs["one"] / "adapter.safetensors")
    boats = drawn(tmp_path / "boats", "sailboat")
    cases: dict[str, tuple[dict[str, Any], str]] = {
        "guided": ({"evaluate": {**tree["evaluate"], "guidance": 3}}, "evaluate.guidance is 3.0"),
        "truly": ({"evaluate": {**tree["evaluate"], "true_guidance": 3}}, "true_guidance is 3.0"),
        "prompted": ({"evaluate": {**tree["evaluate"], "alone": ["a {token}"]}}, "other prompts"),
        "pictured": ({"data": {**tree["data"], "concept": str(boats)}}, "show other pictures"),
        "founded": ({"backbone": str(other_folder)}, "which differ in unet; compare runs on one"),
    }
    for name, (change, says) in cases.items():
        place = tmp_path / "lora" / name / "adapter.safetensors"
        place.parent.mkdir(parents=True)
        save_adapter(place, tensors, {**tree, **change}, identity)
        said = refusal(capsys, f"runs=[{runs['one']},{place.parent}]")
        assert says in said and name in said and "one" in said, said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["run={one}", "runs=[{one},{two}]"], "give run or runs, not both"),
        (["runs=[{one}]"], "runs compares several; give run="),
        (["runs=[{one},{two}]", "every=true"], "every=true is for one run="),
        (["runs=[{one},{one}]"], "twice; name each run once"),
        (["run={two}", "every=true"], "compares those that run.keep_adapters=5 keeps"),
    ],
)
def test_words_that_do_not_go_together(
    words: list[str], says: str, runs: Runs, capsys: Printed
) -> None:
    own = {name: str(path) for name, path in runs.items()}
    assert says in refusal(capsys, *(word.format(**own) for word in words))


def test_names_tell_runs_apart(tmp_path: Path) -> None:
    def named(*paths: str) -> list[str]:
        return list(_named([tmp_path / path for path in paths]))

    assert named("lora/one", "dora/two/adapter.safetensors") == ["one", "two"]
    assert named("lora/one", "dora/one") == ["lora/one", "dora/one"]
    assert named("lora/base", "dora/one") == ["lora/base", "dora/one"]
    assert named("a/lora/one", "b/lora/one") == [f"{tmp_path}/{each}/lora/one" for each in "ab"]


def test_losses_of_other_noise_are_not_compared_and_are_kept(
    tmp_path: Path, tiny_folder: Path, photos: Path, capsys: Printed
) -> None:
    """The noise is drawn from run.seed. The first run's own loss stays in its file."""
    words = [
        "recipe=lora", f"backbone={tiny_folder}", f"data.concept={photos}", "data.class_word=car",
        "data.prior_weight=0", "data.augment=false", "run.batch_size=1", "run.validate_every=0",
        "preview.every=0", "tracker=none", "evaluate.steps=1", "evaluate.guidance=1",
        "run.steps=1", "run.checkpoint_every=0",
    ]  # fmt: skip
    runs = [
        fit(load_recipe([*words, f"run.seed={seed}"]), tmp_path / "lora" / f"seed{seed}")
        for seed in (0, 1)
    ]
    both = f"runs=[{runs[0]},{runs[1]}]"
    assert main(["evaluate", both, f"judge={CLIP}", "images=1"]) == 0
    out = capsys.readouterr().out
    assert "differ in run.seed" in " ".join(out.split())
    assert "│ validation loss" not in out
    found = [json.loads((run / "evaluation.json").read_text()) for run in runs]
    assert all(found[0][column]["validation loss"] > 0 for column in ("base", "adapted"))
    assert all("validation loss" not in found[1][column] for column in ("base", "adapted"))
