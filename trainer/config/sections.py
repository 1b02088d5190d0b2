"""The sections of a recipe but `run`: one frozen record each, every key with its type, range,
default and meaning, which `python -m trainer help <section>` prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, field_validator, model_validator

from trainer.common.section import Section
from trainer.config.guidance_texts import TEMPORAL_GUIDANCE, TRUE_GUIDANCE
from trainer.config.optimisers import OPTIMISERS, unsuited
from trainer.data.caption_templates import CONCEPT_PROMPTS

Decay = Annotated[float, Field(ge=0, lt=1)]


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
    shift: Literal["sampling"] | Annotated[float, Field(gt=0)] = Field(
        1.0,
        description="with path=flow, moves timesteps towards the noise, t' = s t / (1 + (s - 1) t) "
        "(SD3, equation 23); 1 for none, 3 is what SD3 is sampled with, and sampling takes what "
        "the backbone is sampled with, which of FLUX depends on the size of the pictures",
    )
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

    def idle(self) -> dict[str, str]:
        found: dict[str, str] = {}
        if self.timesteps != "logit_normal":
            why = f"objective.timesteps is {self.timesteps}; it is for logit_normal"
            found |= dict.fromkeys(("logit_mean", "logit_std"), why)
        if self.weighting != "min_snr":
            found["min_snr_gamma"] = f"objective.weighting is {self.weighting}; it is for min_snr"
        return found


class OptimSpec(Section):
    """The optimiser and its learning rate: a linear warm-up, then constant or cosine."""

    name: Literal[
        "adamw", "adamw8bit", "paged_adamw8bit", "paged_adamw32bit", "muon", "prodigy", "adafactor",
        "lion", "lion8bit", "schedule_free_adamw", "came",
    ] = Field(
        "adamw",
        description="adamw8bit keeps AdamW's moments in 8 bits (bitsandbytes), paged_adamw8bit "
        "also pages them from the GPU into main memory, paged_adamw32bit those of 32 bits "
        "(QLoRA's, arXiv 2305.14314); muon moves the matrices of blocks that hold attention (arXiv "
        "2502.16982) and AdamW all else, to train from nothing; prodigy finds the learning rate "
        "(arXiv 2306.06101); adafactor (arXiv 1804.04235) and came (arXiv 2307.02047) keep sums of "
        "the second moment; lion moves by signs (arXiv 2302.06675), lion8bit with its moment in 8 "
        "bits; schedule_free_adamw averages weights, without a schedule (arXiv 2405.15682)",
    )  # fmt: skip
    lr: float = Field(
        1e-4,
        gt=0,
        description="learning rate after the warm-up; with name=prodigy a factor on the one it "
        "finds, 1 if not given",
    )
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
    betas: tuple[Decay, ...] | None = Field(
        None,
        description="decays of the optimiser's moments; null is its own: [0.9, 0.999] of AdamW, "
        "prodigy and schedule_free_adamw, [0.9, 0.99] of lion, [0.9, 0.999, 0.9999] of came; none "
        "of adafactor, to which one number gives a momentum",
    )
    eps: float = Field(
        1e-8,
        gt=0,
        description="added to the denominator of the step; adafactor, lion and came have none",
    )
    weight_decay: float = Field(
        1e-2, ge=0, description="share of lr by which weights shrink a step"
    )
    warmup: int = Field(
        0,
        ge=0,
        description="steps over which lr rises linearly from near 0; schedule_free_adamw does that "
        "itself, so that its average knows of it",
    )
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

    @model_validator(mode="after")
    def _suits_the_optimiser(self) -> OptimSpec:
        if problem := unsuited(self.name, self.model_dump()):
            raise ValueError(problem)
        return self

    def idle(self) -> dict[str, str]:
        found = {}
        if not OPTIMISERS[self.name].eps:
            found["eps"] = f"optim.name is {self.name}, which has none; leave it out"
        if self.schedule != "cosine":
            found["final_lr"] = f"optim.schedule is {self.schedule}; it is for cosine"
        return found

    @property
    def frozen(self) -> tuple[str, ...]:
        """Methods whose parameters do not train."""
        return tuple(method for method, lr in self.lrs.items() if lr == 0)


class TextSpec(Section):
    """How prompts and captions are read, in training, previews, `sample` and `evaluate` alike."""

    max_tokens: int | None = Field(
        None,
        gt=0,
        description="tokens of a prompt that are read, as in 150 or 225: CLIP reads 75 in one call "
        "and longer prompts in parts of 75, as user interfaces do; null reads one part, or as many "
        "as the run that the backbone is the result of",
    )


class PreviewSpec(Section):
    """Pictures of fixed prompts and seeds while training, and the steps, scheduler and guidance
    that `sample` takes by default; nothing that trains or is evaluated depends on them. In prompts
    {token} stands for the concept's new word and {class} for its kind."""

    prompts: tuple[str, ...] = Field(
        (),
        description="one picture or clip each, in the size that is trained; none if empty, and "
        "captions of the data where a run on clips does not give any",
    )
    every: int = Field(100, ge=0, description="steps between previews; 0 for none")
    steps: int = Field(25, gt=0, description="steps of the sampler")
    scheduler: str | None = Field(
        None,
        description="the solver, as ddpm for ancestral sampling (arXiv 2006.11239); names as of "
        "`sample`, null for the backbone's own",
    )
    guidance: float = Field(
        5.0, ge=0, description="strength of classifier-free guidance, 1 or less for none"
    )
    true_guidance: float = Field(1.0, ge=0, description=TRUE_GUIDANCE)
    temporal_guidance: float = Field(1.0, ge=0, description=TEMPORAL_GUIDANCE)
    seed: int = Field(
        0, ge=0, lt=2**63, description="of the first preview's noise; the next take the next seeds"
    )
    negative: str = Field("", description="a prompt to move away from, in place of the empty one")
    maps: str | None = Field(
        None,
        description="draw the cross-attention of this token over the previews; not on backbones "
        "that have the text in one sequence with the picture",
    )

    def idle(self) -> dict[str, str]:
        return _unguided(self, "preview")


