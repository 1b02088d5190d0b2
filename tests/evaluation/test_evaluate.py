"""Evaluation: the prompts and scores of several concepts, on pictures whose content is known; and
on real models, against pictures that the sampler generates."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

from trainer.__main__ import main
from trainer.config.lineage import backbone_spec
from trainer.config.load import load_recipe
from trainer.config.schema import RecipeError
from trainer.data.source import Dataset, Needs
from trainer.data.world.scenes import draw_scene
from trainer.data.world.sprites import ALL
from trainer.diffusion.sampler import sample
from trainer.diffusion.sampling_settings import Sampling
from trainer.evaluation.evaluate import validation_loss
from trainer.evaluation.examiner import Examiner
from trainer.evaluation.judge import Judge
from trainer.media.images import to_tensor
from trainer.methods.apply import apply_methods
from trainer.runs.adapter import load_adapted, load_base
from trainer.training.build import needs
from trainer.training.fit import fit

CLIP = Path(__file__).parents[2] / "data" / "tiny" / "clip"
TWO = [
    "recipe=custom_diffusion",
    "data.concept=[sprite:penguin, sprite:strawberry]",
    "data.token=[<v1>, <v2>]",
    "methods.new_token.tokens=[<v1>, <v2>]",
    "methods.new_token.init=animal",
    "data.prior_weight=0",
    "evaluate.known=[]",
]


class Drawn(Examiner):
    """Draws scenes of what each prompt names instead of generating, with `shows[token]` for a
    token, and keeps the prompts."""

    shows: Mapping[str, str]
    seen: list[str]

    def _sample(
        self, model: Any, prompts: Sequence[str], *, frames: int = 1, fps: float | None = None
    ) -> Tensor:
        self.seen += prompts
        pictures = []
        for index, prompt in enumerate(prompts):
            for token, word in self.shows.items():
                prompt = prompt.replace(token, word)
            words = tuple(dict.fromkeys(word for word in prompt.split() if word in ALL))
            scene = draw_scene(
                9,
                index,
                words,
                count=len(words),
                relation="left of" if len(words) > 1 else None,
            )
            pictures.append(to_tensor(Image.fromarray(scene.image)))
        return torch.stack(pictures)


def no_class_images(prompts: Sequence[str], seed: int, guidance: float | None) -> Any:
    raise AssertionError("no class images are asked for")


def examined(words: Sequence[str], folder: Path, **shows: str) -> tuple[dict[str, Any], list[str]]:
    chosen = load_recipe(words)
    train, _ = chosen.data.open(Needs(64, 4, no_class_images, folder, lambda: "tiny"))
    examiner = Drawn(chosen, Judge(CLIP), train, num_images=8, batch_size=8)
    examiner.shows = {f"<{name}>": word for name, word in shows.items()}
    examiner.seen = []
    model: Any = None
    return examiner.examine(model), examiner.seen


def test_both_concepts_right(tmp_path: Path) -> None:
    scores, seen = examined(TWO, tmp_path, v1="penguin", v2="strawberry")
    for line in ("concept accuracy", "concept accuracy of <v1>", "concept accuracy of <v2>"):
        assert scores[line] == 1
    for line in ("concept beside another", "the other beside it", "two concepts together"):
        assert scores[line] >= 0.75  # what the judge reads of real pairs
    assert {"a <v1> on a blue background", "a <v2> on a blue background"} <= set(seen)
    assert {"an apple above a <v1> on a white background"} <= set(seen)
    assert {"an apple above a <v2> on a white background"} <= set(seen)
    assert "a <v1> left of a <v2> on a gray background" in seen


def test_one_concept_lost(tmp_path: Path) -> None:
    """The second token shows the first one's sprite."""
    scores, _ = examined(TWO, tmp_path, v1="penguin", v2="penguin")
    assert scores["concept accuracy of <v1>"] == 1
    assert scores["concept accuracy of <v2>"] == 0
    assert scores["concept accuracy"] == 0.5
    assert scores["second judge: concept"] == pytest.approx(0.5, abs=0.15)
    assert scores["second judge: concept beside another"] < 0.6
    assert scores["concept beside another"] < 0.6 <= scores["the other beside it"]
    assert scores["two concepts together"] == 0
    words = [*TWO, "evaluate.beside=[]", "evaluate.together=[]"]
    right, _ = examined(words, tmp_path, v1="penguin", v2="strawberry")
    for line in ("CLIP-I", "CLIP-T", "fidelity", "second judge: concept"):
        assert right[line] > scores[line] + 0.01
    assert right["fidelity"] > 0.9


def test_one_concept_alone_is_asked_for_no_pairs(tmp_path: Path) -> None:
    words = ["recipe=custom_diffusion", "data.prior_weight=0", "evaluate.known=[]"]
    scores, seen = examined(words, tmp_path, v1="penguin")
    assert scores["concept accuracy"] == 1
    assert not {"two concepts together", "concept accuracy of <v1>"} & set(scores)
    assert not any("<v2>" in prompt or "{}" in prompt for prompt in seen)


