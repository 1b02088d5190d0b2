"""The section `run` of a recipe: how long, how much at once, on which devices, where to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from trainer.common.section import Section

DEVICES = "auto takes a CUDA GPU, then Apple's (mps), then the CPU; cuda:1 is the second GPU"
Device = Annotated[
    str,
    Field(
        pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$",
        description=f"where the model runs: {DEVICES}",
    ),
]
Precision = Annotated[
    Literal["auto", "fast", "fp32", "bf16", "fp16"],
    Field(
        description="of frozen weights and of what is computed; what trains is always fp32. auto: "
        "as the backbone's weights were published, and fp32 on a CPU. fast: bf16 where the device "
        "has instructions for it, else fp32"
    ),
]
Held = Literal["fp32", "bf16", "fp16", "fp8", "nf4"]
Seconds = Annotated[float, Field(ge=0)]


class RunSpec(Section):
    """How long, how much at once, on which devices, and what is written where."""

    steps: int = Field(1000, gt=0, description="optimiser steps of the run")
    epochs: float | None = Field(
        None,
        gt=0,
        description="passes over the training data in place of steps, where the data can be "
        "counted; what they take is said, and stored as run.steps",
    )
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
    device: Device = "auto"
    accelerator: Literal["auto", "cpu", "cuda"] | None = Field(
        None, description="the earlier name of run.device, still read"
    )
    devices: int = Field(1, gt=0, description="devices on each node, one process each")
    nodes: int = Field(1, gt=0, description="machines that train together; see slurm/")
    strategy: Literal["auto", "ddp", "fsdp", "hsdp"] = Field(
        "auto",
        description="how several devices share the model. ddp, which auto is: each has all of it. "
        "fsdp: the denoiser is sharded over all of them, frozen weights too. hsdp: over those of a "
        "node, and every node has a copy",
    )
    precision: Precision = "auto"
    base_precision: dict[Literal["denoiser", "text_encoders"], Held] = Field(
        default_factory=dict,
        description="what frozen linear layers and convolutions are held in, as in {denoiser: "
        "fp8}: of run.precision where it is not given; lower ones are cast at every call. fp8 is "
        "of the denoiser, with its norms, positions and patches left as they are; nf4, 4 bits, of "
        "the linear layers of text encoders, and of the denoiser's see methods.nf4",
    )
    workers: int = Field(
        0, ge=0, description="processes that load data for each device; 0 loads in the training one"
    )
    gradient_checkpointing: bool | Literal["feed_forward"] = Field(
        False,
        description="calculate activations again in the backward pass, which takes less memory and "
        "more time: those of whole blocks, of the denoiser and of a text encoder that trains, or "
        "of the denoiser those of the feed-forward parts alone, which takes less time",
    )
    recompute_every: int = Field(
        1,
        gt=0,
        description="with gradient_checkpointing=true, calculate every so manieth block again: 2 "
        "saves and costs half as much",
    )
    offload_activations: bool = Field(
        False,
        description="with gradient_checkpointing, keep the inputs of what is calculated again in "
        "main memory, not on the GPU",
    )
    channels_last: bool | Literal["auto"] = Field(
        "auto",
        description="memory layout in which convolutions are faster on GPUs. auto: on CUDA in half "
        "precision, where the denoiser has convolutions",
    )
    compile: bool | Literal["auto"] = Field(
        "auto",
        description="compile the denoiser's blocks with torch.compile; the first step takes "
        "minutes. auto: on CUDA, in a run of one picture size that is long enough to pay for it",
    )
    cache_latents: bool = Field(
        True,
        description="encode pictures that never change once and keep their latents on disk; "
        "the VAE then leaves the device while the denoiser trains",
    )
    cache_text: bool = Field(
        True,
        description="encode each prompt once, where no word and no text encoder trains, and keep "
        "that on disk; text encoders then leave the device while the denoiser trains",
    )
    validate_every: int = Field(
        200, ge=0, description="steps between validation losses; 0 for none"
    )
    checkpoint_every: int = Field(
        500, ge=0, description="steps between checkpoints; 0 writes one only when a run ends early"
    )
    checkpoint_keep: int = Field(2, gt=0, description="checkpoints that stay, the newest")
    keep_adapters: int = Field(
        0,
        ge=0,
        description="adapters to keep, evenly over the steps, the last of them the run's own; "
        "`evaluate run=... every=true` compares them. 0 keeps the run's own alone",
    )
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
    log_every: int = Field(
        10, gt=0, description="steps between logged numbers; those of the first and last are too"
    )
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

    def idle(self) -> dict[str, str]:
        found = {}
        if self.on_nonfinite == "raise":
            why = "run.on_nonfinite=raise ends the run at once; it is for skip and rollback"
            found = dict.fromkeys(("nonfinite_in_a_row", "nonfinite_total"), why)
        if self.gradient_checkpointing is not True:
            found["recompute_every"] = (
                f"run.gradient_checkpointing={str(self.gradient_checkpointing).lower()} calculates "
                "no whole blocks again; give run.gradient_checkpointing=true"
            )
        if not self.gradient_checkpointing:
            found["offload_activations"] = (
                "run.gradient_checkpointing=false calculates nothing again; give "
                "run.gradient_checkpointing=true"
            )
        return found

    @property
    def shards(self) -> bool:
        """Whether the denoiser is sharded over the devices."""
        return self.strategy in ("fsdp", "hsdp")

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of the pictures, None for those of the backbone."""
        return None if self.resolution is None else (self.resolution, self.resolution)

    @property
    def kept_steps(self) -> tuple[int, ...]:
        """The steps after which an adapter is kept, without the last, whose is the run's own."""
        parts = self.keep_adapters
        return tuple(sorted({part * self.steps // parts for part in range(1, parts)} - {0}))

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
    def _each_in_its_own(self) -> RunSpec:
        if self.base_precision.get("text_encoders") == "fp8":
            raise ValueError(
                "base_precision.text_encoders=fp8: fp8 is for the denoiser; give bf16 or nf4. "
                "run.cache_text takes text encoders off the device while the denoiser trains"
            )
        if self.base_precision.get("denoiser") == "nf4":
            raise ValueError(
                "base_precision.denoiser=nf4: the denoiser in 4 bits is a method, which an adapter "
                "remembers; give methods.nf4={}, as recipe=qlora does"
            )
        return self

    @model_validator(mode="after")
    def _one_length(self) -> RunSpec:
        if self.epochs is not None and "steps" in self.model_fields_set:
            raise ValueError(
                f"epochs={self.epochs:g} and run.steps={self.steps} both say how long the run "
                "is; give one of them"
            )
        return self

    @model_validator(mode="after")
    def _one_numbered_device(self) -> RunSpec:
        if (":" in self.device or self.device == "mps") and self.devices > 1:
            raise ValueError(
                f"device={self.device} is one GPU, and run.devices={self.devices}; give "
                "run.devices=1, or run.device=cuda where there are several"
            )
        return self

    @model_validator(mode="after")
    def _can_be_sharded(self) -> RunSpec:
        if not self.shards:
            return self
        if self.devices * self.nodes == 1:
            raise ValueError(
                f"strategy={self.strategy} shards over several devices, and this run has one; give "
                "run.devices or run.nodes, or leave run.strategy out"
            )
        if self.strategy == "hsdp" and (self.devices == 1 or self.nodes == 1):
            raise ValueError(
                "strategy=hsdp shards over the devices of a node and copies over nodes, so it "
                "needs several of both; give run.strategy=fsdp"
            )
        why = {
            "precision=fp16": self.precision == "fp16",
            "base_precision.denoiser": "denoiser" in self.base_precision,
            "channels_last=true": self.channels_last is True,
            "compile=true": self.compile is True,
        }
        if found := next((key for key, given in why.items() if given), None):
            raise ValueError(
                f"strategy={self.strategy} does not go with run.{found}; leave that out, or give "
                "run.strategy=ddp"
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
