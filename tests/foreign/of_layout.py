"""Files of tools that are not installed here, written by their documented layout; the weights to
compare with are W + alpha / r B A, computed beside it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from foreign.case import Case, Made, fresh, weights
from safetensors.torch import save_file
from torch import Tensor, nn

LAYOUT = "its layout, the equation"
Name = Callable[[str], str]
Kinds = Callable[[str, Tensor, Tensor, float], dict[str, Tensor]]


def kohya_kinds(key: str, down: Tensor, up: Tensor, alpha: float) -> dict[str, Tensor]:
    ends = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(alpha)}
    return {f"{key}.{end}": value for end, value in ends.items()}


def folded_kinds(key: str, down: Tensor, up: Tensor, alpha: float) -> dict[str, Tensor]:
    return {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up * (alpha / len(down))}


def underscored(prefix: str) -> Name:
    return lambda name: prefix + name.replace(".", "_")


def dotted(prefix: str) -> Name:
    return lambda name: prefix + name


def ldm(base: Any) -> dict[str, str]:
    from trainer.export.layer_names import ldm as names

    found: dict[str, str] = names(base.unet)
    return found


def is_in_transformer(name: str) -> bool:
    """The layers that sd-scripts adapts by default."""
    return ".attentions." in name


def is_attention(name: str) -> bool:
    return re.search(r"attn\d\.to_", name) is not None


def everywhere(name: str) -> bool:
    return ".attentions." in name or ".resnets." in name or "samplers." in name


def in_clip(name: str) -> bool:
    return re.search(r"self_attn\.\w+_proj$|mlp\.fc\d$", name) is not None


class Writer:
    """Adds a random low-rank pair to layers of a model, and writes it under any names."""

    def __init__(self, base: Any, kinds: Kinds = kohya_kinds) -> None:
        self.base, self.kinds = base, kinds
        self.tensors: dict[str, Tensor] = {}
        self.generator = torch.Generator().manual_seed(3)

    def random(self, *shape: int) -> Tensor:
        return 0.1 * torch.randn(shape, generator=self.generator)

    @torch.no_grad()
    def add(
        self,
        part: str,
        wanted: Callable[[str], bool],
        name_of: Callable[[str], str | None],
        *,
        rank: Callable[[str], int] = lambda name: 4,
        alpha: Callable[[str], float] = lambda name: 2.0,
        shaped: Callable[[Tensor], Tensor] = lambda value: value,
    ) -> Writer:
        for name, layer in list(getattr(self.base, part).named_modules()):
            other = (
                name_of(name) if isinstance(layer, nn.Linear | nn.Conv2d) and wanted(name) else None
            )
            if other is None:
                continue
            weight, r = layer.weight, rank(name)
            down, up = self.random(r, *weight.shape[1:]), self.random(len(weight), r)
            weight += (alpha(name) / r) * (up @ down.flatten(1)).view_as(weight)
            up = up.view(*up.shape, *[1] * (weight.ndim - 2))
            self.tensors |= self.kinds(other, shaped(down), shaped(up), alpha(name))
        return self

    def save(self, folder: Path, words: Mapping[str, Tensor] | None = None) -> Made:
        assert self.tensors
        save_file({k: v.contiguous() for k, v in self.tensors.items()}, folder / "lora.safetensors")
        return Made(folder / "lora.safetensors", weights(self.base), words or {})


def unet(
    wanted: Callable[[str], bool], name_of: Name, kinds: Kinds = kohya_kinds, **options: Any
) -> Callable[[Any, Path], Made]:
    return lambda base, folder: (
        Writer(base, kinds).add("unet", wanted, name_of, **options).save(folder)
    )


def old_blocks(name_of: Name, kinds: Kinds = kohya_kinds) -> Callable[[Any, Path], Made]:
    """Under the block names of latent diffusion."""

    def make(base: Any, folder: Path) -> Made:
        names = ldm(base)
        other = lambda name: name_of(names[name]) if name in names else None  # noqa: E731
        return Writer(base, kinds).add("unet", everywhere, other).save(folder)

    return make


def with_text(
    in_unet: Name, in_text: Name, kinds: Kinds = kohya_kinds
) -> Callable[[Any, Path], Made]:
    def make(base: Any, folder: Path) -> Made:
        writer = Writer(base, kinds).add("unet", is_in_transformer, in_unet)
        return writer.add("text_encoder", in_clip, in_text).save(folder)

    return make


def clip(prefix: str, join: str = "_") -> Name:
    """The names of CLIP's layers before transformers 5."""
    return lambda name: prefix + f"text_model.{name.removeprefix('text_model.')}".replace(".", join)


