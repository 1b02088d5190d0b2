"""Agent attention in place of softmax attention: a few agents read the keys, and queries read the
agents.

    o = softmax(q a^T + B2) softmax(a k^T + B1) v + DWC(v)

Han et al., arXiv 2312.08874. `pooled`: agents are means of the queries over the parts of the grid;
biases and the depthwise convolution train, from zero. `merged` is AgentSD, which trains nothing, on
the finest of the chosen grids: attention is over merged tokens (ToMe for diffusion, arXiv
2303.17604) in every step of sampling, and in the first part of the steps through agents, the
queries of tokens that are merged further. A model is trained beside it with softmax attention.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from trainer.methods.method import Edit, EditKind
from trainer.methods.shared.swap import Swap

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel

# options of merged agents
MERGED = ("cell", "ratio", "share", "query_power", "shortcut", "merge", "later_cell")


class AgentAttention(Swap):
    """Which agents, and where."""

    kind: ClassVar[EditKind] = "attention"
    systems: ClassVar[str] = "Agent Attention, AgentSD"
    paper: ClassVar[str] = "arXiv 2312.08874"

    agents: Literal["pooled", "merged"] = Field(
        "pooled",
        description="pooled agents are means of the queries and train; merged ones are AgentSD, "
        "which trains nothing",
    )
    side: int = Field(7, gt=1, description="with pooled: side x side agents (49 in the paper)")
    cell: int = Field(4, gt=1, description="with merged: one token in cell x cell always stays")
    ratio: float = Field(
        0.95, gt=0, le=1, description="with merged: share of the tokens that agents merge, at most"
    )
    share: float = Field(
        0.4, gt=0, le=1, description="with merged: part of the sampler's steps, the first ones"
    )
    query_power: float = Field(
        0.3, ge=0, description="with merged: the scale of q a^T is d^-0.5 to the power of this"
    )
    shortcut: float = Field(0.075, ge=0, description="with merged: share of v added to the output")
    merge: float = Field(
        0.4,
        ge=0,
        lt=1,
        description="with merged: share of the tokens that are averaged into others before "
        "attention, in every step; 0 for none",
    )
    later_cell: int = Field(
        2, gt=1, description="with merged: as cell, in the steps without agents"
    )

    @model_validator(mode="after")
    def _has_something_to_learn(self) -> AgentAttention:
        if self.agents == "merged" and self.distill:
            raise ValueError("merged agents learn nothing, so distill has no use; leave it out")
        return self

    def idle(self) -> dict[str, str]:
        other = "pooled" if self.agents == "merged" else "merged"
        own = ("side",) if other == "pooled" else MERGED
        why = f"agents is {self.agents}; it is for {other}"
        return super().idle() | dict.fromkeys(own, why)

    def apply(self, model: AttentionModel) -> Edit:
        from trainer.ops.agent_attention import MergedAgents, PooledAgents

        if self.agents == "pooled":
            return self.swap(model, lambda _, site: PooledAgents(site, self.side))
        return self.swap(
            model,
            lambda *_: MergedAgents(
                cell=self.cell,
                ratio=self.ratio,
                share=self.share,
                query_power=self.query_power,
                shortcut=self.shortcut,
                merge=self.merge,
                later_cell=self.later_cell,
            ),
            finest=True,
        )
