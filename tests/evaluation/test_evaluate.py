"""What evaluation asks of several concepts and how it counts, on pictures that are known to be
right; and on a real joint run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from trainer.__main__ import main
from trainer.config.load import load_recipe
from trainer.config.schema import RecipeError
from trainer.data.source import Needs
from trainer.data.world.scenes import draw_scene
from trainer.data.world.sprites import ALL
from trainer.evaluation.examiner import Examiner
from trainer.evaluation.judge import Judge
from trainer.media.images import to_tensor

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
    """In the place of a model: scenes of what each prompt asks for, a token meaning `shows[token]`;
    the prompts are kept."""

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


def examined(words: Sequence[str], folder: Path, **shows: str) -> tuple[dict[str, Any], list[str]]:
    def paint(prompts: Sequence[str], seed: int, guidance: float | None) -> Any:
        raise AssertionError("no class images are asked for")

    chosen = load_recipe(words)
    train, _ = chosen.data.open(Needs(64, 4, paint, folder, lambda: "tiny"))
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
    """The second token paints the first one's sprite."""
    scores, _ = examined(TWO, tmp_path, v1="penguin", v2="penguin")
    assert scores["concept accuracy of <v1>"] == 1
    assert scores["concept accuracy of <v2>"] == 0
    assert scores["concept accuracy"] == 0.5
    assert scores["concept beside another"] < 0.6 <= scores["the other beside it"]
    assert scores["two concepts together"] == 0
    words = [*TWO, "evaluate.beside=[]", "evaluate.together=[]"]
    right, _ = examined(words, tmp_path, v1="penguin", v2="strawberry")
    for line in ("image similarity", "text alignment"):
        assert right[line] > scores[line]


def test_one_concept_alone_is_asked_for_no_pairs(tmp_path: Path) -> None:
    words = ["recipe=custom_diffusion", "data.prior_weight=0", "evaluate.known=[]"]
    scores, seen = examined(words, tmp_path, v1="penguin")
    assert scores["concept accuracy"] == 1
    assert not {"two concepts together", "concept accuracy of <v1>"} & set(scores)
    assert not any("<v2>" in prompt or "{}" in prompt for prompt in seen)


def test_photographs_are_told_apart_and_class_words_change_with_the_token(tmp_path: Path) -> None:
    """Photos of no sprite the judge is asked for: nearer to their own concept than to the other."""
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
    assert set(seen) == {"a photo of a <v1> car", "a photo of a <v2> rose"}
    assert scores["concept accuracy"] == 1
    assert "two concepts together" not in scores


def test_a_prompt_for_two_must_name_two() -> None:
    with pytest.raises(RecipeError, match=r"evaluate\.together.*must hold \{\} twice"):
        load_recipe([*TWO, "evaluate.together=['a {} on a blue background']"])


def test_a_joint_run_by_the_verbs(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*TWO, f"backbone={tiny_folder}", f"run.out={tmp_path}", "run.id=two", "run.steps=1"]
    words += ["run.batch_size=2", "run.validate_every=0", "preview.every=0", "preview.steps=2"]
    words += [
        "data.augment=false",
        "data.class_word=null",
        "tracker=none",
        "evaluate.alone=[a <v1>]",
    ]
    words += ["evaluate.together=['a {} left of a {}']"]
    assert main(["fit", *words]) == 0
    run = tmp_path / "custom_diffusion" / "two"
    assert main(["evaluate", f"run={run}", f"judge={CLIP}", "images=2"]) == 0
    assert "concept accuracy of <v2>" in capsys.readouterr().out
    table = json.loads((run / "evaluation.json").read_text())
    for name in ("base", "adapted"):
        assert 0 <= table[name]["two concepts together"] <= 1
