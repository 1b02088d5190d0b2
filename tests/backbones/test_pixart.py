"""The PixArt family: what it loads, how text and size reach it, and the flow it is sampled with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, PixArtTransformer2DModel
from edited import edit
from torch import Tensor

from trainer.attention.condition import Condition
from trainer.backbones import load_backbone
from trainer.backbones.backbone import Backbone
from trainer.backbones.pixart import initialise
from trainer.backbones.spec import BackboneSpec
from trainer.config.lineage import backbone_spec
from trainer.config.load import methods_of
from trainer.config.schema import RecipeError
from trainer.diffusion.objective import Objective, add_noise, target_of
from trainer.diffusion.sampler import sample
from trainer.diffusion.sampling_settings import Sampling
from trainer.export.export import export
from trainer.methods.apply import apply_methods
from trainer.runs.adapter import load_adapted, save_adapter

PROMPTS = ["a fox on a red background", "an apple left of a cat"]
SEEDS = [3, 4]
LINEAR = {  # as PixArt-alpha's folder has it
    "_class_name": "DPMSolverMultistepScheduler",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
}


@pytest.fixture
def copy(dit_folder: Path, tmp_path: Path) -> Path:
    """A pipeline folder that a test may spoil."""
    return Path(shutil.copytree(dit_folder, tmp_path / "copy"))


def test_a_folder_says_its_family(dit: Any, dit_folder: Path) -> None:
    assert backbone_spec(str(dit_folder)).family == "pixart"
    assert dit.family == "pixart"
    assert dit.target == "flow"
    assert dit.alphas_cumprod is None
    assert {site.kind for site in dit.sites} == {"self", "cross"}
    assert {site.divisor for site in dit.sites} == {2}
    assert {name.split(".")[0] for name, _ in dit.named_parameters()} == {
        "transformer",
        "text_encoder",
        "vae",
    }


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("model_index.json", {"_class_name": "FluxPipeline"}, "is a FluxPipeline; this family"),
        (
            "model_index.json",
            {"text_encoder": ["transformers", "GemmaModel"]},
            "text_encoder is a GemmaModel of transformers; this family has CLIPTextModel, T5",
        ),
        (
            "scheduler/scheduler_config.json",
            {"use_dynamic_shifting": True},
            "does not know use_dynamic_shifting",
        ),
    ],
)
def test_a_spoiled_folder_is_refused(
    file: str, changes: dict[str, Any], message: str, copy: Path
) -> None:
    edit(copy / file, **changes)
    with pytest.raises(ValueError, match=message):
        load_backbone(BackboneSpec(folder=str(copy), family="pixart"), "mine")


def test_an_overlay_stands_before_the_folder(tiny_folder: Path, dit_folder: Path) -> None:
    """A U-Net's folder lends its VAE and text encoder to a transformer that has none."""
    spec = BackboneSpec(
        family="pixart", folder=str(tiny_folder), overlay=str(dit_folder), scratch=("transformer",)
    )
    torch.manual_seed(1)
    loaded = load_backbone(spec, "mine")
    assert isinstance(loaded.denoiser, PixArtTransformer2DModel)
    assert not loaded.denoiser.proj_out.weight.any()
    assert loaded.folder == tiny_folder  # where its judge would lie
    with pytest.raises(ValueError, match="overlay goes over a folder"):
        BackboneSpec(hub="nobody/nothing", revision="0" * 40, overlay="here")


def test_the_tiny_transformer_shares_parts_with_the_unet() -> None:
    unet, transformer = backbone_spec("tiny"), backbone_spec("tiny_dit_scratch")
    assert transformer.folder == unet.folder
    assert transformer.overlay is not None
    assert {path.name for path in Path(transformer.overlay).iterdir() if path.is_dir()} == {
        "scheduler",
        "transformer",
    }


def test_padding_is_not_attended_to(dit: Any) -> None:
    condition = dit.encode_prompts(["a fox", PROMPTS[1]])
    states, mask = condition.tokens, condition.mask
    assert states.shape == (2, 32, 128)
    assert mask.sum(1).tolist() == [4, 8]  # with the first and the last
    x_t, t = torch.randn(2, 8, 8, 8), torch.tensor([10.0, 900.0])
    other = torch.where(mask[..., None] == 1, states, torch.randn(states.shape))
    with torch.no_grad():
        plain = dit.predict(x_t, t, condition)
        padded = dit.predict(x_t, t, replace(condition, tokens=other))
        unmasked = dit.predict(x_t, t, Condition(states))
    torch.testing.assert_close(padded, plain)
    assert not torch.allclose(unmasked, plain, atol=1e-4)


