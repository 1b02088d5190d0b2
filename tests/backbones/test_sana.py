"""The Sana family: linear attention hosted to the bit, what it takes and what it refuses, the
folders it loads, and that weight-level methods work on it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderDC,
    DPMSolverMultistepScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
)
from diffusers.models.attention_processor import Attention, SanaLinearAttnProcessor2_0
from torch import Tensor, nn

from trainer.attention.host import Host
from trainer.attention.op import Traits
from trainer.attention.processor import HostedProcessor
from trainer.backbones import load_backbone
from trainer.backbones.sana import FAMILY, initialise
from trainer.backbones.spec import BackboneSpec
from trainer.config.lineage import backbone_spec
from trainer.config.load import load_recipe, methods_of
from trainer.diffusion.sampler import sample
from trainer.diffusion.sampling_settings import Sampling
from trainer.export.export import export
from trainer.methods.apply import apply_methods
from trainer.ops.attention_maps import MapStore
from trainer.runs.adapter import load_adapted, save_adapter

DATA = Path(__file__).parents[2] / "data"
PROMPTS = ["a fox on a red background", "an apple left of a cat"]
SEEDS = [3, 4]
SANA: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 8,
    "out_channels": 8,
    "num_layers": 2,
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 16,
    "cross_attention_dim": 32,
    "caption_channels": 128,
    "patch_size": 2,
}
# methods of the weight level, with one that trains beside those that do not
WEIGHT: dict[str, dict[str, Any]] = {
    "c_lora": {"c_lora": {"rank": 2, "task": 1}},
    "coda_prompt": {"coda_prompt": {"pool": 5, "length": 4, "task": 1, "num_tasks": 2}},
    "controls": {"controls": {"projections": ["q", "v"], "rank": 2}},
    "dora": {"dora": {"rank": 2}},
    "full": {"full": {}},
    "inflora": {"inflora": {"rank": 2, "task": 1, "num_tasks": 2}},
    "lora": {"lora": {"rank": 2, "layers": ["*ff.conv_point"]}},
    "new_token": {"new_token": {"tokens": ["<v1>"], "init": "fox"}},
    "nf4": {"nf4": {"min_size": 1024}, "lora": {"rank": 2}},
    "peft_adapter": {"peft_adapter": {"type": "loha", "options": {"r": 2}}},
    "selective": {"selective": {"projections": ["k", "v"], "detach_first_token": True}},
    "tlora": {"tlora": {"rank": 4, "layers": ["*ff.conv_point"]}},
    "selective_self": {"selective": {"sites": "self", "projections": ["q", "k", "v", "out"]}},
}
SOFTMAX = {
    "flash": {},
    "flashmask": {"size": 0.25},
    "tiled": {},
    "longlora": {"rank": 2},
    "agent_attention": {"agents": "merged"},
}


@pytest.fixture(scope="session")
def sana_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped parts with a seeded random transformer."""
    folder = tmp_path_factory.mktemp("backbone") / "sana"
    for part in ("text_encoder", "tokenizer", "vae"):
        shutil.copytree(DATA / "tiny" / part, folder / part)
    shutil.copytree(DATA / "tiny_sana" / "scheduler", folder / "scheduler")
    shutil.copy(DATA / "tiny_sana" / "model_index.json", folder)
    torch.manual_seed(0)
    SanaTransformer2DModel(**SANA).save_pretrained(folder / "transformer")
    return folder


@pytest.fixture
def sana(sana_folder: Path, open_folder: Callable[[Path], Any]) -> Any:
    """A fresh `Sana` that a test may edit."""
    return open_folder(sana_folder)


def predict(model: Any) -> Tensor:
    x_t = torch.randn(2, 8, 8, 12, generator=torch.Generator().manual_seed(3))
    output: Tensor = model.predict(x_t, torch.tensor([3.0, 900.0]), model.encode_prompts(PROMPTS))
    return output


def state(model: Any) -> dict[str, Tensor]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: value.detach().clone() for name, value in tensors}


