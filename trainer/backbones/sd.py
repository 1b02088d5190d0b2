"""Stable Diffusion 1.x and 2.x, and every pipeline of the same parts: U-Net, one CLIP text encoder,
VAE, scheduler."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from trainer.attention.processor import Host
from trainer.attention.sites import Site

if TYPE_CHECKING:
    from trainer.schema import BackboneSpec

SCHEDULER = "scheduler_config.json"
TARGETS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


class StableDiffusion(nn.Module):
    """unet(x_t, t, text) with text (b, 77, d) from CLIP, on latents (b, 4, H/8, W/8) of a VAE.

    Parameter names start with `unet.`, `text_encoder.` or `vae.`, as adapters store them.
    """

    denoiser_name = "unet"

    def __init__(
        self,
        name: str,
        folder: Path,
        unet: Any,
        text_encoder: Any,
        tokenizer: Any,
        vae: Any,
        scheduler: Any,
    ) -> None:
        super().__init__()
        self.name, self.folder = name, folder
        self.unet: Any = unet
        self.text_encoder: Any = text_encoder
        self.vae: Any = vae
        self.tokenizer, self.scheduler_config = tokenizer, dict(scheduler.config)
        self.alphas_cumprod: Tensor = scheduler.alphas_cumprod.clone()
        self.target: str = TARGETS[scheduler.config.prediction_type]
        self._identity = {
            "family": "sd",
            "name": name,
            "unet": _shapes(unet),
            "text_encoder": _shapes(text_encoder),
            "target": self.target,
        }

    @property
    def denoiser(self) -> nn.Module:
        return self.unet

    @property
    def text_encoders(self) -> dict[str, nn.Module]:
        return {"text_encoder": self.text_encoder}

    @property
    def tokenizers(self) -> dict[str, Any]:
        return {"text_encoder": self.tokenizer}

    @cached_property
    def host(self) -> Host:
        return Host.attach(self.unet)

    @property
    def sites(self) -> list[Site]:
        return self.host.sites

    @property
    def divisor(self) -> int:
        """Pixels along an edge per latent."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def resolution(self) -> int:
        """The side in pixels the backbone was trained at."""
        return int(self.unet.config.sample_size) * self.divisor

    @property
    def latent_channels(self) -> int:
        return int(self.unet.config.in_channels)

    @property
    def text_width(self) -> int:
        return int(self.text_encoder.config.hidden_size)

    def scheduler(self) -> Any:
        return DDIMScheduler.from_config(self.scheduler_config)

    @torch.no_grad()
    def moments(self, pixels: Tensor) -> Tensor:
        """Pixels (b, 3, H, W) in [-1, 1] to the posterior's mean and log-variance (b, 2c, h, w)."""
        parameters: Tensor = self.vae.encode(pixels).latent_dist.parameters
        return parameters

    def latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        """A draw (b, c, h, w) from the posterior, scaled to what the U-Net was trained on."""
        mean, log_variance = moments.chunk(2, dim=1)
        drawn = mean + (0.5 * log_variance.clamp(-30, 20)).exp() * noise
        return drawn * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (b, c, h, w) to pixels (b, 3, H, W) in [-1, 1]."""
        pixels: Tensor = self.vae.decode(latents / self.vae.config.scaling_factor).sample
        return pixels.clamp(-1, 1)

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Prompts to what `predict` takes: encoder_hidden_states (b, tokens, d)."""
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        ids = tokens.input_ids.to(self.text_encoder.device)
        return {"encoder_hidden_states": self.text_encoder(ids).last_hidden_state}

    def predict(self, x_t: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        """The network's output (b, c, h, w) at x_t (b, c, h, w) and timesteps t (b,)."""
        output: Tensor = self.unet(x_t, t, **condition).sample
        return output

    def identity(self) -> dict[str, str]:
        """What an adapter was trained on: the family and the shapes of the parts, as they were
        before any edit."""
        return dict(self._identity)

    def vae_fingerprint(self) -> str:
        """Changes with any weight of the VAE; keys cached latents."""
        return _contents(self.vae)

    def fingerprint(self) -> str:
        """Changes with any weight; keys what the backbone has painted."""
        return hashlib.sha256(
            " ".join(map(_contents, (self.unet, self.text_encoder, self.vae))).encode()
        ).hexdigest()[:16]

    def enable_gradient_checkpointing(self) -> None:
        self.unet.enable_gradient_checkpointing()
        if any(parameter.requires_grad for parameter in self.text_encoder.parameters()):
            self.text_encoder.gradient_checkpointing_enable()

    def compile_blocks(self) -> None:
        """torch.compile for each block of the U-Net by itself: hooks on the whole stay Python.

        Static shapes: blocks share their code, and inductor fails on what they have in common.
        """
        for block in (*self.unet.down_blocks, self.unet.mid_block, *self.unet.up_blocks):
            block.compile(dynamic=False)

    def pipeline(self) -> Any:
        """The parts as a stock pipeline; they are shared, not copied."""
        return StableDiffusionPipeline(
            vae=self.vae, text_encoder=self.text_encoder, tokenizer=self.tokenizer, unet=self.unet,
            scheduler=self.scheduler(), safety_checker=None, feature_extractor=None,
            requires_safety_checker=False,
        )  # fmt: skip


def _shapes(module: nn.Module) -> str:
    """A short hash of all parameter shapes; names are left out, since transformers renames them
    between versions."""
    shapes = sorted(str(tuple(parameter.shape)) for parameter in module.parameters())
    return hashlib.sha256(" ".join(shapes).encode()).hexdigest()[:16]


def _contents(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for tensor in module.state_dict().values():
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def load(spec: BackboneSpec, name: str) -> StableDiffusion:
    """Loads the parts from a folder in diffusers layout, or from the hub at a pinned revision.

    Raises:
        ValueError: the folder holds another pipeline, a part is missing, or its weights are not
        safetensors.
    """
    folder = Path(spec.folder) if spec.folder else _download(spec, name)
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    if index.get("_class_name") != "StableDiffusionPipeline":
        raise ValueError(
            f"backbone {name}: {folder} is a {index.get('_class_name')}; this family loads "
            "StableDiffusionPipeline folders"
        )
    for part, file in (("tokenizer", "tokenizer_config.json"), ("scheduler", SCHEDULER)):
        if not (folder / part / file).is_file():
            raise ValueError(_missing(folder / part, file))
    parts = {
        part: _part(folder, part, kind, spec.scratch)
        for part, kind in (
            ("unet", UNet2DConditionModel),
            ("text_encoder", CLIPTextModel),
            ("vae", AutoencoderKL),
        )
    }
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    scheduler = _scheduler(folder / "scheduler" / SCHEDULER)
    return StableDiffusion(name, folder, tokenizer=tokenizer, scheduler=scheduler, **parts)


def _scheduler(path: Path) -> DDIMScheduler:
    """Any of diffusers' VP schedulers describes the same training path; sampling is DDIM.

    What another scheduler does not say is what its own class does, not DDIM's default: no clipping
    of latents, and a last step to the first alpha, as PNDM's.
    """
    config = json.loads(path.read_text(encoding="utf-8"))
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in TARGETS:
        raise ValueError(
            f"{path}: prediction_type is {prediction!r}; this family has {', '.join(TARGETS)}"
        )
    if config.get("_class_name") != DDIMScheduler.__name__:
        config = {"clip_sample": False, "set_alpha_to_one": False} | config
    own = inspect.signature(DDIMScheduler.__init__).parameters
    return DDIMScheduler(**{key: value for key, value in config.items() if key in own})


def _missing(where: Path, file: str) -> str:
    return f"{where}: {file} is missing; the folder is not a whole pipeline"


def _part(folder: Path, part: str, kind: Any, scratch: Iterable[str]) -> Any:
    where = folder / part
    if not (where / "config.json").is_file():
        raise ValueError(_missing(where, "config.json"))
    if part in scratch:
        config = json.loads((where / "config.json").read_text(encoding="utf-8"))
        return kind.from_config(config)
    if not list(where.glob("*.safetensors")):
        found = ", ".join(
            path.name for path in where.glob("*") if path.suffix in (".bin", ".pt", ".ckpt")
        )
        raise ValueError(
            f"{where}: no safetensors "
            f"file{f' (found {found}; pickles are never loaded)' if found else ''}; "
            "save the pipeline with safe_serialization=True"
        )
    dtype = {"dtype": torch.float32} if kind is CLIPTextModel else {"torch_dtype": torch.float32}
    try:
        model, notes = kind.from_pretrained(
            where, use_safetensors=True, local_files_only=True, output_loading_info=True, **dtype
        )
    except SafetensorError as error:
        raise ValueError(f"{where}: its safetensors file is damaged: {error}") from None
    if missing := sorted(notes["missing_keys"]):  # they would stay random, and nothing would say so
        raise ValueError(
            f"{where}: the weights lack {', '.join(missing[:3])}, {len(missing)} in all; they are "
            "not of this config.json"
        )
    return model


def _download(spec: BackboneSpec, name: str) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["model_index.json", "*/*.json", "*/merges.txt", "*/vocab.json"]
    patterns += [f"{part}/*.safetensors" for part in ("unet", "text_encoder", "vae")]
    try:
        return Path(
            snapshot_download(
                spec.hub,  # type: ignore[arg-type]
                revision=spec.revision,
                allow_patterns=patterns,
                ignore_patterns=["*.fp16.*", "*.non_ema.*", "safety_checker/*"],
            )
        )
    except Exception as error:  # the hub raises a dozen kinds; each means: not to be had from here
        raise ValueError(
            f"backbone {name}: {spec.hub} could not be fetched ({type(error).__name__}); "
            "download the folder on a "
            f"machine with access and pass backbone=<folder>"
        ) from error
