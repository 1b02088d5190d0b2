"""Every denoiser class of the pinned diffusers as a tiny case, whose stock forward runs on the CPU.

`CASES` maps the name of a class to its `Case`; `make` builds one, `outputs` runs it. `expected`
asks diffusers itself which classes there are, so that a new release shows what is missing here.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from attention import (
    denoiser_corpus_image,
    denoiser_corpus_other,
    denoiser_corpus_unet,
    denoiser_corpus_video,
)
from attention.denoiser_case import Case
from torch import Tensor, nn

CASES: dict[str, Case] = {
    each.name: each
    for table in (
        denoiser_corpus_unet,
        denoiser_corpus_image,
        denoiser_corpus_video,
        denoiser_corpus_other,
    )
    for each in table.CASES
}

# What a module is called that computes values, perhaps with queries and keys: to_v, add_v_proj,
# img_attn_qkv, to_kv, value.
VALUE = re.compile(r"(^|_)(v|kv|qkv|value)(_|$)")


def make(case: Case) -> nn.Module:
    """The tiny denoiser, in eval mode, every parameter drawn anew from a seeded normal
    distribution, so that nothing initialised as zero hides what attention does."""
    import diffusers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # for what is drawn and is no parameter
        model: nn.Module = getattr(diffusers, case.name)(**case.config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.float().named_parameters():
            _draw(name.rsplit(".", 1)[-1], parameter, generator)
    return model.eval()


def _draw(kind: str, parameter: Tensor, generator: torch.Generator) -> None:
    """Matrices and kernels keep the size of what they get; scales lie around 1, the rest around
    0."""
    drawn = torch.randn(parameter.shape, generator=generator)
    if not parameter.numel():
        return
    if parameter.ndim > 1 and kind == "weight":
        drawn /= parameter[0].numel() ** 0.5
    elif kind == "weight":
        drawn = 1 + 0.2 * drawn
    else:
        drawn *= 0.3
    parameter.copy_(drawn)


def outputs(model: nn.Module, case: Case) -> list[Tensor]:
    """All tensors of numbers that the stock forward returns, in order."""
    takes = inspect.signature(model.forward).parameters
    given = case.inputs() | ({"return_dict": False} if "return_dict" in takes else {})
    with torch.no_grad():
        return _tensors(model(**given))


def _tensors(found: Any) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found] if found.is_floating_point() else []
    if isinstance(found, dict):
        found = found.values()
    if isinstance(found, (list, tuple)) or hasattr(found, "__iter__"):
        return [each for part in found for each in _tensors(part)]
    return []


def values(model: nn.Module) -> list[str]:
    """The names of the modules that compute the values of an attention layer."""
    return [
        name
        for name, module in model.named_modules()
        if VALUE.search(name.rsplit(".", 1)[-1])
        and getattr(getattr(module, "weight", None), "ndim", 0) > 1
    ]


def influences(model: nn.Module, case: Case) -> dict[str, float]:
    """How much halving every second channel of what a module of `values` computes changes what the
    denoiser returns, as a part of its size: the largest of its tensors. (Halving all channels would
    be undone where a norm follows.)"""
    before = outputs(model, case)
    found = {}
    for name in values(model):
        weight = model.get_submodule(name).get_parameter("weight").detach()
        kept = weight.clone()
        weight[::2] *= 0.5
        after = outputs(model, case)
        weight.copy_(kept)
        found[name] = max(
            float((one - other).norm() / one.norm())
            for one, other in zip(before, after, strict=True)
        )
    return found


# Where diffusers keeps its models that are no denoisers. `autoencoders` has one decoder that
# denoises pixels, `LTX2VideoDiffusionDecoderModel`; it belongs to an autoencoder.
FOLDERS = ("adapter", "autoencoders", "condition_embedders", "controlnets", "latent_upscaler")
NO_DENOISERS = {
    "AceStepAudioTokenDetokenizer": "decodes tokens of sound",
    "AceStepAudioTokenizer": "encodes sound",
    "AceStepConditionEncoder": "encodes text, lyrics and sound",
    "AudioLDM2ProjectionModel": "projects texts",
    "CLIPImageProjection": "projects images",
    "Ideogram4PromptEnhancerHead": "writes prompts",
    "MiniMaxMusic3RVQDepthDecoder": "writes tokens of sound one after another",
    "MotionAdapter": "holds the layers that it lends to a U-Net, has no forward",
    "ReduxImageEncoder": "encodes images",
    "StableAudio3DurationEmbedder": "embeds durations",
    "StableAudioProjectionModel": "projects texts and durations",
    "UniDiffuserTextDecoder": "writes captions",
    "VQModel": "an autoencoder",
}
DENOISERS_ELSEWHERE = {"UNetControlNetXSModel"}  # a U-Net together with its ControlNet


def expected() -> list[str]:
    """The denoiser classes that diffusers exports: all its models but those above. Neither are
    those of old pipelines that it does not export, such as `UNetFlatConditionModel`."""
    import diffusers
    from diffusers import ModelMixin

    found = []
    for name in dir(diffusers):
        if name.endswith(("Pipeline", "Scheduler", "Blocks", "Output")):
            continue  # no models, and slow to import
        kind = getattr(diffusers, name)
        if not (inspect.isclass(kind) and issubclass(kind, ModelMixin)) or kind is ModelMixin:
            continue
        elsewhere = any(kind.__module__.startswith(f"diffusers.models.{each}") for each in FOLDERS)
        if name in DENOISERS_ELSEWHERE or not (elsewhere or name in NO_DENOISERS):
            found.append(name)
    return sorted(found)
