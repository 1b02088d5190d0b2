"""FEC: a real picture is edited so that all that the prompt leaves alone is the picture again, by
what its inversion passed, without tuning anything.

    K, V of the edit are those of the inversion (reference, kv-reuse), or each step is corrected by
    what it loses of the source (noise)

arXiv 2309.14934. Nothing trains. It edits an inverted picture, `image=` of `edit`; by `reference`
one that is generated, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from trainer.methods.method import Edit, EditKind, Use
from trainer.methods.shared.editing import SourceEdit, Window
from trainer.methods.shared.options import SELECTOR, SiteSelector

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel


class FEC(SourceEdit):
    """How the edit is held to the picture."""

    kind: ClassVar[EditKind] = "attention"
    use: ClassVar[Use] = "sample"
    systems: ClassVar[str] = "FEC"
    paper: ClassVar[str] = "arXiv 2309.14934"

    scheme: Literal["reference", "noise", "kv-reuse"] = Field(
        "reference",
        description="reference: keys and values of rows that are the inversion at each step; "
        "kv-reuse: the same, kept before sampling begins; noise: those of a source that is guided, "
        "with what each step loses of it added",
    )
    sites: SiteSelector = Field(
        "self | joint", description=f"whose keys and values are the picture's: {SELECTOR}"
    )
    steps: Window | None = Field(
        (0.0, 1.0), description="the steps in which they are; null for none"
    )
    bank_tokens: int = Field(
        64 * 64, gt=0, description="of kv-reuse: layers of more tokens are not kept"
    )
    bank_limit: float = Field(4096, gt=0, description="likewise: megabytes of all that is kept")
    offload: bool = Field(False, description="likewise: keep it on the CPU")

    def idle(self) -> dict[str, str]:
        kept = ("bank_tokens", "bank_limit", "offload")
        if self.steps is None:
            return dict.fromkeys(("sites", *kept), "steps=null takes no keys and values over")
        if self.scheme == "kv-reuse":
            return {}
        why = f"scheme={self.scheme} keeps nothing before sampling; give scheme=kv-reuse"
        return dict.fromkeys(kept, why)

    def apply(self, model: AttentionModel) -> Edit:
        from trainer.attention.bank import FeatureBank
        from trainer.attention.sites import require
        from trainer.ops.fec import Consistency, Consistent

        told = Consistency(self.name, self.sites, scheme=self.scheme, steps=self.steps)
        bank = FeatureBank(
            most_tokens=self.bank_tokens, limit=self.bank_limit, offload=self.offload
        )
        op = Consistent(told, bank)
        noise, alone = self.scheme == "noise", self.scheme != "reference"
        branch = {"replays": True, "inverts": alone, "guides": noise}
        sites = require(model.sites, self.sites, "sites")
        return self.edit_by(op, sites, branch=branch, after_step=op.after_step)
