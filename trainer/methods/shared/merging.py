"""What all methods that run attention on merged tokens have in common: where, and how much."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from trainer.methods.method import Edit, Method
from trainer.methods.shared.options import SELECTOR, SiteSelector

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel
    from trainer.attention.sites import Site
    from trainer.ops.reduction.merged_sites import Merging, Planner

TOKENS, FEED = "its tokens", "the tokens of its feed-forward layer"


class MergingMethod(Method):
    """Methods that merge tokens before a layer and unmerge what it makes of them. They train
    nothing."""

    sites: SiteSelector = Field("self", description=f"attention on merged tokens: {SELECTOR}")
    ratio: float = Field(
        0.5, ge=0, lt=1, description="share of the tokens that are merged into others; 0 for none"
    )
    finest: bool = Field(
        True,
        description="only those of the sites with the most tokens, where merging saves the most; "
        "all layers of a transformer",
    )
    feed_forward: bool = Field(
        False, description="also the feed-forward layers of the blocks around the sites"
    )
    proportional: bool = Field(
        False,
        description="in self-attention, a token that stands for s others counts s times (log s is "
        "added to its scores)",
    )

    def merged(self, model: AttentionModel, planner: Planner) -> Edit:
        """Installs what merges by `planner`.

        Raises:
            ValueError: the sites are none, or attention over time or of text alone.
        """
        from trainer.ops.reduction.merged_sites import (
            MergedFeed,
            MergedHeads,
            MergedInputs,
            SizesAsBias,
        )

        sites = self._chosen(model)
        installed: list[Merging] = []
        claims = []
        inside = [site for site in sites if site.keeps_processor and site.kind != "cross"]
        around = [site for site in sites if site not in inside]
        for kind, group in ((MergedInputs, around), (MergedHeads, inside)):
            if not group:
                continue
            op = kind(planner, self.name)
            model.host.install(op, group)
            installed.append(op)
            owned = [site for site in group if site.kind != "cross"]
            if self.proportional and owned:
                model.host.install(SizesAsBias(op), owned)
        claims += [(f"{model.denoiser_name}.{site.name}", TOKENS) for site in sites]
        if self.feed_forward:
            firsts = list({site.name.rpartition(".")[0]: site for site in sites[::-1]}.values())
            feed = MergedFeed(planner, self.name)
            model.host.install(feed, firsts)
            installed.append(feed)
            claims += [
                (f"{model.denoiser_name}.{site.name.rpartition('.')[0]}", FEED) for site in firsts
            ]
        names = tuple(site.name for site in sites)
        return Edit(names, claims=tuple(claims), report=lambda: _report(installed))

    def _chosen(self, model: AttentionModel) -> list[Site]:
        from trainer.attention.sites import require

        sites = require(model.sites, self.sites, "sites")
        for site in sites:
            if site.kind == "temporal" or site.text_alone:
                seen = "frames" if site.kind == "temporal" else "text alone"
                raise ValueError(
                    f"{site.name} attends over {seen}, and tokens of pictures are merged; choose "
                    "sites=self"
                )
        if self.finest:
            least = min((site.divisor for site in sites if site.divisor), default=None)
            sites = [site for site in sites if site.divisor == least]
        return sites


def _report(installed: Sequence[Merging]) -> Mapping[str, Sequence[str]]:
    """How many tokens each site ran on."""
    return {
        site: (f"{left:,} of {tokens:,} tokens",)
        for op in installed
        for site, (tokens, left) in op.counts.items()
    }