def test_prompts_are_lower_case_but_for_new_words(dit: Any) -> None:
    apply_methods(dit, methods_of({"new_token": {"tokens": ["<Rex>"], "init": "fox"}}))
    with torch.no_grad():
        dit.text_encoder.get_input_embeddings().rows[0].add_(torch.randn(128))
        one, other, plain = (
            dit.encode_prompts([prompt]).tokens
            for prompt in ("A <Rex> left of a Cat", "a <Rex> left of a cat", "a fox left of a cat")
        )
    assert torch.equal(one, other)
    assert not torch.allclose(one, plain, atol=1e-2)


def test_size_reaches_a_model_that_asks_for_it(copy: Path, open_folder: Any) -> None:
    """And a learned variance behind the output is left out, as in PixArt-alpha at 1024."""
    torch.manual_seed(0)
    config = json.loads((copy / "transformer" / "config.json").read_text())
    config |= {"use_additional_conditions": True, "out_channels": 16, "attention_head_dim": 9}
    config |= {"cross_attention_dim": 36}
    PixArtTransformer2DModel.from_config(config).save_pretrained(copy / "transformer")
    model = open_folder(copy)
    x_t, t = torch.randn(2, 8, 8, 12), torch.tensor([10.0, 900.0])
    condition = model.encode_prompts(PROMPTS)
    size = {
        "resolution": torch.tensor([[32.0, 48.0]] * 2),
        "aspect_ratio": torch.tensor([[32 / 48]] * 2),
    }
    with torch.no_grad():
        own = model.predict(x_t, t, condition)
        wanted = model.transformer(
            x_t,
            timestep=t,
            added_cond_kwargs=size,
            encoder_hidden_states=condition.tokens,
            encoder_attention_mask=condition.mask,
        ).sample
    assert own.shape == x_t.shape
    assert torch.equal(own, wanted[:, :8])


