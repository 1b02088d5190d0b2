"""The sections of a recipe: one frozen record each, every key with its type, range, default and
meaning, which `python -m trainer help <section>` prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, field_validator, model_validator

from trainer.common.strict import Section

Decay = Annotated[float, Field(ge=0, lt=1)]
Seconds = Annotated[float, Field(ge=0)]


class ObjectiveSpec(Section):
    """What the network is trained to predict, and how much each timestep counts."""

    target: Literal["eps", "v", "x0", "flow"] | None = Field(
        None,
        description="what the network predicts: the noise, v = alpha noise - sigma x0 (arXiv "
        "2202.00512), the image, or noise - x0; null is what the backbone was trained with",
    )
    path: Literal["vp", "flow"] | None = Field(
        None,
        description="how noise is added: x_t = alpha x0 + sigma noise by the backbone's "
        "variance-preserving schedule, or alpha = 1 - sigma (rectified flow, arXiv 2209.03003); "
        "null is what the backbone was trained with",
    )
    timesteps: Literal["uniform", "logit_normal"] = Field(
        "uniform",
        description="how timesteps are drawn; logit_normal prefers the middle (SD3, arXiv "
        "2403.03206, equation 19)",
    )
    logit_mean: float = Field(
        0.0, description="mean of logit_normal; above 0 draws noisier timesteps"
    )
    logit_std: float = Field(1.0, gt=0, description="standard deviation of logit_normal")
    weighting: Literal["none", "min_snr", "sigma_sqrt", "cosmap"] = Field(
        "none",
        description="weight of each timestep in the loss: none counts all alike, min_snr is arXiv "
        "2303.09556, sigma_sqrt and cosmap are those of SD3 (section 3.1), for path=flow",
    )
    min_snr_gamma: float = Field(
        5.0,
        gt=0,
        description="with weighting=min_snr: the ratio of signal to noise above which "
        "the weight no longer grows (5 in the paper)",
    )
    offset_noise: float = Field(
        0.0,
        ge=0,
        description="standard deviation of noise that is the same at all pixels of a "
        "channel, added so that the mean brightness can be learned; 0.1 is usual, 0 is none",
    )
    caption_dropout: float = Field(
        0.0,
        ge=0,
        le=1,
        description="probability of an empty caption, as classifier-free guidance needs it (arXiv "
        "2207.12598); 0.1 is usual",
    )


class OptimSpec(Section):
    """The optimiser and its learning rate: a linear warm-up, then constant or cosine."""

    name: Literal["adamw", "adamw8bit", "paged_adamw8bit", "muon"] = Field(
        "adamw",
        description="adamw8bit keeps AdamW's moments in 8 bits (bitsandbytes), paged_adamw8bit "
        "also lets them overflow from the GPU into main memory; muon moves the matrices of blocks "
        "that hold attention (arXiv 2502.16982) and AdamW all else, for training from nothing",
    )
    lr: float = Field(1e-4, gt=0, description="learning rate after the warm-up")
    muon_lr: float | None = Field(
        None,
        gt=0,
        description="with name=muon: learning rate of the matrices, lr if null; four times lr is a "
        "good start",
    )
    scale_lr: bool = Field(
        False, description="multiply every learning rate by run.batch_size x run.accumulate"
    )
    lrs: dict[str, NonNegativeFloat] = Field(
        default_factory=dict,
        description="learning rates of single methods by name, as in {new_token: 5e-4}; 0 keeps "
        "what run.start_from left",
    )
    betas: tuple[Decay, Decay] = Field(
        (0.9, 0.999), description="decay of AdamW's two moments (arXiv 1711.05101)"
    )
    eps: float = Field(1e-8, gt=0, description="added to the denominator of AdamW's step")
    weight_decay: float = Field(
        1e-2, ge=0, description="share of lr by which weights shrink a step"
    )
    warmup: int = Field(0, ge=0, description="steps over which lr rises linearly from near 0")
    schedule: Literal["constant", "cosine"] = Field(
        "constant", description="lr after the warm-up: constant, or falling to final_lr of it"
    )
    final_lr: float = Field(
        0.0, ge=0, le=1, description="share of lr left at the end of the cosine"
    )
    clip: float | None = Field(
        1.0, gt=0, description="largest norm of all gradients together; null does not clip"
    )
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="decay of a moving average of the trained weights, as in 0.999, which "
        "previews, validation and the adapter then use; null keeps none",
    )

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
    """How long, how much at once, on which devices, and what is written where."""

    steps: int = Field(1000, gt=0, description="optimiser steps of the run")
    batch_size: int = Field(
        4,
        gt=0,
        description="samples at once, over all devices and nodes together, which share them",
    )
    accumulate: int = Field(
        1, gt=0, description="batches whose gradients one optimiser step adds up"
    )
    seed: int = Field(
        0, ge=0, lt=2**63, description="of data order, noise, timesteps and starting weights"
    )
    resolution: int | None = Field(
        None, ge=16, description="side of the pictures in pixels; null is that of the backbone"
    )
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$",
        description="auto takes a CUDA GPU, then Apple's, then the CPU; cuda:1 is the second GPU",
    )
    accelerator: Literal["auto", "cpu", "cuda"] | None = Field(
        None, description="the earlier name of run.device, still read"
    )
    devices: int = Field(1, gt=0, description="devices on each node, one process each")
    nodes: int = Field(1, gt=0, description="machines that train together; see slurm/")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="of frozen weights and of what is computed; what trains is always fp32. auto: "
        "as the backbone's weights were published, and fp32 on a CPU",
    )
    workers: int = Field(
        0, ge=0, description="processes that load data for each device; 0 loads in the training one"
    )
    gradient_checkpointing: bool = Field(
        False,
        description="calculate activations again in the backward pass, which takes less memory and "
        "more time",
    )
    channels_last: bool = Field(
        False, description="memory layout in which convolutions are faster on GPUs"
    )
    compile: bool = Field(
        False, description="compile the denoiser with torch.compile; the first step takes minutes"
    )
    cache_latents: bool = Field(
        True, description="encode pictures that never change once and keep their latents on disk"
    )
    validate_every: int = Field(
        200, ge=0, description="steps between validation losses; 0 for none"
    )
    checkpoint_every: int = Field(
        500, ge=0, description="steps between checkpoints; 0 writes one only when a run ends early"
    )
    checkpoint_keep: int = Field(2, gt=0, description="checkpoints that stay, the newest")
    on_disk_full: Literal["stop", "continue"] = Field(
        "stop", description="what a checkpoint that cannot be written does to the run"
    )
    on_nonfinite: Literal["raise", "skip", "rollback"] = Field(
        "raise",
        description="what a loss or gradient that is NaN or infinite does: end the run, leave out "
        "the step, or also return to the last checkpoint",
    )
    nonfinite_in_a_row: int = Field(
        3, gt=0, description="steps in a row that skip or rollback leave out before the run ends"
    )
    nonfinite_total: int = Field(
        20, gt=0, description="steps in all that skip or rollback leave out before the run ends"
    )
    timeouts: dict[Literal["data", "step", "validate", "save", "preview"], Seconds] = Field(
        default_factory=dict,
        description="seconds after which a part of the loop counts as hung and the run ends, as in "
        "{step: 600}; without one 600 for data and 1800 for each other, 0 for never",
    )
    log_every: int = Field(10, gt=0, description="steps between logged losses")
    out: Path = Field(Path("runs"), description="folder in which runs/<recipe>/<id> is made")
    id: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="name of the run folder; a run of this name resumes. null makes one from the "
        "time",
    )
    start_from: Path | None = Field(
        None, description="a run or its adapter, whose trained tensors this run continues from"
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
    """Pictures of fixed prompts and seeds while training, and the sampler that `sample` uses."""

    prompts: tuple[str, ...] = Field((), description="one picture or clip each; none if empty")
    every: int = Field(100, ge=0, description="steps between previews; 0 for none")
    steps: int = Field(25, gt=0, description="steps of the sampler")
    guidance: float = Field(
        5.0, ge=0, description="strength of classifier-free guidance, 1 or less for none"
    )
    seed: int = Field(
        0, ge=0, lt=2**63, description="of the first preview's noise; the next take the next seeds"
    )
    negative: str = Field("", description="a prompt to move away from, in place of the empty one")
    maps: str | None = Field(
        None, description="draw the cross-attention of this token over the previews"
    )


class EvaluateSpec(Section):
    """Prompts that `evaluate` generates pictures of. With several concepts, alone and beside name
    the token of the first; each other concept's is put in its place."""

    alone: tuple[str, ...] = Field((), description="prompts of the concept alone")
    beside: tuple[str, ...] = Field((), description="prompts of the concept beside a known sprite")
    together: tuple[str, ...] = Field(
        (), description="prompts of two concepts, with {} twice in the place of their tokens"
    )
    known: tuple[str, ...] = Field(
        (), description="prompts of known sprites, with {} in the place of each with its article"
    )

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
    """Concepts learned one after another, each by a run of its own that starts from the one
    before."""

    concepts: tuple[str, ...] = Field(
        (), description="folders of photos, or sprite:<word>, in order; none for an ordinary run"
    )
    tokens: tuple[str, ...] = Field(
        (), description="the new word of each; empty gives <v1>, <v2>, ..."
    )
    class_words: tuple[str, ...] = Field(
        (), description="data.class_word of each; empty keeps the recipe's"
    )
    inits: tuple[str, ...] = Field(
        (), description="the known word that each token starts from; empty keeps the recipe's"
    )
    images: int = Field(
        32, ge=0, description="pictures of every concept so far, judged after each; 0 for none"
    )
    judge: Path | None = Field(
        None, description="folder of the CLIP model that judges; null takes the backbone's own"
    )

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
