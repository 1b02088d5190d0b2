"""Files that peft and diffusers write themselves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from foreign.case import Case, Made, disturb, made, weights
from peft import (
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    get_peft_model,
    get_peft_model_state_dict,
)

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
WIDE = [*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv_shortcut"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
REAL = "peft"
RENAMED = "peft, but for one field of its configuration"


def config(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ATTENTION, **options})


def of_unet(options: Any, mark: str = "lora_") -> Callable[[Any, Path], Made]:
    """An adapter of the U-Net, trained a little and saved by peft."""

    def make(base: Any, folder: Path) -> Made:
        torch.manual_seed(0)
        model: Any = get_peft_model(base.unet, options)
        disturb(model, mark)
        model.save_pretrained(folder)
        base.unet = model.merge_and_unload()
        return made(folder, base)

    return make


def with_field(name: str, value: Any) -> Callable[[Any, Path], Made]:
    """A plain adapter whose configuration names another start: what is refused before its tensors
    are looked at."""

    def make(base: Any, folder: Path) -> Made:
        found = of_unet(config())(base, folder)
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
        return found

    return make


def converted(base: Any, folder: Path) -> Made:
    """PiSSA that peft has made a plain LoRA of, by its own conversion."""
    model: Any = get_peft_model(base.unet, config(init_lora_weights="pissa"))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(folder / "initial")
    model.peft_config["default"].init_lora_weights = "pissa"
    disturb(model)
    model.save_pretrained(
        folder / "final", path_initial_model_for_weight_conversion=str(folder / "initial")
    )
    base.unet = model.merge_and_unload()
    return made(folder / "final", base)


def both_parts(base: Any, folder: Path) -> Made:
    for part, targets in (("unet", WIDE), ("text_encoder", TEXT)):
        model: Any = get_peft_model(getattr(base, part), config(target_modules=targets))
        disturb(model)
        model.save_pretrained(folder / part)
        setattr(base, part, model.merge_and_unload())
    return made(folder, base)


def diffusers(
    unet: LoraConfig, text: LoraConfig | None = None, *, header: bool = True
) -> Callable[[Any, Path], Made]:
    """`save_lora_weights` of a pipeline whose parts have adapters, as diffusers' trainers call
    it."""

    def make(base: Any, folder: Path) -> Made:
        from diffusers import StableDiffusionPipeline
        from diffusers.training_utils import _collate_lora_metadata
        from diffusers.utils import convert_state_dict_to_diffusers

        torch.manual_seed(0)
        parts = {"unet": unet} | ({"text_encoder": text} if text else {})
        for part, options in parts.items():
            getattr(base, part).add_adapter(options)
            disturb(getattr(base, part))
        layers = {
            f"{part}_lora_layers": convert_state_dict_to_diffusers(
                get_peft_model_state_dict(getattr(base, part))
            )
            for part in parts
        }
        metadata = _collate_lora_metadata({part: getattr(base, part) for part in parts})
        StableDiffusionPipeline.save_lora_weights(
            folder, **layers, **(metadata if header else {}), safe_serialization=True
        )
        return Made(folder, merged(base), {})

    return make


def merged(base: Any) -> dict[str, torch.Tensor]:
    """The weights with every adapter merged by peft."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in (base.unet, base.text_encoder):
        for name, layer in list(module.named_modules()):
            if isinstance(layer, BaseTunerLayer):
                layer.merge()
                module.set_submodule(name, layer.get_base_layer())
    return weights(base)


def custom_diffusion(base: Any, folder: Path) -> Made:
    """K and V of cross-attention as diffusers' trainer saves them."""
    from diffusers.models.attention_processor import CustomDiffusionAttnProcessor
    from safetensors.torch import save_file

    tensors = {}
    generator = torch.Generator().manual_seed(3)
    for name, module in base.unet.named_modules():
        if not name.endswith("attn2"):
            tensors |= {f"{name}.processor": torch.zeros(0)} if name.endswith("attn1") else {}
            continue
        width, text = module.to_k.in_features, base.unet.config.cross_attention_dim
        processor = CustomDiffusionAttnProcessor(
            train_kv=True, train_q_out=False, hidden_size=module.to_k.out_features,
            cross_attention_dim=text,
        )  # fmt: skip
        assert width == text
        for leaf in ("to_k", "to_v"):
            value = getattr(module, leaf).weight.detach()
            value += 0.05 * torch.randn(value.shape, generator=generator)
            getattr(processor, f"{leaf}_custom_diffusion").weight.data = value.clone()
        tensors |= {f"{name}.processor.{k}": v for k, v in processor.state_dict().items()}
    save_file(tensors, folder / "pytorch_custom_diffusion_weights.safetensors")
    return made(folder, base)