def euler(model: Backbone, steps: int, guidance: float) -> Tensor:
    """x <- x + (s' - s) (u + w (c - u)) at the sigmas of diffusers' scheduler, in plain code."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas
    x = torch.cat(
        [torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in SEEDS]
    )
    for now, after in pairwise(sigmas):
        t = (1000 * now).expand(2)
        cond = model.predict(x, t, model.encode_prompts(PROMPTS))
        uncond = model.predict(x, t, model.encode_prompts(["", ""]))
        x = x + (after - now) * (uncond + guidance * (cond - uncond))
    return model.decode(x)


def test_sampling_is_euler_steps_along_the_flow(dit: Any) -> None:
    with torch.no_grad():
        wanted = euler(dit, 5, 3.0)
    own = sample(dit, PROMPTS, SEEDS, settings=Sampling(steps=5, guidance=3.0))
    torch.testing.assert_close(own, wanted, rtol=0, atol=1e-5)


def test_the_true_flow_is_followed_to_the_data() -> None:
    """Where the network knows noise - x0, the steps end at x0, from the noise of training."""
    objective = Objective("flow")
    x0, noise = torch.randn(2, 4), torch.randn(2, 4)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    scheduler.set_timesteps(4)
    x = noise
    for t in scheduler.timesteps:
        at = t.expand(2)
        torch.testing.assert_close(x, add_noise(objective, x0, noise, at), atol=1e-5, rtol=0)
        x = scheduler.step(target_of(objective, x0, noise, at), t, x).prev_sample
    torch.testing.assert_close(x, x0, atol=1e-5, rtol=0)


def test_a_folder_trained_on_noise_is_sampled_as_its_pipeline_does(
    copy: Path, open_folder: Any
) -> None:
    (copy / "scheduler" / "scheduler_config.json").write_text(json.dumps(LINEAR))
    model = open_folder(copy)
    assert model.target == "eps"
    own = sample(model, PROMPTS, SEEDS, settings=Sampling(steps=3, guidance=3.0)) / 2 + 0.5
    torch.testing.assert_close(own, stock(model.pipeline(), 3), rtol=0, atol=1e-4)


def stock(pipeline: Any, steps: int) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    result = pipeline(
        prompt=PROMPTS,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        num_inference_steps=steps,
        guidance_scale=3.0,
        height=32,
        width=32,
        max_sequence_length=32,
        use_resolution_binning=False,
        clean_caption=False,
        output_type="pt",
    )
    images: Tensor = result.images
    return images


def test_merged_is_a_pipeline_that_paints_the_same(
    dit: Any, dit_folder: Path, tmp_path: Path, train: Callable[..., list[float]], open_folder: Any
) -> None:
    """Written, loaded by us, and loaded by stock diffusers, whose solver takes other steps: many of
    them come to the same picture."""
    from diffusers import PixArtAlphaPipeline

    tree = {"selective": {"sites": "cross"}, "new_token": {"tokens": ["<v1>"], "init": "fox"}}
    plan = apply_methods(dit, methods_of(tree))
    train(dit, plan)
    own = dict(dit.named_parameters())
    path = tmp_path / "adapter.safetensors"
    header = {"backbone": str(dit_folder), "methods": tree}
    save_adapter(path, {name: own[name] for name in plan.stored}, header, dit.identity())
    out = export(path, tmp_path / "merged", say=lambda line: None)
    wanted = sample(dit, PROMPTS, SEEDS, settings=Sampling(steps=3, guidance=3.0))
    again = open_folder(out)
    assert again.target == "flow"
    torch.testing.assert_close(
        sample(again, PROMPTS, SEEDS, settings=Sampling(steps=3, guidance=3.0)),
        wanted,
        rtol=0,
        atol=1e-4,
    )
    pictures = stock(PixArtAlphaPipeline.from_pretrained(out), 40)
    fine = sample(dit, PROMPTS, SEEDS, settings=Sampling(steps=40, guidance=3.0)) / 2 + 0.5
    assert float((pictures - fine).abs().mean()) < 0.02


def test_an_adapter_of_another_family_is_refused(
    dit: Any, tiny_folder: Path, dit_folder: Path, tmp_path: Path
) -> None:
    plan = apply_methods(dit, methods_of({"selective": {"sites": "cross"}}))
    own, path = dict(dit.named_parameters()), tmp_path / "adapter.safetensors"
    header = {"backbone": str(dit_folder), "methods": {"selective": {"sites": "cross"}}}
    save_adapter(path, {name: own[name] for name in plan.stored}, header, dit.identity())
    with pytest.raises(ValueError, match=r"was trained on backbone .*family pixart.*family sd"):
        load_adapted(path, str(tiny_folder))


def test_an_untrained_transformer_predicts_nothing_and_learns_everywhere(dit: Any) -> None:
    torch.manual_seed(0)
    initialise(dit.transformer)
    x_t, t = torch.randn(2, 8, 8, 8), torch.tensor([10.0, 900.0])
    optimizer = torch.optim.SGD(dit.transformer.parameters(), 1.0)
    assert not dit.predict(x_t, t, dit.encode_prompts(PROMPTS)).any()
    for _ in range(3):
        dit.zero_grad()
        (dit.predict(x_t, t, dit.encode_prompts(PROMPTS)) - x_t).square().mean().backward()
        optimizer.step()
    without = [name for name, p in dit.transformer.named_parameters() if not p.grad.any()]
    assert without == []


def test_the_vp_path_is_refused_on_a_flow(dit_folder: Path, dit: Any) -> None:
    from trainer.backbones.device import CPU
    from trainer.config.load import load_recipe
    from trainer.training.build import adapt, objective

    words = ["recipe=custom_diffusion", f"backbone={dit_folder}", "data.class_word=animal"]
    assert objective(load_recipe(words), dit).target == "flow"
    with pytest.raises(ValueError, match=r"objective\.path=vp: .* was trained on the flow path"):
        adapt(load_recipe([*words, "objective.path=vp"]), dit, CPU)


def test_an_unknown_backbone_names_ours() -> None:
    with pytest.raises(RecipeError, match="did you mean tiny_dit_scratch"):
        backbone_spec("tiny_dit_scrach")


def test_the_shipped_transformer_paints_what_it_is_asked() -> None:
    from trainer.data.world.sprites import KNOWN
    from trainer.evaluation.judge import Judge

    shipped = load_backbone(backbone_spec("tiny_dit"), "tiny_dit").eval()
    words = KNOWN[::8]
    prompts = [f"a {word} on a white background" for word in words]
    painted = sample(
        shipped, prompts, list(range(len(words))), settings=Sampling(steps=25, guidance=5.0)
    )
    named = Judge(shipped.folder / "clip").named(painted, KNOWN)
    assert sum(said == word for said, word in zip(named, words, strict=True)) >= 6


def test_recipes_meet_the_shipped_transformer_at_the_noise_it_learned_at() -> None:
    from trainer.config.load import load_recipe

    for name in ("custom_diffusion", "lora", "linear_swap", "agent_attention"):
        told = [
            load_recipe([f"recipe={name}", f"backbone={each}"]) for each in ("tiny", "tiny_dit")
        ]
        unet, dit = (each.objective for each in told)
        assert dit.logit_mean < unet.logit_mean
        assert told[0].run == told[1].run
