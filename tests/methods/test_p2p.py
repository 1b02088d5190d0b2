"""Prompt-to-Prompt on whole samplings: the same prompt gives the source, an edit differs from both
the source and the prompt by itself, and each option has its effect."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.config.load import methods_of
from trainer.config.schema import RecipeError
from trainer.diffusion.edit_source import EditSource
from trainer.diffusion.sampler import sample
from trainer.diffusion.sampling_settings import Sampling
from trainer.methods.apply import apply_methods

SOURCE, PROMPT = "a fox on a red background", "a cat on a red background"
HOW = Sampling(steps=4, guidance=3.0)


@pytest.fixture(params=["unet", "dit"])
def model(request: pytest.FixtureRequest, tiny: Any, dit: Any) -> Any:
    """A U-Net that predicts v, and a transformer of cross-attention trained as a flow."""
    return tiny if request.param == "unet" else dit


def latents(model: Any, prompts: list[str], source: str | None = None) -> Tensor:
    """The last latents of pictures from the seed 3."""
    seen: list[Tensor] = []
    edited = None if source is None else EditSource(source)
    keep = lambda _, x_t: seen.append(x_t.clone())  # noqa: E731
    sample(model, prompts, [3] * len(prompts), settings=HOW, edited=edited, on_step=keep)
    return seen[-1]


def edited(model: Any, *prompts: str, **options: Any) -> Tensor:
    """By the method with these options, which it loses again."""
    apply_methods(model, methods_of({"p2p": options}), trains=False)
    found = latents(model, list(prompts), SOURCE)
    model.sampling_hooks.clear()
    return found


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


@pytest.mark.parametrize("options", [{}, {"edit": "refine"}, {"blend": True}], ids=str)
def test_the_sources_own_prompt_gives_the_source(options: dict[str, Any], model: Any) -> None:
    plain = latents(model, [SOURCE])
    torch.testing.assert_close(edited(model, SOURCE, **options), plain, rtol=0, atol=5e-4)


def test_an_edit_is_neither_the_source_nor_its_prompt_alone(model: Any) -> None:
    """Nor does it depend on what is edited beside it."""
    source, plain = latents(model, [SOURCE]), latents(model, [PROMPT])
    own = edited(model, PROMPT)
    assert apart(own, source) > 1e-2 and apart(own, plain) > 1e-3
    both = edited(model, "a tree on a red background", PROMPT)
    torch.testing.assert_close(both[1:], own, rtol=0, atol=5e-4)


def test_without_maps_and_mask_it_is_the_prompt_alone(tiny: Any) -> None:
    plain = latents(tiny, [PROMPT])
    found = edited(tiny, PROMPT, cross_steps=None, self_steps=None)
    torch.testing.assert_close(found, plain, rtol=0, atol=5e-4)


def test_every_option_changes_the_edit(tiny: Any) -> None:
    base = edited(tiny, PROMPT)
    for options in (
        {"cross_steps": (0.0, 0.3)},
        {"self_steps": None},
        {"self_tokens": 16},
        {"word_steps": {"cat": (0.0, 0.3)}},
        {"word_weights": {"red": 4.0}},
        {"sites": "cross"},
        {"blend": ["fox", "cat"], "threshold": 0.95},
    ):
        assert apart(edited(tiny, PROMPT, **options), base) > 1e-5, options


def test_outside_of_its_words_the_source_stays(tiny: Any) -> None:
    source = latents(tiny, [SOURCE])
    found = edited(tiny, PROMPT, blend=True, threshold=0.9)
    same = (found - source).abs().amax(1) < 5e-4
    assert same.any() and not same.all()


def test_a_method_of_another_start_or_kernel_is_refused_by_name(
    tiny: Any, tiny_folder: Any, open_folder: Callable[..., Any]
) -> None:
    tree = {"p2p": {"source": SOURCE}, "text2video_zero": {}}
    with pytest.raises(ValueError, match=r"methods\.p2p and methods\.text2video_zero both claim"):
        apply_methods(tiny, methods_of(tree), trains=False)
    other = open_folder(tiny_folder)
    apply_methods(other, methods_of({"p2p": {"source": SOURCE}, "tiled": {}}), trains=False)
    with pytest.raises(ValueError, match=r"methods\.p2p: .*kernel of methods\.tiled"):
        latents(other, [PROMPT])
    assert not any(
        op.name == "p2p_maps" for hosted in other.host.processors.values() for op in hosted.ops
    )


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"cross_steps": [0.5, 0.5]}, r"methods\.p2p\.cross_steps=\[0\.5, 0\.5\]: an empty window"),
        ({"word_steps": {"cat": [0.8, 0.2]}}, r"methods\.p2p\.word_steps\.cat.*an empty window of"),
        ({"self_steps": [0, 2]}, r"methods\.p2p\.self_steps=\[0, 2\]: an empty window"),
        ({"threshold": 1}, r"methods\.p2p\.threshold=1: a number is needed, above 0 and below 1"),
        ({"edit": "swap"}, r"methods\.p2p\.edit='swap': replace or refine is needed"),
    ],
    ids=str,
)
def test_wrong_options_are_refused_before_loading(options: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        methods_of({"p2p": options})