def other_shape(value: Tensor) -> Tensor:
    """A matrix as a 1x1 convolution's, and a 1x1 convolution's as a matrix."""
    if value.ndim == 2:
        return value[:, :, None, None]
    return value.flatten(1) if value.shape[2:] == (1, 1) else value


def bundled(base: Any, folder: Path) -> Made:
    writer = Writer(base).add("unet", is_in_transformer, underscored("lora_unet_"))
    width = base.text_encoder.config.hidden_size
    rows, one = writer.random(2, width), writer.random(1, width)
    writer.tensors |= {"bundle_emb.<dog>.emb_params": rows, "bundle_emb.v1.string_to_param.*": one}
    return writer.save(folder, {"<dog>": rows[0], "<dog>_1": rows[1], "<v1>": one[0]})


def beside(base: Any, folder: Path) -> Made:
    """As this project's own export leaves it: the words in `embeddings/` beside the file."""
    writer = Writer(base).add("unet", is_in_transformer, underscored("lora_unet_"))
    row = writer.random(base.text_encoder.config.hidden_size)
    (folder / "embeddings").mkdir()
    save_file({"<v1>": row}, folder / "embeddings" / "v1.safetensors")
    return writer.save(folder, {"<v1>": row})


def embedding(
    tensors: Callable[[Tensor], dict[str, Tensor]], stem: str = "cat", word: str = "<cat>"
) -> Callable[[Any, Path], Made]:
    def make(base: Any, folder: Path) -> Made:
        rows = Writer(base).random(2, base.text_encoder.config.hidden_size)
        path = folder / f"{stem}.safetensors"
        save_file(tensors(rows), path)
        words = {word: rows[0], f"{word}_1": rows[1]}
        return Made(path, weights(base), words)

    return make


def fused(kinds: str) -> Callable[[Any, Path], Made]:
    """PixArt by the names of its first code, where q, k and v are one matrix."""
    groups = {"attn.qkv": ("attn1", "qkv"), "cross_attn.kv_linear": ("attn2", "kv")}
    single = {
        "attn.proj": "attn1.to_out.0",
        "cross_attn.q_linear": "attn2.to_q",
        "mlp.fc1": "ff.net.0.proj",
    }

    @torch.no_grad()
    def make(base: Any, folder: Path) -> Made:
        writer = Writer(base, folded_kinds if kinds == "lora" else kohya_kinds)
        for number, block in enumerate(base.transformer.transformer_blocks):
            for name, (site, roles) in groups.items():
                layers = [block.get_submodule(f"{site}.to_{role}") for role in roles]
                _fused(
                    writer, layers, f"diffusion_model.blocks.{number}.{name}", full=kinds == "diff"
                )
            for name, path in single.items() if kinds == "lora" else ():
                key = f"diffusion_model.blocks.{number}.{name}"
                _fused(writer, [block.get_submodule(path)], key, full=False)
        return writer.save(folder)

    return make


def _fused(writer: Writer, layers: Iterable[Any], key: str, *, full: bool) -> None:
    layers = list(layers)
    rows, width = sum(len(layer.weight) for layer in layers), layers[0].in_features
    down, up = writer.random(4, width), writer.random(rows, 4)
    whole = up @ down if full else 0.5 * up @ down
    for layer, part in zip(
        layers, whole.split([len(layer.weight) for layer in layers]), strict=True
    ):
        layer.weight += part
    writer.tensors |= {f"{key}.diff": whole} if full else writer.kinds(key, down, up, 2.0)