def test_a_folder_says_its_family(sana: Any, sana_folder: Path) -> None:
    assert backbone_spec(str(sana_folder)).family == "sana"
    assert sana.family == "sana"
    assert (sana.target, sana.divisor, sana.resolution, sana.text_length) == ("flow", 4, 32, 32)


def test_every_layer_is_a_hosted_site(sana: Any) -> None:
    sites = [(site.kind, site.native.linear, site.heads, site.head_dim) for site in sana.sites]
    assert sites == 2 * [("self", True, 4, 8), ("cross", False, 2, 16)]
    assert {site.divisor for site in sana.sites} == {2}
    for site in sana.sites:
        assert isinstance(site.module.processor, HostedProcessor)
        assert {role: type(layer) for role, layer in site.projections.items()} == dict.fromkeys(
            ("q", "k", "v", "out"), nn.Linear
        )
    sana.host.detach()
    assert type(sana.sites[0].module.processor) is SanaLinearAttnProcessor2_0


def test_the_hosted_network_is_diffusers_own_to_the_bit(sana: Any) -> None:
    with torch.no_grad():
        condition = sana.encode_prompts(PROMPTS)
    x_t, t = torch.randn(2, 8, 8, 12), torch.tensor([10.0, 900.0])
    text = {"encoder_hidden_states": condition.tokens, "encoder_attention_mask": condition.mask}
    wanted = sana.transformer(x_t, timestep=t, **text).sample
    wanted.square().sum().backward()
    gradients = {name: p.grad for name, p in sana.transformer.named_parameters()}
    sana.zero_grad()
    assert len(sana.host.processors) == 4
    own = sana.predict(x_t, t, condition)
    assert torch.equal(own, wanted)
    own.square().sum().backward()
    for name, parameter in sana.transformer.named_parameters():
        assert torch.equal(parameter.grad, gradients[name]), name
    assert all(processor.reached for processor in sana.host.processors.values())


