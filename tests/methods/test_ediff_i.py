"""eDiff-I's paint-with-words: scores of painted words, while sampling alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from trainer.attention.context import StepContext
from trainer.attention.rows import Rows
from trainer.config.load import methods_of
from trainer.config.schema import RecipeError
from trainer.diffusion.sampler import sample
from trainer.diffusion.sampling_settings import Sampling
from trainer.methods.apply import apply_methods
from trainer.ops.ediff_i import MOST_NOISE, Painted, box_region

PROMPT = "a fox and a tree on a white background"
LEFT = {"fox": [0, 0, 0.5, 1]}


@pytest.fixture(params=["unet", "dit"])
def model(request: pytest.FixtureRequest, tiny: Any, dit: Any) -> Any:
    return tiny if request.param == "unet" else dit


def painted(model: Any, prompts: list[str] | None = None, **options: Any) -> Tensor:
    if options:
        apply_methods(model, methods_of({"ediff_i": options}), trains=False)
    texts = prompts or [PROMPT]
    seeds = list(range(3, 3 + len(texts)))
    found = sample(model, texts, seeds, settings=Sampling(steps=2, guidance=3.0))
    model.sampling_hooks.clear()
    return found


class Call:
    """What an op reads of a call: the grid of 2 x 3 tokens, the step and the rows."""

    def __init__(self, step: int) -> None:
        rows = Rows.of(("target/uncond", "target/cond"), count=2)
        self.ctx = StepContext(step, 2, torch.zeros(()), groups=rows)

    def grid(self, tokens: int, who: str) -> tuple[int, int]:
        assert tokens == 6
        return 2, 3


def test_scores_are_those_of_the_equation() -> None:
    """By a loop over every token, in scores that are scaled already."""
    region = torch.tensor([[1.0, 0.5, 0.0], [0.0, 0.0, 1.0]])
    op = Painted({"fox": region, "big tree": 1 - region}, {"big tree": 2.0}, weight=0.4)
    op.places = [{"fox": [1], "big tree": [3, 4]}, {"fox": [2], "big tree": []}]
    op.levels = [7.0, 0.5]
    scores = torch.randn(4, 3, 6, 5, generator=torch.Generator().manual_seed(0))
    for step, sigma in enumerate(op.levels):
        found = op.scores(scores, Call(step))  # type: ignore[arg-type]
        assert torch.equal(found[:2], scores[:2])
        for row, places in enumerate(op.places):
            own = scores[2 + row]
            wanted = own.clone()
            for n in range(6):
                inside = float(region.flatten()[n])
                for word, share in (("fox", inside), ("big tree", 2 * (1 - inside))):
                    for m in places[word]:
                        wanted[:, n, m] += 0.4 * math.log(1 + sigma) * float(own.max()) * share
            assert torch.allclose(found[2 + row], wanted, atol=1e-6)


def test_a_box_counts_pixels_by_their_share() -> None:
    found = box_region((0.25, 0, 0.625, 0.5), side=4)
    assert found.tolist() == [[0, 1, 0.5, 0], [0, 1, 0.5, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_at_weight_0_the_picture_is_that_of_the_prompt(model: Any) -> None:
    plain = painted(model)
    # probabilities are computed one by one, where the plain model has a fused kernel
    torch.testing.assert_close(painted(model, boxes=LEFT, weight=0), plain, rtol=0, atol=1e-4)
    assert float((painted(model, boxes=LEFT, weight=2) - plain).abs().max()) > 1e-3
    assert not any(hosted.ops for hosted in model.host.processors.values())


def test_noise_is_in_units_of_the_image(tiny: Any) -> None:
    """At the first step of the tiny U-Net sigma is many times alpha; it ends below."""
    apply_methods(tiny, methods_of({"ediff_i": {"boxes": LEFT}}), trains=False)
    (hook,) = tiny.hooks
    sample(tiny, [PROMPT], [3], settings=Sampling(steps=3, guidance=3.0))
    levels = hook.open.__self__.op.levels
    assert len(levels) == 3 and MOST_NOISE >= levels[0] > levels[1] > levels[2] > 0
    assert levels[0] > 3 and levels[2] < 1.5


def test_a_picture_does_not_depend_on_those_beside_it(model: Any) -> None:
    two = painted(model, [PROMPT, "a fox"], boxes=LEFT, weight=2)
    torch.testing.assert_close(painted(model, boxes=LEFT, weight=2)[0], two[0], rtol=0, atol=1e-4)


def test_masks_paint_as_boxes_do(tiny: Any, tmp_path: Path) -> None:
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    mask.save(tmp_path / "left.png")
    by_mask = painted(tiny, masks={"fox": str(tmp_path / "left.png")}, weight=2)
    assert torch.equal(by_mask, painted(tiny, boxes=LEFT, weight=2))


def test_a_phrase_is_found_with_its_punctuation(tiny: Any) -> None:
    plain = painted(tiny, ["a fox, and a tree"], boxes={"fox , and": LEFT["fox"]}, weight=2)
    other = painted(tiny, ["a fox, and a tree"], boxes={"fox, and": LEFT["fox"]}, weight=2)
    assert torch.equal(plain, other)


def test_a_mask_of_another_shape_than_the_picture_is_refused(tiny: Any, tmp_path: Path) -> None:
    Image.new("L", (64, 32), 255).save(tmp_path / "wide.png")
    with pytest.raises(ValueError, match=r"mask of 'fox' has 64x32 .* give a mask of its shape"):
        painted(tiny, masks={"fox": str(tmp_path / "wide.png")})
    wide = Sampling(steps=1, guidance=3.0, size=(64, 128))
    assert sample(tiny, [PROMPT], [3], settings=wide).shape[-1] == 128


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"weight": 1}, "nothing is painted; give boxes or masks"),
        ({"boxes": {"cow": [0, 0, 1, 1]}}, "'cow' is in no prompt; .* are a, fox, and, tree"),
        ({"boxes": LEFT, "strengths": {"tree": 2}}, "strengths: 'tree' is not painted"),
        ({"boxes": LEFT, "sites": "self"}, "is self attention, in which words are not"),
        ({"masks": {"fox": "none.png"}}, "none.png"),
    ],
)
def test_bad_options_are_refused(tiny: Any, options: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        painted(tiny, **options)


def test_a_box_outside_the_picture_and_a_black_mask_are_refused(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"boxes.*left, top, right and bottom"):
        methods_of({"ediff_i": {"boxes": {"fox": [0.5, 0, 0.2, 1]}}})
    Image.new("L", (32, 32)).save(tmp_path / "black.png")
    with pytest.raises(ValueError, match=r"black.png is all black"):
        painted(tiny, masks={"fox": str(tmp_path / "black.png")})
    both = {"boxes": LEFT, "masks": {"fox": str(tmp_path / "black.png")}}
    with pytest.raises(ValueError, match=r"'fox' has a box and a mask"):
        painted(tiny, **both)