def test_photographs_are_distinguished_and_class_words_change_too(
    tmp_path: Path,
) -> None:
    """Photographs are not named as sprites; they must be nearer to their own concept's photos."""
    for word in ("car", "rose"):
        (tmp_path / word).mkdir()
        for index in range(4):
            picture = Image.fromarray(draw_scene(3, index, (word,), count=1).image)
            picture.save(tmp_path / word / f"{index}.png")
    words = [word for word in TWO if not word.startswith("data.concept")] + [
        f"data.concept=[{tmp_path / 'car'}, {tmp_path / 'rose'}]",
        "data.class_word=[car, rose]",
        "evaluate.alone=[a photo of a <v1> car]",
        "evaluate.beside=[]",
    ]
    scores, seen = examined(words, tmp_path, v1="car", v2="rose")
    assert set(seen) == {
        "a photo of a <v1> car", "a photo of a <v2> rose",
        "a car", "a photo of a car", "a rose", "a photo of a rose",
    }  # fmt: skip
    assert scores["concept accuracy"] == 1
    assert "two concepts together" not in scores
    judge, shown = Judge(CLIP), Drawn.__new__(Drawn)
    shown.shows, shown.seen = {"<v1> ": "", "<v2> ": ""}, []
    found: dict[str, list[float]] = {"CLIP-T": [], "PRES (CLIP)": []}
    for word in ("car", "rose"):
        text = [f"a photo of a {word}"]
        pictures = judge.images(shown._sample(None, text * 8))
        found["CLIP-T"].append(float((pictures @ judge.texts(text).T).mean()))
        paths = sorted((tmp_path / word).iterdir())
        photos = torch.stack([to_tensor(Image.open(path)) for path in paths])
        plain = judge.images(shown._sample(None, [f"a {word}", text[0]] * 4))
        found["PRES (CLIP)"].append(float((plain @ judge.images(photos).T).mean()))
    for line, own in found.items():
        assert scores[line] == pytest.approx(sum(own) / 2, abs=1e-5), line


def test_a_prompt_for_two_must_name_two() -> None:
    with pytest.raises(RecipeError, match=r"evaluate\.together.*must hold \{\} twice"):
        load_recipe([*TWO, "evaluate.together=['a {} on a blue background']"])


def test_a_joint_run_by_the_verbs(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*TWO, f"backbone={tiny_folder}", f"run.out={tmp_path}", "run.id=two", "run.steps=1"]
    words += ["run.batch_size=2", "run.validate_every=0", "preview.every=0", "evaluate.steps=2"]
    words += ["evaluate.guidance=4"]
    words += [
        "data.augment=false",
        "data.class_word=null",
        "tracker=none",
        "evaluate.alone=[a <v1>]",
    ]
    words += ["evaluate.together=['a {} left of a {}']", "optim.lr=0.05"]
    assert main(["fit", *words]) == 0
    run = tmp_path / "custom_diffusion" / "two"
    assert main(["evaluate", f"run={run}", f"judge={CLIP}", "images=2"]) == 0
    said = capsys.readouterr().out
    assert "concept accuracy of <v2>" in said and " % (0.0 to 65.8)" in said
    table = json.loads((run / "evaluation.json").read_text())
    judge = Judge(CLIP)
    models = {
        "base": load_base(backbone_spec(str(tiny_folder)), str(tiny_folder)),
        "adapted": load_adapted(run / "adapter.safetensors")[0],
    }
    recipe = load_recipe(words)
    train, _ = recipe.data.open(Needs(32, 4, no_class_images, tmp_path, lambda: "tiny"))
    for name, model in models.items():
        assert 0 <= table[name]["two concepts together"] <= 1
        assert table["pictures"]["two concepts together"] == 2
        found = [
            similarity(
                judge, train, concept, sampled(model, [f"a <v{concept + 1}>"] * 2, guidance=4.0)
            )
            for concept in range(2)
        ]
        assert table[name]["CLIP-I"] == pytest.approx(sum(found) / 2, abs=1e-3), name
    gap = table["base"]["CLIP-I"] - table["adapted"]["CLIP-I"]
    assert abs(gap) > 1e-2


def sampled(model: Any, prompts: list[str], **options: Any) -> Tensor:
    """Pictures in eight bits a colour, with the seeds of an evaluation."""
    seeds = [10_000 + number for number in range(len(prompts))]
    pictures = sample(model, prompts, seeds, settings=Sampling(steps=2, **options))
    return ((pictures + 1) * 127.5).round() / 127.5 - 1


def similarity(judge: Judge, data: Dataset, concept: int, pictures: Tensor) -> float:
    """The mean cosine of the embeddings of pictures and of a concept's photos."""
    photos = torch.stack([data.image(row) for row in data.groups[concept]])
    return float((judge.images(pictures) @ judge.images(photos).T).mean())