PATTERNS = {"rank_pattern": {"^mid_block.*to_k": 2}, "alpha_pattern": {"to_v": 3}}
CASES = [
    Case("peft", "LoRA", of_unet(config()), REAL),
    Case("peft", "LoRA, rsLoRA", of_unet(config(use_rslora=True)), REAL),
    Case("peft", "LoRA, patterns of ranks and alphas", of_unet(config(**PATTERNS)), REAL),
    Case(
        "peft",
        "LoRA of attention, feed-forward, projections, convolutions and the text encoder",
        both_parts,
        REAL,
    ),
    Case("peft", "LoRA, init gaussian", of_unet(config(init_lora_weights="gaussian")), REAL),
    Case("peft", "LoRA, init orthogonal", of_unet(config(init_lora_weights="orthogonal")), REAL),
    Case("peft", "LoRA, init mica", of_unet(config(init_lora_weights="mica")), REAL),
    Case("peft", "PiSSA", of_unet(config(init_lora_weights="pissa")), REAL),
    Case(
        "peft",
        "PiSSA, rsLoRA, patterns",
        of_unet(config(init_lora_weights="pissa", use_rslora=True, **PATTERNS)),
        REAL,
    ),
    Case("peft", "PiSSA, DoRA", of_unet(config(init_lora_weights="pissa", use_dora=True)), REAL),
    Case("peft", "PiSSA made a LoRA by peft", converted, REAL),
    Case("peft", "OLoRA", of_unet(config(init_lora_weights="olora")), REAL),
    Case(
        "peft",
        "PiSSA of a higher rank than the layers have",
        of_unet(config(init_lora_weights="pissa", r=64)),
        REAL,
    ),
    Case(
        "peft",
        "OLoRA of a higher rank than the layers have, rsLoRA",
        of_unet(config(init_lora_weights="olora", r=64, use_rslora=True)),
        REAL,
    ),
    Case(
        "peft",
        "PiSSA by a randomised SVD (pissa_niter_4)",
        of_unet(config(init_lora_weights="pissa_niter_4")),
        REAL,
        "drawn at random.*path_initial_model_for_weight_conversion",
    ),
    Case(
        "peft",
        "LoRA, a start that is not known here",
        with_field("init_lora_weights", "start_of_tomorrow"),
        RENAMED,
        "init_lora_weights=start_of_tomorrow, a start that is not known here; it may",
    ),
    Case(
        "peft",
        "CorDA",
        with_field("init_lora_weights", "corda"),
        RENAMED,
        "init_lora_weights=corda.*inputs of its own data",
    ),
    Case(
        "peft",
        "LoRA-GA",
        with_field("init_lora_weights", "lora_ga"),
        RENAMED,
        "gradients of its own data",
    ),
    Case(
        "peft",
        "LoftQ",
        with_field("init_lora_weights", "loftq"),
        RENAMED,
        "quantised for it.*merge_and_unload",
    ),
    Case("peft", "DoRA", of_unet(config(use_dora=True)), REAL),
    Case("peft", "LoHa", of_unet(LoHaConfig(r=4, alpha=6, target_modules=WIDE), "hada_"), REAL),
    Case(
        "peft",
        "LoHa, effective convolutions, patterns of ranks",
        of_unet(
            LoHaConfig(
                r=4,
                alpha=6,
                target_modules=WIDE,
                use_effective_conv2d=True,
                rank_pattern={"conv1": 2},
            ),
            "hada_",
        ),
        REAL,
    ),
    Case("peft", "LoKr", of_unet(LoKrConfig(r=2, alpha=3, target_modules=WIDE), "lokr_"), REAL),
    Case(
        "peft",
        "LoKr, both factors decomposed, factor 4",
        of_unet(
            LoKrConfig(
                r=1, alpha=3, decompose_both=True, decompose_factor=4, target_modules=ATTENTION
            ),
            "lokr_",
        ),
        REAL,
    ),
    Case(
        "peft",
        "LoKr of full factors",
        of_unet(LoKrConfig(r=64, alpha=16, target_modules=ATTENTION), "lokr_"),
        REAL,
    ),
    Case(
        "peft",
        "OFT",
        of_unet(OFTConfig(oft_block_size=4, target_modules=ATTENTION), "oft_"),
        REAL,
        "peft_type is OFT",
    ),
    Case(
        "peft",
        "(IA)^3",
        of_unet(IA3Config(target_modules=ATTENTION, feedforward_modules=[]), "ia3_"),
        REAL,
        "peft_type is IA3",
    ),
    Case(
        "peft",
        "LoRA with biases (bias=lora_only)",
        of_unet(config(bias="lora_only")),
        REAL,
        "a trained bias",
    ),
    Case(
        "peft",
        "LoRA with biases of B (lora_bias)",
        of_unet(config(lora_bias=True, target_modules=["to_out.0"])),
        REAL,
        "a trained bias",
    ),
    Case(
        "peft",
        "LoRA with a whole layer beside it",
        of_unet(config(modules_to_save=["conv_out"])),
        REAL,
        "conv_out",
    ),
    Case("diffusers", "LoRA, header", diffusers(config()), "diffusers"),
    Case(
        "diffusers",
        "LoRA, no header, alpha = rank",
        diffusers(config(lora_alpha=4), header=False),
        "diffusers",
    ),
    Case(
        "diffusers",
        "LoRA of U-Net and text encoder with its feed-forward",
        diffusers(config(), config(target_modules=TEXT)),
        "diffusers",
    ),
    Case(
        "diffusers",
        "LoRA, patterns of ranks and alphas",
        diffusers(config(**PATTERNS)),
        "diffusers",
    ),
    Case(
        "diffusers",
        "LoRA of feed-forward, projections, convolutions",
        diffusers(config(target_modules=WIDE)),
        "diffusers",
    ),
    Case(
        "diffusers",
        "DoRA of U-Net and text encoder",
        diffusers(config(use_dora=True), config(target_modules=TEXT, use_dora=True)),
        "diffusers",
    ),
    Case("diffusers", "PiSSA", diffusers(config(init_lora_weights="pissa")), "diffusers"),
    Case("diffusers", "OLoRA", diffusers(config(init_lora_weights="olora")), "diffusers"),
    Case("diffusers", "Custom Diffusion", custom_diffusion, "diffusers"),
]
