"""What a recipe may say: one frozen record a section, each key with its type, range and default."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    field_validator,
    model_validator,
)

from trainer.backbones.spec import BackboneSpec
from trainer.common.strict import Section
from trainer.data.source import Source
from trainer.methods.method import Method


class RecipeError(ValueError):
    """A mistake in a recipe or an override; the message names the full key and the mend."""


Decay = Annotated[float, Field(ge=0, lt=1)]
Seconds = Annotated[float, Field(ge=0)]


class ObjectiveSpec(Section):
    """What the network is asked for. `target` and `path` default to what the backbone was trained
    with."""

    target: Literal["eps", "v", "x0", "flow"] | None = None
    path: Literal["vp", "flow"] | None = None
    timesteps: Literal["uniform", "logit_normal"] = "uniform"
    logit_mean: float = 0.0
    logit_std: float = Field(1.0, gt=0)
    weighting: Literal["none", "min_snr", "sigma_sqrt", "cosmap"] = "none"
    min_snr_gamma: float = Field(5.0, gt=0)
    offset_noise: float = Field(0.0, ge=0)
    caption_dropout: float = Field(0.0, ge=0, le=1)


class OptimSpec(Section):
    """AdamW, a linear warm-up, then constant or cosine. `scale_lr` multiplies lr by the images per
    step; `lrs` names methods whose parameters take an lr of their own, 0 to stay as an earlier run
    left them; `adamw8bit` keeps the moments in 8 bits (bitsandbytes), `paged_adamw8bit` also lets
    them overflow from the GPU; `muon` moves the matrices in blocks with attention, at `muon_lr`,
    and AdamW all else: for training from nothing.
    """

    name: Literal["adamw", "adamw8bit", "paged_adamw8bit", "muon"] = "adamw"
    lr: float = Field(1e-4, gt=0)
    muon_lr: float | None = Field(None, gt=0, description="four times lr is a good start")
    scale_lr: bool = False
    lrs: dict[str, NonNegativeFloat] = Field(default_factory=dict)
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(1e-2, ge=0)
    warmup: int = Field(0, ge=0)
    schedule: Literal["constant", "cosine"] = "constant"
    final_lr: float = Field(
        0.0, ge=0, le=1, description="share of lr left at the end of the cosine"
    )
    clip: float | None = Field(1.0, gt=0)
    ema: float | None = Field(None, gt=0, lt=1)

    @model_validator(mode="after")
    def _muon_has_its_own_lr(self) -> OptimSpec:
        if self.muon_lr is not None and self.name != "muon":
            raise ValueError(f"muon_lr={self.muon_lr:g} is for name=muon, and name is {self.name}")
        return self

    @property
    def frozen(self) -> tuple[str, ...]:
        """Methods whose parameters do not train."""
        return tuple(method for method, lr in self.lrs.items() if lr == 0)


class RunSpec(Section):
    """How long, how much at once, on what. `batch_size` is global: it is split over devices x
    nodes."""

    steps: int = Field(1000, gt=0)
    batch_size: int = Field(4, gt=0)
    accumulate: int = Field(1, gt=0)
    seed: int = Field(0, ge=0, lt=2**63)
    resolution: int | None = Field(None, ge=16)
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$",
        description="auto takes a CUDA GPU, then Apple's, then the CPU; cuda:1 is the second GPU",
    )
    accelerator: Literal["auto", "cpu", "cuda"] | None = Field(
        None, description="the earlier name of run.device, still read"
    )
    devices: int = Field(1, gt=0)
    nodes: int = Field(1, gt=0)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="of frozen weights and of what is computed; what trains is always fp32. auto: "
        "as the backbone's weights were published, and fp32 on a CPU",
    )
    workers: int = Field(0, ge=0)
    gradient_checkpointing: bool = False
    channels_last: bool = False
    compile: bool = False
    cache_latents: bool = True
    validate_every: int = Field(200, ge=0)
    checkpoint_every: int = Field(500, ge=0, description="steps; 0 for none but at an early end")
    checkpoint_keep: int = Field(2, gt=0, description="checkpoints that stay, the newest")
    on_disk_full: Literal["stop", "continue"] = Field(
        "stop", description="what a checkpoint that cannot be written does to the run"
    )
    on_nonfinite: Literal["raise", "skip", "rollback"] = Field(
        "raise", description="what a loss or a gradient that is no number does to the run"
    )
    nonfinite_in_a_row: int = Field(3, gt=0, description="steps that skip or rollback leave out")
    nonfinite_total: int = Field(20, gt=0)
    timeouts: dict[Literal["data", "step", "validate", "save", "preview"], Seconds] = Field(
        default_factory=dict, description="after which a section counts as hung; 0 for never"
    )
    log_every: int = Field(10, gt=0)
    out: Path = Path("runs")
    id: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    start_from: Path | None = Field(
        None, description="an earlier adapter whose tensors this run goes on from"
    )

    @model_validator(mode="before")
    @classmethod
    def _earlier_name(cls, values: Any) -> Any:
        """Recipes and adapters made before `device` say `accelerator`."""
        if isinstance(values, dict) and (earlier := values.get("accelerator")) is not None:
            if values.get("device", earlier) != earlier:
                raise ValueError(
                    f"device={values['device']} and accelerator={earlier} name two devices; leave "
                    "accelerator out"
                )
            return {**values, "device": earlier}
        return values

    @model_validator(mode="after")
    def _one_numbered_device(self) -> RunSpec:
        if ":" in self.device and self.devices > 1:
            raise ValueError(
                f"device={self.device} is one GPU, and run.devices={self.devices}; give "
                "run.device=cuda for several"
            )
        return self

    @model_validator(mode="after")
    def _divides(self) -> RunSpec:
        if self.batch_size % (self.devices * self.nodes):
            ranks = self.devices * self.nodes
            raise ValueError(
                f"batch_size={self.batch_size} does not divide by run.devices x run.nodes = "
                f"{ranks}; give a multiple of {ranks}"
            )
        if self.on_nonfinite == "rollback" and not self.checkpoint_every:
            raise ValueError(
                "on_nonfinite=rollback goes back to a checkpoint; set run.checkpoint_every"
            )
        return self


class PreviewSpec(Section):
    """Pictures at fixed prompts and seeds while training, and the sampler they and `sample` use."""

    prompts: tuple[str, ...] = ()
    every: int = Field(100, ge=0)
    steps: int = Field(25, gt=0)
    guidance: float = Field(5.0, ge=0)
    seed: int = Field(0, ge=0, lt=2**63)
    negative: str = ""
    maps: str | None = Field(
        None, description="draw the cross-attention of this token over the previews"
    )


class EvaluateSpec(Section):
    """Prompts `evaluate` paints: the concept alone, beside one known sprite, two concepts of
    several together (`{}` is the token of each), and known sprites (`{}` is each with its article).

    alone and beside name the first token; each other concept's is put in its place.
    """

    alone: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    together: tuple[str, ...] = ()
    known: tuple[str, ...] = ()

    @field_validator("together")
    @classmethod
    def _name_two(cls, prompts: tuple[str, ...]) -> tuple[str, ...]:
        for prompt in prompts:
            if prompt.count("{}") != 2:
                raise ValueError(
                    f"{prompt!r} must hold {{}} twice, once for each concept, as in 'a {{}} left "
                    "of a {}'"
                )
        return prompts


class ContinualSpec(Section):
    """Concepts learned one after another, each by a run of its own that goes on from the one
    before.

    concepts: sprites or folders of photos in order; none for a plain run. tokens: the word of each,
    <v1>, <v2>, ... if empty. class_words, inits: one each, or empty for the recipe's own. images:
    pictures of every concept seen so far that are judged after each task, 0 for none; judge: a CLIP
    folder, the backbone's own if null.
    """

    concepts: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()
    class_words: tuple[str, ...] = ()
    inits: tuple[str, ...] = ()
    images: int = Field(32, ge=0)
    judge: Path | None = None

    @model_validator(mode="after")
    def _one_each(self) -> ContinualSpec:
        for name in ("tokens", "class_words", "inits"):
            given = getattr(self, name)
            if given and len(given) != len(self.concepts):
                raise ValueError(
                    f"{name}={list(given)} for {len(self.concepts)} concepts; give one each"
                )
        return self

    @property
    def words(self) -> tuple[str, ...]:
        return self.tokens or tuple(f"<v{number + 1}>" for number in range(len(self.concepts)))


TRACKERS = ("tensorboard", "wandb", "none")
SECTIONS: dict[str, type[Section]] = {
    "objective": ObjectiveSpec,
    "optim": OptimSpec,
    "run": RunSpec,
    "preview": PreviewSpec,
    "evaluate": EvaluateSpec,
    "continual": ContinualSpec,
}
KEYS = ("recipe", "backbone", "data", "methods", *SECTIONS, "tracker", "denoiser")


@dataclass(frozen=True)
class Recipe:
    """The resolved recipe; `tree` is the plain mapping it was made from, as it is written into
    adapters."""

    name: str
    backbone_name: str
    backbone: BackboneSpec
    data: Source
    methods: dict[str, Method]
    objective: ObjectiveSpec
    optim: OptimSpec
    run: RunSpec
    preview: PreviewSpec
    evaluate: EvaluateSpec
    continual: ContinualSpec
    tracker: str
    tree: dict[str, Any]