def of_open_clip(
    layer: Name, kinds: Kinds = kohya_kinds, *, attention: str = "attn.in_proj_weight"
) -> Callable[[Any, Path], Made]:
    """A text encoder by OpenCLIP's names, q, k and v in one matrix, and one block more than the
    encoder has, as of Stable Diffusion 2.x, which does not run its last."""
    single = {"attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    if attention == "attn":  # as peft has it
        single["attn.base_layer.out_proj"] = single.pop("attn.out_proj")

    @torch.no_grad()
    def make(base: Any, folder: Path) -> Made:
        writer, full = Writer(base, kinds), kinds is full_kinds
        blocks = list(getattr(base.text_encoder, "text_model", base.text_encoder).encoder.layers)
        for number, block in enumerate([*blocks, fresh(blocks[-1])]):
            roles = [block.self_attn.get_submodule(f"{role}_proj") for role in "qkv"]
            name = f"resblocks.{number}.{attention}"
            _fused(writer, roles, layer(name), full=full)
            if full:
                bias = writer.random(3 * len(roles[0].bias))
                for own, part in zip(roles, bias.chunk(3), strict=True):
                    own.bias += part
                writer.tensors[f"{layer(name).replace('weight', 'bias')}.diff"] = bias
            for other, path in single.items():
                key = layer(f"resblocks.{number}.{other}")
                _fused(writer, [block.get_submodule(path)], key, full=full)
        return writer.save(folder)

    return make


def full_kinds(key: str, down: Tensor, up: Tensor, alpha: float) -> dict[str, Tensor]:
    return {f"{key}.diff": alpha / len(down) * up @ down}


def plus(key: str, value: Tensor) -> Callable[[Any, Path], Made]:
    """A good file with one more tensor."""

    def make(base: Any, folder: Path) -> Made:
        writer = Writer(base).add("unet", is_attention, underscored("lora_unet_"))
        writer.tensors[key.format(next(iter(writer.tensors)).partition(".")[0])] = value
        return writer.save(folder)

    return make


def ranks(name: str) -> int:
    return 2 if "mid_block" in name else 4


def alphas(name: str) -> float:
    return 1.0 if "to_k" in name else 3.0


UNET, TE = underscored("lora_unet_"), clip("lora_te_")
PEFT = "unet.base_model.model."
CASES = [
    Case("sd-scripts", "LoRA of U-Net and text encoder, its default", with_text(UNET, TE), LAYOUT),
    Case(
        "sd-scripts",
        "the same, trained with transformers 5",
        with_text(UNET, underscored("lora_te_")),
        LAYOUT,
    ),
    Case("sd-scripts", "LoRA of convolutions too (C3Lier)", unet(everywhere, UNET), LAYOUT),
    Case(
        "sd-scripts",
        "block dims and alphas",
        unet(is_in_transformer, UNET, rank=ranks, alpha=alphas),
        LAYOUT,
    ),
    Case("sd-scripts", "names of latent diffusion (as of SDXL)", old_blocks(UNET), LAYOUT),
    Case(
        "sd-scripts",
        "4-D factors on linear layers, 2-D on 1x1 convolutions (its merge)",
        unet(is_in_transformer, UNET, shaped=other_shape),
        LAYOUT,
    ),
    Case(
        "OneTrainer",
        "kohya form, U-Net and text encoder",
        with_text(UNET, clip("lora_te1_")),
        LAYOUT,
    ),
    Case(
        "OneTrainer",
        "diffusers form with alpha",
        unet(is_in_transformer, dotted("unet."), kohya_kinds),
        LAYOUT,
    ),
    Case(
        "OneTrainer",
        "names of latent diffusion, dotted",
        old_blocks(dotted("lora_unet."), kohya_kinds),
        LAYOUT,
    ),
    Case("OneTrainer", "LoRA with bundled embeddings", bundled, LAYOUT),
    Case(
        "OneTrainer",
        "bundled embedding with an output vector",
        plus("bundle_emb.<v1>.emb_params_out", torch.ones(1, 128)),
        LAYOUT,
        "is added to the output of the text encoder",
    ),
    Case(
        "OneTrainer",
        "DoRA, norms of inputs (its default)",
        plus("{}.dora_scale", torch.ones(1, 16)),
        LAYOUT,
        "DoRA over inputs",
    ),
    Case(
        "ComfyUI",
        "diffusion_model., names of latent diffusion",
        old_blocks(dotted("diffusion_model."), folded_kinds),
        LAYOUT,
    ),
    Case(
        "ComfyUI",
        "diffusion_model., names of diffusers",
        unet(everywhere, dotted("diffusion_model."), folded_kinds),
        LAYOUT,
    ),
    Case(
        "ComfyUI",
        "text_encoders.clip_l.transformer.",
        with_text(
            dotted("diffusion_model."), clip("text_encoders.clip_l.transformer.", "."), folded_kinds
        ),
        LAYOUT,
    ),
    Case("ComfyUI", "bare names of latent diffusion", old_blocks(dotted(""), folded_kinds), LAYOUT),
    Case("ComfyUI", "PixArt, fused qkv and kv_linear, LoRA", fused("lora"), LAYOUT, backbone="dit"),
    Case(
        "ComfyUI", "PixArt, fused qkv and kv_linear, .diff", fused("diff"), LAYOUT, backbone="dit"
    ),
    Case(
        "ComfyUI",
        "a whole weight (.set_weight)",
        plus("{}.set_weight", torch.ones(1)),
        LAYOUT,
        "a whole layer saved beside",
    ),
    Case(
        "SimpleTuner",
        "unet.base_model.model.",
        unet(is_in_transformer, dotted(PEFT), folded_kinds),
        LAYOUT,
    ),
    Case(
        "ai-toolkit",
        "names of diffusers with alpha, lora_A",
        unet(is_in_transformer, dotted("diffusion_model."), folded_kinds),
        LAYOUT,
    ),
    Case(
        "ai-toolkit",
        "DoRA (.magnitude)",
        plus("{}.magnitude", torch.ones(16)),
        LAYOUT,
        "DoRA in ai-toolkit's own spelling",
    ),
    Case(
        "old diffusers",
        "processors (attn1.processor.to_q_lora)",
        unet(
            is_attention,
            lambda n: "unet." + re.sub(r"\.to_(\w+)(?:\.0)?$", r".processor.to_\1_lora", n),
            lambda k, d, u, a: {f"{k}.down.weight": d, f"{k}.up.weight": u * (a / len(d))},
        ),
        LAYOUT,
    ),
    Case(
        "A1111",
        "embedding of two vectors (emb_params)",
        embedding(lambda rows: {"emb_params": rows}),
        LAYOUT,
    ),
    Case(
        "A1111",
        "embedding whose file name has spaces",
        embedding(lambda rows: {"emb_params": rows}, "my red cat", "<my-red-cat>"),
        LAYOUT,
    ),
    Case(
        "A1111",
        "embedding whose file name has brackets",
        embedding(lambda rows: {"emb_params": rows}, "<cat>"),
        LAYOUT,
    ),
    Case(
        "ComfyUI",
        "embedding of two vectors (clip_l)",
        embedding(lambda rows: {"clip_l": rows}),
        LAYOUT,
    ),
    Case(
        "ComfyUI",
        "embedding of SDXL (clip_l and clip_g)",
        embedding(lambda rows: {"clip_l": rows, "clip_g": rows.repeat(1, 2)}),
        LAYOUT,
        "text encoder number 2",
    ),
    Case(
        "Stable Diffusion 2.x, first code",
        "LoRA of OpenCLIP's resblocks, fused in_proj_weight",
        of_open_clip(dotted("cond_stage_model.model.transformer.")),
        LAYOUT,
    ),
    Case(
        "Stable Diffusion 2.x, first code",
        "full matrices and biases of the same (.diff)",
        of_open_clip(dotted("cond_stage_model.model.transformer."), full_kinds),
        LAYOUT,
    ),
    Case(
        "A1111",
        "LoRA of OpenCLIP's resblocks, names with underscores",
        of_open_clip(underscored("lora_te_model_transformer_"), attention="attn.in_proj"),
        LAYOUT,
    ),
    Case(
        "peft",
        "LoRA of OpenCLIP's own attention (MultiheadAttention)",
        of_open_clip(dotted("text_encoder.transformer."), folded_kinds, attention="attn"),
        LAYOUT,
    ),
    Case("this project", "kohya file beside its embeddings/", beside, LAYOUT),
]
