"""Other adapters of peft: one method for all of its kinds that need only the layer they are on.

    loha       W0 + (B1 A1) * (B2 A2)                      arXiv 2108.06098
    lokr       W0 + C (x) B A, a Kronecker product         arXiv 2309.14859
    oft        W0 R, R orthogonal in blocks                arXiv 2306.07280
    hra        W0 H1 ... Hr, Householder reflections       arXiv 2405.17484
    ia3        diag(l) W0                                  arXiv 2205.05638
    fourierft  W0 + the inverse FFT of a few frequencies   arXiv 2405.03003
    waveft     W0 + the inverse wavelets of a few positions   arXiv 2505.12532
    c3a        W0 + circulant blocks                       arXiv 2407.19342
    miss       W0 + one small matrix, repeated (Bone)      arXiv 2409.15371
    hira       W0 * (1 + B A)                              ICLR 2025
    delora     W0 + B A, normalised, of strength lambda    arXiv 2503.18225
    gralora    W0 + B A in each of k x k blocks            arXiv 2505.20355
    road       rotations and scales of pairs of outputs    arXiv 2409.00119
    glora      W0 * (1 + A) + B, and the bias likewise     arXiv 2306.07967
    deft       W0 less its part along P, and P R instead   arXiv 2509.22793
    psoft      the main part of W0, its factors rotated    arXiv 2505.11235
    peanut     W0 + a small network applied to W0          arXiv 2410.01870
    beft       the bias + b, or b where there is none      arXiv 2509.15974
    supertuning  W0 + values at its largest entries        arXiv 2607.09287

All start at the base model (hra up to rounding), unless `options` set another start. What they fix
at random comes from seeds among the options, and the rest from the base, so only the trained
tensors are stored; and with psoft the factors of W0 and with supertuning the positions, which
another machine might find in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field, TypeAdapter, ValidationError, field_validator

from trainer.common.suggest import nearest
from trainer.methods.method import Edit, EditKind
from trainer.methods.shared.lowrank import Targeted, edit_of, exceptions

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel
    from trainer.ops.adapters.inject import Target

# peft's configuration, and what it takes to start at the base model
TYPES: dict[str, tuple[str, dict[str, Any]]] = {
    "loha": ("LoHaConfig", {}),
    "lokr": ("LoKrConfig", {}),
    "oft": ("OFTConfig", {}),
    "hra": ("HRAConfig", {}),
    "ia3": ("IA3Config", {"feedforward_modules": []}),
    "fourierft": ("FourierFTConfig", {"init_weights": True}),
    "waveft": ("WaveFTConfig", {}),
    "c3a": ("C3AConfig", {"init_weights": True}),
    "miss": ("MissConfig", {}),
    "hira": ("HiraConfig", {}),
    "delora": ("DeloraConfig", {}),
    "gralora": ("GraloraConfig", {}),
    "road": ("RoadConfig", {}),
    "glora": ("GloraConfig", {}),
    "deft": ("DeftConfig", {}),
    "psoft": ("PsoftConfig", {}),
    "peanut": ("PeanutConfig", {}),
    "beft": ("BeftConfig", {}),
    "supertuning": ("SupertuningConfig", {}),
}
# those that leave W0 to the layer under them, which may then be in 4 bits
OVER_4_BITS = ("oft", "ia3", "fourierft", "waveft", "miss", "hira", "road", "beft")
# those whose start is calculated from W0
READING = ("delora", "deft", "psoft", "supertuning")
# frozen tensors of a layer that are stored, by type: what they come from does not fix them
KEPT = {
    "psoft": ("_psoft_A_cache", "_psoft_B_cache"),
    "supertuning": ("supertuning_indices",),
}
# those whose change is a dW that peft multiplies by the layer's `scaling`
LINEAR = ("loha", "lokr")
SHARED = "shares tensors between layers, which peft cannot inject into a model that is not its own"
WORDS = "puts vectors before the words a language model reads; use methods.new_token"
# all other kinds of peft, and names of variants: what to use instead, or why not
INSTEAD = {
    "lora": "is a method of its own; use methods.lora",
    "dora": "is a method of its own; use methods.dora",
    "boft": "is the same as oft unless peft can compile its CUDA code; use oft",
    "bone": "is called miss",
    "vera": f"{SHARED}; the nearest here is fourierft",
    "pvera": f"{SHARED}; the nearest here is fourierft",
    "vblora": f"{SHARED}; the nearest here is fourierft",
    "unilora": f"{SHARED}; the nearest here is fourierft",
    "tinylora": f"{SHARED}; the nearest here is fourierft",
    "frod": f"{SHARED}; the nearest here is fourierft",
    "lily": "mixes its matrices by the mean over all rows of a batch, so that pictures would "
    "change each other, and shares them between layers; use methods.lora",
    "randlora": "keeps large random tensors that no adapter file holds; the nearest here is loha",
    "shira": "trains random positions, which no adapter file holds; use supertuning or waveft",
    "adalora": "needs a budget set at every step; the nearest here is methods.lora with ranks",
    "adamss": "groups the rows of W0 by k-means, and no adapter file holds the groups; use psoft",
    "osf": "keeps a decomposition of all of W0, larger than W0 itself; use methods.inflora, which "
    "is made for tasks in a row too",
    "shadow": "trains a smaller copy of a whole network beside it; use methods.lora",
    "xlora": "mixes several finished LoRAs by the hidden states of a language model; use "
    "`sample adapter=[a,b] scale=[0.8,0.5]`, which adds finished ones up",
    "poly": "mixes LoRAs by the number of a task, which no batch has here; use methods.lora",
    "ln_tuning": "trains norms, and this method is for linear layers; use methods.full, which "
    "trains norms too",
    "trainable_tokens": "trains words; use methods.new_token or methods.word_embedding",
    "prompt_tuning": WORDS,
    "multitask_prompt_tuning": WORDS,
    "p_tuning": WORDS,
    "cpt": WORDS,
    "prefix_tuning": "puts keys and values before those of a language model; use "
    "methods.coda_prompt, which does so in attention here",
    "cartridge": "puts keys and values before those of a language model; use "
    "methods.coda_prompt, which does so in attention here",
    "adaption_prompt": "is made for the attention of Llama alone; use methods.coda_prompt",
}
# options that sites, projections, layers and text_encoder stand for, or that train the base
OURS = (
    "target_modules",
    "exclude_modules",
    "feedforward_modules",
    "layers_to_transform",
    "modules_to_save",
    "bias",
    "fan_in_fan_out",
)


class PeftAdapter(Targeted):
    """Which adapter of peft, and its own options."""

    kind: ClassVar[EditKind] = "adapt"
    systems: ClassVar[str] = (
        "LoHa, LoKr, OFT, HRA, IA3, FourierFT, WaveFT, C3A, MiSS, HiRA, DeLoRA, GraLoRA, RoAd, "
        "GLoRA, DEFT, PSOFT, PEANuT, BEFT, Super-Tuning"
    )
    paper: ClassVar[str] = "arXiv 2108.06098 (LoHa), 2309.14859 (LoKr), 2306.07280 (OFT) and others"

    type: str = Field(
        description="loha, lokr, oft, hra, ia3, fourierft, waveft, c3a, miss, hira, delora, "
        "gralora, road, glora, deft, psoft, peanut, beft or supertuning",
        examples=["loha"],
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="options of peft's configuration of that type, as in {r: 8, alpha: 8}",
    )

    ranks: dict[str, Annotated[int, Field(gt=0)]] = Field(
        default_factory=dict,
        description="ranks of single layers by globs over their names, as of lora, for types whose "
        "options have r",
    )

    @field_validator("type")
    @classmethod
    def _known(cls, name: str) -> str:
        if name in INSTEAD:
            raise ValueError(f"{name} {INSTEAD[name]}")
        if name not in TYPES:
            raise ValueError(f"no such adapter{nearest(name, TYPES)}")
        return name

    @property
    def linear(self) -> bool:
        return self.type in LINEAR

    @property
    def reads_weights(self) -> bool:
        return self.type in READING

    def apply(self, model: AttentionModel) -> Edit:
        from trainer.backbones.four_bits import is_packed
        from trainer.ops.adapters.inject import base_layer, inject, layer_of
        from trainer.ops.adapters.peft_adapter import prepare_layers

        targets = self.targets(model)
        for target in targets:
            if self.type not in OVER_4_BITS and is_packed(base_layer(layer_of(model, target))):
                raise ValueError(
                    f"{self.type} calculates with W0, and methods.nf4 stores that of {target.path} "
                    f"in 4 bits; use {', '.join(OVER_4_BITS)}, or methods.nf4.skip"
                )
        for pattern in self.ranks:
            if not any(fnmatchcase(target.path, pattern) for target in targets):
                raise ValueError(
                    f"{pattern!r} in ranks matches none of the chosen layers; they have names like "
                    f"{targets[0].path}"
                )
        added = inject(model, targets, self._config(), owner=self.name)
        prepare_layers(self.type, [layer_of(model, target) for target in targets], self.name)
        parameters = dict(model.named_parameters())
        trains = tuple(name for name in added if parameters[name].requires_grad)
        frozen = [(name, "weight") for name in added if name not in trains]
        tables = KEPT.get(self.type, ())
        kept = [f"{target.path}.{table}.{self.name}" for target in targets for table in tables]
        return edit_of(targets, trains, kept, also=frozen)

    def _config(self) -> Callable[[Sequence[Target]], Any]:
        """From targets to their configuration, the options checked against its fields."""
        import dataclasses
        import typing

        import peft

        from trainer.ops.adapters.inject import exactly

        name, defaults = TYPES[self.type]
        cls = getattr(peft, name)
        general = {field.name for field in dataclasses.fields(peft.PeftConfig)}
        own = [
            field.name
            for field in dataclasses.fields(cls)
            if field.name not in {*general, *OURS} and not field.name.endswith("_pattern")
        ]
        hints = typing.get_type_hints(cls)
        checked = {
            key: _checked(key, value, hints=hints, known=own)
            for key, value in self.options.items()
            if value is not None  # options.r=null removes it
        }
        if self.ranks and not {"r", "rank_pattern"} <= set(hints):
            raise ValueError(f"{self.type} has no ranks of single layers; remove ranks")

        def config(targets: Sequence[Target]) -> Any:
            of_layers = exceptions(targets, self._rank_of, None)
            ranks = {"rank_pattern": of_layers} if of_layers else {}
            return cls(target_modules=exactly(targets), **(defaults | checked | ranks))

        return config

    def _rank_of(self, target: Target) -> int | None:
        own = [value for glob, value in self.ranks.items() if fnmatchcase(target.path, glob)]
        return own[-1] if own else None


def _checked(key: str, value: Any, hints: Mapping[str, Any], known: Iterable[str]) -> Any:
    if key in OURS or key.endswith("_pattern"):
        raise ValueError(
            f"options.{key}: layers are chosen by sites, projections, layers and text_encoder, and "
            "nothing else of the base is trained; remove it"
        )
    if key not in known:
        raise ValueError(f"options.{key}: no such option{nearest(key, known)}")
    try:
        return TypeAdapter(hints[key]).validate_python(value)
    except ValidationError as error:
        raise ValueError(f"options.{key}={value!r}: {error.errors()[0]['msg']}") from None
