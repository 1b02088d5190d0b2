"""What methods that only replace the kernel of sites have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from trainer.methods.method import Edit

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel
    from trainer.attention.op import Op
    from trainer.attention.sites import Site


def installed(model: AttentionModel, op: Op, sites: Sequence[Site]) -> Edit:
    """Installs a kernel op without parameters; claims the kernel of each site."""
    model.host.install(op, sites)
    names = tuple(site.name for site in sites)
    return Edit(
        sites=names,
        claims=tuple((f"{model.denoiser_name}.{name}", "the kernel") for name in names),
    )