class EvaluateSpec(Section):
    """Prompts that `evaluate` generates pictures of, and how. In prompts {token} stands for the
    concept's new word and {class} for its kind. With several concepts, alone and beside name the
    first one; each other concept's is put in its place."""

    steps: int = Field(25, gt=0, description="steps of the sampler")
    guidance: float = Field(
        5.0, ge=0, description="strength of classifier-free guidance, 1 or less for none"
    )
    true_guidance: float = Field(1.0, ge=0, description=TRUE_GUIDANCE)
    temporal_guidance: float = Field(1.0, ge=0, description=TEMPORAL_GUIDANCE)
    negative: str = Field("", description="a prompt to move away from, in place of the empty one")

    alone: tuple[str, ...] = Field(
        CONCEPT_PROMPTS,
        description="prompts of the concept alone; of data without a concept, prompts in place of "
        "the captions. By default the concept as it is, in other places and as other kinds of "
        "picture",
    )
    beside: tuple[str, ...] = Field((), description="prompts of the concept beside a known sprite")
    together: tuple[str, ...] = Field(
        (), description="prompts of two concepts, with {} twice in the place of their tokens"
    )
    known: tuple[str, ...] = Field(
        (), description="prompts of known sprites, with {} in the place of each with its article"
    )

    def idle(self) -> dict[str, str]:
        return _unguided(self, "evaluate")

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
        (), description="the new word of each; empty gives <v1>, <v2> and so on"
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

    def idle(self) -> dict[str, str]:
        if not self.concepts:
            return dict.fromkeys(("images", "judge"), "it is for continual.concepts")
        return {}

    @property
    def words(self) -> tuple[str, ...]:
        return self.tokens or tuple(f"<v{number + 1}>" for number in range(len(self.concepts)))


def _unguided(section: PreviewSpec | EvaluateSpec, name: str) -> dict[str, str]:
    if max(section.guidance, section.true_guidance) > 1:
        return {}
    why = f"{name}.guidance={section.guidance:g} does not guide; it is for more than 1"
    return {"negative": why, "temporal_guidance": why}