def test_the_timestep_is_scaled_as_the_model_says(sana: Any) -> None:
    """Sana 1.5's transformer takes t / 1000: `timestep_scale` of its configuration, by which
    diffusers' pipeline multiplies."""
    seen: list[Tensor] = []
    sana.transformer.register_forward_pre_hook(
        lambda _, args, given: seen.append(given["timestep"]), with_kwargs=True
    )
    for scale in (1.0, 0.001):
        sana.transformer.register_to_config(timestep_scale=scale)
        predict(sana)
        torch.testing.assert_close(seen[-1], torch.tensor([3.0, 900.0]) * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("qk_norm", [None, "rms_norm_across_heads", "l2"])
def test_a_linear_layer_is_bit_identical(dtype: torch.dtype, qk_norm: str | None) -> None:
    torch.manual_seed(0)
    attn = Attention(
        24, heads=4, dim_head=6, kv_heads=4, qk_norm=qk_norm, processor=SanaLinearAttnProcessor2_0()
    )
    for parameter in attn.parameters():
        nn.init.normal_(parameter, std=0.5)
    attn.to_out[0].weight.data *= 1e4  # beyond the largest of float16
    attn.to(dtype)
    x = torch.randn(2, 15, 24).to(dtype)

    def outcome() -> list[Tensor]:
        attn.zero_grad()
        leaf = x.clone().requires_grad_()
        output = attn(leaf)
        output.float().square().mean().backward()
        return [output, leaf.grad, *(p.grad for p in attn.parameters())]  # type: ignore[list-item]

    wanted = outcome()
    assert bool(wanted[0].isfinite().all())
    assert bool((wanted[0].abs() == 65504).any()) == (dtype == torch.float16)
    host = Host.attach(nn.ModuleDict({"attn": attn}), FAMILY.traits)
    assert host.sites[0].native.linear and host.processors
    for own, other in zip(outcome(), wanted, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=0, equal_nan=True)


def test_a_layer_that_its_processor_leaves_half_undone_is_not_hosted() -> None:
    attn = Attention(
        24, heads=4, dim_head=6, residual_connection=True, processor=SanaLinearAttnProcessor2_0()
    )
    host = Host.attach(nn.ModuleDict({"attn": attn}), FAMILY.traits)
    assert isinstance(attn.processor, SanaLinearAttnProcessor2_0)
    with pytest.raises(ValueError, match="runs SanaLinearAttnProcessor2_0, which is not hosted"):
        host.install(MapStore([1]), host.sites)


def test_a_mask_on_a_linear_layer_is_refused(sana: Any) -> None:
    site = sana.sites[0]
    x = torch.randn(1, 16, 32)
    with pytest.raises(ValueError, match=f"'{site.name}' is linear.* cannot use the mask"):
        site.module(x, attention_mask=torch.zeros(1, 1, 16))


@pytest.mark.parametrize("name", SOFTMAX)
def test_softmax_in_the_place_of_linear_attention_is_refused(name: str, sana: Any) -> None:
    with pytest.raises(ValueError, match=rf"methods\.{name}.*'transformer_blocks\.0\.attn1' is li"):
        apply_methods(sana, methods_of({name: SOFTMAX[name], "new_token": {"tokens": ["<v1>"]}}))


@pytest.mark.parametrize("name", ["flash", "tiled"])
def test_its_cross_attention_takes_exact_kernels(name: str, sana: Any) -> None:
    base = predict(sana).detach()
    given = {name: {"sites": "cross"} | ({"backend": "auto"} if name == "flash" else {})}
    apply_methods(sana, methods_of(given | {"new_token": {"tokens": ["<v1>"]}}))
    torch.testing.assert_close(predict(sana), base, rtol=1e-5, atol=1e-5)


def test_ops_that_read_probabilities_are_refused_on_linear_sites_only(sana: Any) -> None:
    store = MapStore([1, 2])
    with pytest.raises(ValueError, match=r"'map_store' needs probabilities at .*attn1'.*linear"):
        sana.host.install(store, sana.sites)
    assert not any(processor.ops for processor in sana.host.processors.values())
    sana.host.install(store, [site for site in sana.sites if site.kind == "cross"])
    predict(sana)
    assert len(store.maps) == 2

    class Masks:
        name = "masks"
        traits = Traits()

        def mask(self, mask: Tensor | None, **_: Any) -> Tensor | None:
            return mask

    with pytest.raises(ValueError, match=r"op 'masks' needs a mask at .*attn1'.*linear"):
        sana.host.install(Masks(), sana.sites[:1])


def test_its_linear_attention_is_the_swap_by_relu(sana: Any) -> None:
    """Two forms of one equation: and the distillation finds nothing to learn."""
    base = predict(sana).detach()
    plan = apply_methods(
        sana,
        methods_of(
            {"linear_attention": {"features": "relu", "distill": 1}, "selective": {"sites": "self"}}
        ),
    )
    torch.testing.assert_close(predict(sana.train()), base, rtol=1e-4, atol=1e-5)
    loss = plan.edits["linear_attention"].loss
    assert loss is not None
    assert float(loss(None).detach()) < 1e-9


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", WEIGHT)
def test_weight_methods_train_what_they_claim_and_load_the_same(
    name: str, sana: Any, sana_folder: Path, tmp_path: Path, train: Callable[..., list[float]]
) -> None:
    tree = WEIGHT[name]
    plan = apply_methods(sana, methods_of(tree))
    before = state(sana)
    losses = train(sana, plan)
    after = state(sana)
    assert all(loss == loss for loss in losses)
    changed = {key for key, value in after.items() if not torch.equal(value, before[key])}
    assert changed == set(plan.names)
    sana.requires_grad_(False)  # as a loaded one: PyTorch folds products by what needs a gradient
    wanted = sample(
        sana, ["a <v1> on a red background"], [3], settings=Sampling(steps=2, guidance=3)
    )
    path = tmp_path / "adapter.safetensors"
    tensors = {key: after[key] for key in plan.stored}
    save_adapter(path, tensors, {"backbone": str(sana_folder), "methods": tree}, sana.identity())
    loaded, _ = load_adapted(path)
    again = sample(
        loaded, ["a <v1> on a red background"], [3], settings=Sampling(steps=2, guidance=3)
    )
    assert torch.equal(again, wanted)


def test_gradient_checkpointing_changes_nothing(sana: Any) -> None:
    apply_methods(sana, methods_of({"gated_linear": {"convolution": 3}, "full": {}}))
    sana.train()

    def gradients() -> dict[str, Tensor]:
        sana.zero_grad()
        predict(sana).square().sum().backward()
        return {
            name: parameter.grad
            for name, parameter in sana.named_parameters()
            if parameter.requires_grad and parameter.grad is not None
        }

    wanted = gradients()
    sana.enable_gradient_checkpointing()
    again = gradients()
    assert wanted.keys() == again.keys()
    assert any("block_convolution" in name for name in wanted)
    for name, gradient in again.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-5)


