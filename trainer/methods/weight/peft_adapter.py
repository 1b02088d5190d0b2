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

All start at the base model (hra up to rounding), unless `options` set another start. What they fix
at random comes from seeds among the options, and the rest from the base, so only the trained
tensors are stored.
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
}
# those that leave W0 to the layer under them, which may then be in 4 bits
OVER_4_BITS = ("oft", "ia3", "fourierft", "waveft", "miss", "hira", "road")
# those whose change is a dW that peft multiplies by the layer's `scaling`
LINEAR = ("loha", "lokr")
SHARED = "shares tensors between layers, which peft cannot inject into a model that is not its own"
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
    "randlora": "keeps large random tensors that no adapter file holds; the nearest here is loha",
    "shira": "trains random positions, which no adapter file holds; use waveft",
    "adalora": "needs a budget set at every step; the nearest here is methods.lora with ranks",
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
        "LoHa, LoKr, OFT, HRA, IA3, FourierFT, WaveFT, C3A, MiSS, HiRA, DeLoRA, GraLoRA, RoAd"
    )
    paper: ClassVar[str] = "arXiv 2108.06098 (LoHa), 2309.14859 (LoKr), 2306.07280 (OFT) and others"

    type: str = Field(
        description="loha, lokr, oft, hra, ia3, fourierft, waveft, c3a, miss, hira, delora, "
        "gralora or road",
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

    def apply(self, model: AttentionModel) -> Edit:
        from trainer.ops.adapters.inject import base_layer, inject, layer_of
        from trainer.ops.adapters.nf4 import is_packed

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
        parameters = dict(model.named_parameters())
        trains = tuple(name for name in added if parameters[name].requires_grad)
        frozen = [(name, "weight") for name in added if name not in trains]
        return edit_of(targets, trains, also=frozen)

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
