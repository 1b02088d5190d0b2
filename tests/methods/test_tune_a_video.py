"""Tune-A-Video: the block as the paper writes it, what trains, images untouched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.attention.context import StepContext, use
from trainer.config.load import load_recipe, methods_of
from trainer.methods.apply import apply_methods
from trainer.methods.feature.tune_a_video import TuneAVideo

TREE = {"tune_a_video": {}, "selective": {"sites": "all", "projections": ["q"]}}
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"


def looped(block: Any, x: Tensor, text: Tensor, frames: int) -> Tensor:
    """Frame by frame: attention to the first and the previous frame, to the text, feed-forward,
    then over the frames of each pixel."""

    def attend(attn: Any, z: Tensor, context: Tensor) -> Tensor:
        q, k, v = (
            layer(y).unflatten(-1, (attn.heads, -1)).transpose(0, 1)
            for layer, y in ((attn.to_q, z), (attn.to_k, context), (attn.to_v, context))
        )
        o = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1) @ v
        out: Tensor = attn.to_out[0](o.transpose(0, 1).flatten(1))
        return out

    normed = [block.norm1(row) for row in x]
    rows = []
    for i in range(frames):
        context = torch.cat([normed[0], normed[max(i - 1, 0)]])
        y = x[i] + attend(block.attn1, normed[i], context)
        y = y + attend(block.attn2, block.norm2(y), text[i])
        rows.append(y + block.ff(block.norm3(y)))
    y = torch.stack(rows)
    layer = block.temporal
    through = [attend(layer.attn, z, z) for z in layer.norm(y).unbind(1)]
    return y + torch.stack(through, 1)


def test_the_block(tiny: Any, randomise: Callable[..., None]) -> None:
    plan = apply_methods(tiny, methods_of(TREE))
    randomise(tiny, plan, 0.2)
    block: Any = tiny.unet.get_submodule(BLOCK)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 7, 16, generator=generator).requires_grad_()
    text = torch.randn(3, 4, 128, generator=generator)
    with tiny.host.holder.holding(StepContext(0, 1, torch.zeros(()), frames=3)):
        own = block(x, encoder_hidden_states=text)
    wanted = looped(block, x, text, 3)
    torch.testing.assert_close(own, wanted, rtol=1e-4, atol=1e-4)
    parameters = [x, *(p for p in block.parameters() if p.requires_grad)]
    found = torch.autograd.grad(own.square().sum(), parameters)
    reference = torch.autograd.grad(wanted.square().sum(), parameters)
    for mine, other in zip(found, reference, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-2)


def test_the_recipe_trains_queries_and_temporal_attention() -> None:
    recipe = load_recipe(["recipe=tune_a_video"])
    assert list(recipe.methods) == ["tune_a_video", "selective"]
    assert recipe.optim.lr == 1e-3  # of the tiny backbone; the paper's 3e-5 elsewhere
    words = ["recipe=tune_a_video", "data.source=video", "data.video=./no.mp4", "data.prompt=x"]
    with pytest.raises(ValueError, match=r"no\.mp4: no such file"):
        load_recipe([*words, "data.count=null", "data.seed=null"])


@pytest.mark.parametrize("name", ["tune_a_video", "videop2p"])
def test_the_recipes_train_what_the_papers_name(name: str, tiny: Any) -> None:
    """The queries of self- and of cross-attention, and all of the temporal attention: Tune-A-Video,
    arXiv 2212.11565, section 3.2, and Video-P2P, arXiv 2303.04761, section 3.1."""
    plan = apply_methods(tiny, load_recipe([f"recipe={name}"]).methods)
    blocks = [
        n for n, m in tiny.unet.named_modules() if type(m).__name__ == "BasicTransformerBlock"
    ]
    assert len(blocks) == 7
    own = dict(tiny.named_parameters())
    queries = {f"unet.{b}.{attn}.to_q.weight" for b in blocks for attn in ("attn1", "attn2")}
    temporal = {n for n in own if any(n.startswith(f"unet.{b}.temporal.") for b in blocks)}
    assert {name.split(".temporal.")[1] for name in temporal} == {
        "norm.weight", "norm.bias", "attn.to_q.weight", "attn.to_k.weight", "attn.to_v.weight",
        "attn.to_out.0.weight", "attn.to_out.0.bias",
    }  # fmt: skip
    assert set(plan.names) == queries | temporal


def test_what_trains(tiny: Any) -> None:
    plan = apply_methods(tiny, methods_of(TREE))
    assert all(".temporal." in name or name.endswith("to_q.weight") for name in plan.names)
    queries = [n for n in plan.names if n.endswith(("attn1.to_q.weight", "attn2.to_q.weight"))]
    spatial = [site for site in tiny.sites if site.kind != "temporal"]
    assert len(queries) == len(spatial)
    temporal = [site for site in tiny.sites if site.kind == "temporal"]
    assert len(temporal) == len([site for site in spatial if site.kind == "self"])
    assert {site.name for site in temporal} <= set(plan.edits["tune_a_video"].sites)


def test_attention_over_frames_has_the_heads_of_its_block(tiny: Any) -> None:
    apply_methods(tiny, {"tune_a_video": TuneAVideo()})
    spatial = {s.name.rpartition(".")[0]: s for s in tiny.sites if s.name.endswith(".attn1")}
    temporal = [site for site in tiny.sites if site.kind == "temporal"]
    assert len(temporal) == len(spatial) == 7
    for site in temporal:
        block = spatial[site.name.partition(".temporal")[0]]
        assert (site.heads, site.head_dim) == (block.heads, block.head_dim)
        assert site.heads > 1


def test_an_image_is_the_image_models_whatever_was_learned(
    tiny: Any, predict: Callable[[Any], Tensor], randomise: Callable[..., None]
) -> None:
    base = predict(tiny).detach()
    plan = apply_methods(tiny, {"tune_a_video": TuneAVideo()})
    randomise(tiny, plan, 0.3)
    assert torch.equal(predict(tiny), base)
    with use(StepContext(0, 1, torch.tensor(3), frames=2)):
        assert not torch.allclose(predict(tiny), base, atol=1e-3)


def test_temporal_attention_adds_nothing_at_first(
    tiny: Any, tiny_folder: Any, open_folder: Any
) -> None:
    """A clip starts from the image model whose frames read each other, and from nothing else."""
    from trainer.attention.sites import select
    from trainer.ops.temporal.frame_keys import FrameKeys

    other = open_folder(tiny_folder)
    apply_methods(tiny, {"tune_a_video": TuneAVideo()})
    other.host.install(FrameKeys(("first", "previous"), "x"), select(other.sites, "self"))
    x_t = torch.randn(3, 8, 8, 8, generator=torch.Generator().manual_seed(3))
    condition = tiny.encode_prompts(["a fox"] * 3)
    with torch.no_grad(), use(StepContext(0, 1, torch.tensor(3), frames=3)):
        own, wanted = (b.predict(x_t, torch.tensor([3] * 3), condition) for b in (tiny, other))
    assert torch.equal(own, wanted)


def test_a_model_without_transformer_blocks_is_refused(tiny: Any) -> None:
    from diffusers import UNet2DConditionModel

    tiny.unet = UNet2DConditionModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D"),
        mid_block_type=None,
        norm_num_groups=8,
        attention_head_dim=2,
    )
    with pytest.raises(ValueError, match=r"methods\.tune_a_video: .*no transformer block"):
        apply_methods(tiny, {"tune_a_video": TuneAVideo()})


def test_only_self_attention_reads_frames(tiny: Any) -> None:
    with pytest.raises(ValueError, match=r"methods\.tune_a_video: .*attn2 is cross attention"):
        apply_methods(tiny, {"tune_a_video": TuneAVideo(sites="all")})


def test_it_goes_with_lora_in_4_bits(tiny: Any, train: Callable[..., list[float]]) -> None:
    """The queries by LoRA in the place of their own weights, beside a frozen base of 4 bits."""
    tree = {"tune_a_video": {}, "nf4": {"min_size": 256},
            "lora": {"sites": "all", "projections": ["q"], "rank": 2}}  # fmt: skip
    plan = apply_methods(tiny, methods_of(tree))
    assert all(torch.isfinite(torch.tensor(train(tiny, plan, frames=2))))