def stock(pipeline: Any, side: int, length: int) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    result = pipeline(
        prompt=PROMPTS,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        num_inference_steps=3,
        guidance_scale=3.0,
        height=side,
        width=side,
        max_sequence_length=length,
        use_resolution_binning=False,
        complex_human_instruction=None,
        clean_caption=False,
        output_type="pt",
    )
    images: Tensor = result.images
    return images


def test_merged_is_a_pipeline_that_paints_the_same(
    sana: Any,
    sana_folder: Path,
    tmp_path: Path,
    train: Callable[..., list[float]],
    open_folder: Any,
) -> None:
    tree = {"selective": {"sites": "all", "projections": ["q", "v"]}}
    plan = apply_methods(sana, methods_of(tree))
    train(sana, plan)
    own, path = dict(sana.named_parameters()), tmp_path / "adapter.safetensors"
    header = {"backbone": str(sana_folder), "methods": tree}
    save_adapter(path, {name: own[name] for name in plan.stored}, header, sana.identity())
    out = export(path, tmp_path / "merged", say=lambda line: None)
    wanted = sample(sana, PROMPTS, SEEDS, settings=Sampling(steps=3, guidance=3.0))
    torch.testing.assert_close(
        sample(open_folder(out), PROMPTS, SEEDS, settings=Sampling(steps=3, guidance=3.0)), wanted
    )
    pictures = stock(SanaPipeline.from_pretrained(out), 32, 32)
    torch.testing.assert_close(pictures, wanted / 2 + 0.5, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def public_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Very small random parts in the layout of the folders Sana is published in."""
    from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *"abcdefghijklmnopqrstuvwxyz"]
    torch.manual_seed(0)
    text = Gemma2Config(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    blocks: dict[str, Any] = {
        f"{half}_{name}": value
        for half in ("encoder", "decoder")
        for name, value in {
            "block_out_channels": (8, 8, 8),
            "layers_per_block": (1, 1, 1),
            "qkv_multiscales": ((), (), ()),
        }.items()
    }
    pipeline = SanaPipeline(
        GemmaTokenizer(vocab={word: index for index, word in enumerate(words)}),
        Gemma2Model(text),
        AutoencoderDC(latent_channels=8, scaling_factor=0.4, **blocks),
        SanaTransformer2DModel(**SANA | {"caption_channels": 16, "patch_size": 1}),
        DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )
    folder = tmp_path_factory.mktemp("backbone") / "public"
    pipeline.save_pretrained(folder)
    return folder


def test_a_public_folder_is_read_and_painted_as_its_pipeline_does(
    public_folder: Path, open_folder: Any
) -> None:
    model = open_folder(public_folder)
    assert (model.target, model.divisor, model.text_length) == ("flow", 4, 300)
    assert model.scheduler().config.shift == 3.0
    pipeline = SanaPipeline.from_pretrained(public_folder)
    states, mask, *_ = pipeline.encode_prompt(PROMPTS, False)
    condition = model.encode_prompts(PROMPTS)
    assert torch.equal(condition.mask, mask)
    torch.testing.assert_close(condition.tokens, states)
    own = sample(model, PROMPTS, SEEDS, settings=Sampling(steps=3, guidance=3.0)) / 2 + 0.5
    torch.testing.assert_close(stock(model.pipeline(), 32, 300), own, rtol=0, atol=1e-4)


def test_a_public_folder_is_painted_by_its_own_solver(
    public_folder: Path, tmp_path: Path, open_folder: Any
) -> None:
    """A multistep solver of flows, and the index names the classes that older libraries had. The
    sentences that its pipeline puts before a prompt, `complex_human_instruction`, are left out."""
    copy = Path(shutil.copytree(public_folder, tmp_path / "copy"))
    index = json.loads((copy / "model_index.json").read_text())
    index["tokenizer"] = ["transformers", "GemmaTokenizerFast"]
    (copy / "model_index.json").write_text(json.dumps(index))
    model, pipe = open_folder(copy), SanaPipeline.from_pretrained(copy)
    assert type(pipe.scheduler) is DPMSolverMultistepScheduler
    settings = Sampling(steps=3, guidance=3.0, sampler="dpmpp_2m")
    own = sample(model, PROMPTS, SEEDS, settings=settings) / 2 + 0.5
    wanted = stock(pipe, 32, 300)
    assert float((own - wanted).abs().max()) <= 2 / 255
    assert float(wanted.std()) > 0.05


def test_latents_of_a_vae_without_a_posterior(public_folder: Path, open_folder: Any) -> None:
    model = open_folder(public_folder)
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    moments = model.moments(pixels)
    assert moments.shape == (2, 16, 8, 8)
    drawn = model.latents(moments, torch.randn(2, 8, 8, 8))
    with torch.no_grad():
        torch.testing.assert_close(drawn, 0.4 * model.vae.encode(pixels).latent, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("model_index.json", {"_class_name": "SanaSprintPipeline"}, "is a SanaSprintPipeline"),
        (
            "model_index.json",
            {"text_encoder": ["transformers", "T5EncoderModel"]},
            "text_encoder is a T5EncoderModel of transformers; this family has CLIPTextModel, Gem",
        ),
        (
            "vae/config.json",
            {"_class_name": "AutoencoderOobleck"},
            "vae is a AutoencoderOobleck; these are known: AutoencoderKL, AutoencoderTiny, ",
        ),
        ("transformer/config.json", {"guidance_embeds": True}, "the weights lack|Sana-Sprint"),
    ],
)
def test_a_folder_of_another_kind_is_refused(
    file: str, changes: dict[str, Any], message: str, sana_folder: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(sana_folder, tmp_path / "copy"))
    path = copy / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        load_backbone(BackboneSpec(folder=str(copy), family="sana"), "mine")


def test_an_untrained_transformer_predicts_nothing_and_learns_everywhere(sana: Any) -> None:
    torch.manual_seed(0)
    initialise(sana.transformer)
    x_t, t = torch.randn(2, 8, 8, 8), torch.tensor([10.0, 900.0])
    optimizer = torch.optim.SGD(sana.transformer.parameters(), 1.0)
    assert not sana.predict(x_t, t, sana.encode_prompts(PROMPTS)).any()
    for _ in range(3):
        sana.zero_grad()
        (sana.predict(x_t, t, sana.encode_prompts(PROMPTS)) - x_t).square().mean().backward()
        optimizer.step()
    assert [name for name, p in sana.transformer.named_parameters() if not p.grad.any()] == []


def test_the_recipe_names_the_shipped_network() -> None:
    recipe = load_recipe(["recipe=sana_scratch"])
    torch.manual_seed(0)
    model = load_backbone(recipe.backbone, recipe.backbone_name)
    assert model.family == "sana"
    assert (model.resolution, model.text_width) == (64, 128)
    assert sum(site.native.linear for site in model.sites) == 7
    said = (DATA / "tiny_sana" / "README.md").read_text()
    assert f"{sum(p.numel() for p in model.transformer.parameters()):,}" in said
