"""AnimateDiff's domain adapter: where it is, its equation, motion modules trained over it, and
samples with it left out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from trainer.attention.context import StepContext, use
from trainer.config.load import load_recipe, methods_of
from trainer.data.world.watermark import mark_in
from trainer.methods.apply import apply_methods
from trainer.methods.feature.animatediff import AnimateDiff
from trainer.methods.weight.domain_adapter import DomainAdapter
from trainer.runs.adapter import load_adapted
from trainer.training.fit import fit

BOTH: dict[str, Any] = {"animatediff": {"heads": 2}, "domain_adapter": {"rank": 2, "alpha": 6}}
SHORT = ("run.steps=2", "run.batch_size=2", "run.validate_every=0", "preview.every=0",
         "tracker=none", "data.count=4", "data.validation=0", "optim.ema=null")  # fmt: skip


def predict(backbone: Any, frames: int = 2) -> Tensor:
    x_t = torch.randn(4, 8, 8, 8, generator=torch.Generator().manual_seed(3))
    condition = backbone.encode_prompts(["a fox moving left", "a fox", "a cat", ""])
    t = torch.tensor(300)
    with torch.no_grad(), use(StepContext(0, 1, t, frames)):
        output: Tensor = backbone.predict(x_t, t.expand(4), condition)
    return output


def test_it_is_on_self_and_cross_attention_of_the_image_model_alone(tiny: Any, dit: Any) -> None:
    for backbone in (tiny, dit):
        plan = apply_methods(backbone, methods_of(BOTH))
        own = set(plan.edits["domain_adapter"].sites)
        spatial = {site.name for site in backbone.sites if site.kind in ("self", "cross")}
        assert own == spatial
        assert any(site.kind == "temporal" for site in backbone.sites)
        assert not any("motion_modules" in name for name in plan.edits["domain_adapter"].trains)


def test_its_layers_add_a_low_rank_product(tiny: Any, randomise: Callable[..., None]) -> None:
    plan = apply_methods(tiny, {"domain_adapter": DomainAdapter(rank=2, alpha=6.0)})
    randomise(tiny, plan, 0.3)
    for attention in ("attn1", "attn2"):
        for layer_name in ("to_q", "to_k", "to_v", "to_out.0"):
            name = f"up_blocks.0.attentions.0.transformer_blocks.0.{attention}.{layer_name}"
            layer: Any = tiny.unet.get_submodule(name)
            down, up = (m["domain_adapter"].weight for m in (layer.lora_A, layer.lora_B))
            x = torch.randn(5, down.shape[1], generator=torch.Generator().manual_seed(1))
            base = layer.base_layer
            wanted = x @ (base.weight + 6 / 2 * up @ down).T
            wanted = wanted if base.bias is None else wanted + base.bias
            torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-4)


def test_attention_over_frames_is_refused(tiny: Any) -> None:
    tree = {"animatediff": {"heads": 2}, "domain_adapter": {"sites": "self | temporal"}}
    with pytest.raises(ValueError, match=r"methods\.domain_adapter: .* is attention over frames"):
        apply_methods(tiny, methods_of(tree))


def test_left_out_while_sampling_the_motion_modules_alone_remain(
    tiny: Any, tiny_folder: Path, save_trained_on: Callable[..., Path]
) -> None:
    """To the last bit; scaled, its layers add that share."""
    path = save_trained_on(tiny_folder, BOTH)
    apply_methods(tiny, {"animatediff": AnimateDiff(heads=2)})
    own, stored = dict(tiny.named_parameters()), load_file(path)
    with torch.no_grad():
        for name, value in own.items():
            if "motion_modules" in name:
                value.copy_(stored[name])
    whole, none, half = (
        load_adapted(path, scale=scale)[0]
        for scale in (1.0, {"domain_adapter": 0.0}, {"domain_adapter": 0.5})
    )
    assert torch.equal(predict(none), predict(tiny))
    assert not torch.allclose(predict(whole), predict(tiny), atol=1e-4)
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    deltas = [m.unet.get_submodule(name).get_delta_weight("domain_adapter") for m in (whole, half)]
    torch.testing.assert_close(deltas[1], 0.5 * deltas[0])
    with pytest.raises(ValueError, match=r"scale: .* has methods\.animatediff, whose effect"):
        load_adapted(path, scale=0.5)


def test_the_recipe_fits_frames_with_the_watermark_and_modules_train_over_it(
    tmp_path: Path,
) -> None:
    """The words of motion stay as they ship in both stages, the adapter in the second."""
    first = fit(
        load_recipe(["recipe=domain_adapter", *SHORT, f"run.out={tmp_path}", "run.id=look"])
    )
    recipe = load_recipe(["recipe=domain_adapter", *SHORT])
    data: Any = recipe.data
    assert (data.frames, data.any_moment, data.defect) == (1, True, "watermark")
    words = ("methods.domain_adapter.sites=self", "optim.lrs.domain_adapter=0")
    begin = f"run.start_from={first}"
    out = (f"run.out={tmp_path}", "run.id=moving", "data.defect=watermark")
    second = fit(load_recipe(["recipe=animatediff", *SHORT, *words, begin, *out]))
    before, after = (load_file(run / "adapter.safetensors") for run in (first, second))
    assert before and all(torch.equal(value, after[name]) for name, value in before.items())
    assert any("domain_adapter" in name for name in before)
    assert all("motion_modules" in name for name in set(after) - set(before))


def test_the_watermark_is_measured_by_itself() -> None:
    frames = torch.zeros(2, 64, 64, 3).numpy()
    frames[1, 42:54, :32] = 1.0  # a light block is no stripes
    assert abs(mark_in(frames)).max() < 1e-6