def test_pictures_are_those_of_the_recipes_sampler(
    tiny: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    """Prompts in turn, a seed for each picture, and the steps, guidance and negative of
    `evaluate`, whatever the previews have."""
    words = ["recipe=custom_diffusion", f"backbone={tiny_folder}", "data.prior_weight=0"]
    words += ["data.class_word=null", "evaluate.steps=2", "evaluate.guidance=3"]
    words += ["preview.steps=9", "preview.guidance=7", "preview.negative=a cat"]
    words += ["evaluate.negative=a fox", "evaluate.beside=[]", "evaluate.known=[]"]
    words += ["evaluate.alone=[a <v1> on a blue background, a <v1>]"]
    recipe, judge = load_recipe(words), Judge(CLIP)
    train, _ = recipe.data.open(Needs(32, 4, no_class_images, tmp_path, lambda: "tiny"))
    apply_methods(tiny, recipe.methods)
    examiner = Examiner(recipe, judge, train, num_images=3, batch_size=2)
    scores = examiner.examine(tiny)
    prompts = ["a <v1> on a blue background", "a <v1>", "a <v1> on a blue background"]
    pictures = sampled(tiny, prompts, guidance=3.0, negative="a fox")
    wanted = similarity(judge, train, 0, pictures)
    assert scores["CLIP-I"] == pytest.approx(wanted, abs=1e-3)
    clips = examiner.clips(tiny, prompts, frames=1, fps=None)
    torch.testing.assert_close(clips[:, 0], pictures, rtol=0, atol=0.01)


def test_the_base_models_pictures_are_cached_by_model(
    tiny: Any, open_folder: Any, other_folder: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("TRAINER_CACHE", str(tmp_path))
    words = ["recipe=custom_diffusion", "data.prior_weight=0", "evaluate.steps=2"]
    words += ["evaluate.alone=[a fox]", "evaluate.beside=[]", "evaluate.known=[]"]
    recipe, judge = load_recipe(words), Judge(CLIP)
    train, _ = recipe.data.open(Needs(32, 4, no_class_images, tmp_path, lambda: "tiny"))
    found = []
    for model in (tiny, tiny, open_folder(other_folder)):
        examiner = Examiner(recipe, judge, train, num_images=2, batch_size=2, base=model)
        found.append(examiner.examine(model)["CLIP-I"])
    assert found[0] == found[1] != found[2]
    assert len(list((tmp_path / "generated").iterdir())) == 2


def test_the_validation_loss_is_the_runs_last_one(tiny_folder: Path, tmp_path: Path) -> None:
    tree = {
        "backbone": str(tiny_folder),
        "data": {"source": "world", "count": 8, "validation": 4},
        "methods": {"lora": {"sites": "cross", "rank": 2}},
        "optim": {"lr": 1e-2},
        "run": {"steps": 2, "batch_size": 2, "validate_every": 2, "seed": 5, "log_every": 1,
                "out": str(tmp_path), "id": "x"},
        "preview": {"every": 0},
        "tracker": "none",
    }  # fmt: skip
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(tree))
    recipe = load_recipe([f"recipe={tmp_path / 'short.yaml'}"])
    folder = fit(recipe)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (logged,) = [line["val/loss"] for line in lines if "val/loss" in line]
    adapted, _ = load_adapted(folder / "adapter.safetensors")
    base = load_base(recipe.backbone, recipe.backbone_name)
    _, held_out = recipe.data.open(needs(recipe, base))
    assert validation_loss(recipe, adapted, held_out) == pytest.approx(logged, rel=1e-5)
    assert validation_loss(recipe, base, held_out) != pytest.approx(logged, rel=1e-4)


def test_captioned_pictures_get_no_line_about_a_concept(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A style is judged by its held-out captions and by its pictures."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for index in range(12):
        scene = draw_scene(5, index)
        Image.fromarray(scene.image).save(pictures / f"{index:02d}.png")
        (pictures / f"{index:02d}.txt").write_text(scene.caption)
    words = ["recipe=lora_folder", f"backbone={tiny_folder}", f"data.folder={pictures}"]
    words += ["data.buckets=0", "data.validation=2", "run.steps=1", "run.batch_size=1"]
    words += ["run.validate_every=0", "optim.warmup=0", "evaluate.steps=1", "tracker=none"]
    words += [f"run.out={tmp_path}", "run.id=style"]
    assert main(["fit", *words]) == 0
    run = tmp_path / "lora_folder" / "style"
    assert main(["evaluate", f"run={run}", f"judge={CLIP}", "images=10"]) == 0
    assert "concept" not in capsys.readouterr().out
    table = json.loads((run / "evaluation.json").read_text())
    lines = ["CLIP-I", "CLIP-T", "DIV (CLIP)", "KID (CLIP)", "validation loss"]
    assert list(table["base"]) == list(table["adapted"]) == lines
    assert all(value is not None for scores in table.values() for value in scores.values())
