"""NF4: the denoiser's frozen linear layers are stored in 4 bits, and adapters train through them.

Dettmers et al., QLoRA, arXiv 2305.14314, section 3: blocks of 64 values are rounded to the 16
quantiles of a normal distribution, y = x dequantize(W, scales), and the scales are quantised
themselves. QLoRA is this beside `lora` (or `dora`); by itself it trains nothing.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from trainer.methods.method import Edit, EditKind, Method

if TYPE_CHECKING:
    from torch import nn

    from trainer.attention.model import AttentionModel

# what conditions the network on time, scales its norms or makes its output stays as it is
KEPT = ("*norm*", "*emb*", "*adaln*", "proj_out*")


class Nf4(Method):
    """Which layers are stored in 4 bits: linear ones only, never convolutions, embeddings or norms,
    nor a layer that another method has inserted and trains."""

    kind: ClassVar[EditKind] = "storage"
    systems: ClassVar[str] = "QLoRA"
    paper: ClassVar[str] = "arXiv 2305.14314"

    min_size: int = Field(
        4096,
        gt=0,
        description="layers with fewer weights stay as they are, as do those with a number of "
        "inputs that is no multiple of 64",
    )
    skip: tuple[str, ...] = Field(
        KEPT,
        description="globs over the names of layers that stay; by default those of time, norms and "
        "output",
    )
    compute: Literal["fp32", "bf16"] = Field(
        "fp32", description="what the layers calculate in; bf16 goes with run.precision=bf16"
    )

    @property
    def linear(self) -> bool:
        return True

    def apply(self, model: AttentionModel) -> Edit:
        import torch

        from trainer.backbones.four_bits import bitsandbytes, pack, share_tables

        bitsandbytes("4-bit storage")
        compute = {"fp32": torch.float32, "bf16": torch.bfloat16}[self.compute]
        chosen = self.chosen(model.denoiser)
        packed = [pack(layer, compute) for layer in chosen.values()]
        share_tables(packed)
        for name, layer in zip(chosen, packed, strict=True):
            model.denoiser.set_submodule(name, layer)
        model.denoiser.is_loaded_in_4bit = True  # type: ignore[assignment]  # peft asks for it
        changed = ("weight",) if self.compute == "fp32" else ("weight", "bias")
        return Edit(
            claims=tuple(
                (f"{model.denoiser_name}.{name}.{part}", "weight")
                for name, layer in chosen.items()
                for part in changed
                if getattr(layer, part) is not None
            )
        )

    def chosen(self, denoiser: nn.Module) -> dict[str, nn.Linear]:
        """The layers to pack, by name.

        Raises:
            ValueError: there is none, or a glob of the user's own matches no linear layer.
        """
        from torch import nn

        from trainer.attention.insertion import trained_inside
        from trainer.backbones.four_bits import can_be_packed
        from trainer.ops.adapters.nf4 import inside_ops

        training = trained_inside(denoiser) | inside_ops(denoiser)
        linear = {
            name: layer
            for name, layer in denoiser.named_modules()
            if type(layer) is nn.Linear and id(layer) not in training
        }
        for pattern in self.skip:
            if pattern not in KEPT and not any(fnmatchcase(name, pattern) for name in linear):
                raise ValueError(
                    f"skip: {pattern!r} matches no linear layer; they have names like "
                    f"{', '.join(list(linear)[:3])}"
                )
        found = {
            name: layer
            for name, layer in linear.items()
            if can_be_packed(layer, self.min_size)
            and not any(fnmatchcase(name, pattern) for pattern in self.skip)
        }
        if not found:
            raise ValueError(
                f"no linear layer has min_size={self.min_size} weights, rows of whole blocks of 64 "
                "and is in none of skip; lower min_size, or skip less"
            )
        return found
