"""Video-P2P: Tune-A-Video whose frames read the first frame alone, and whose clips are edited by
their prompts as Prompt-to-Prompt edits pictures.

    o_i = softmax(q_i k_0^T / sqrt(d)) v_0    in self-attention, frame i
    A  <- A_source R                          while an edit is sampled, in each frame

Liu et al., arXiv 2303.04761, section 3. To train, add the queries, as in `tune_a_video`:
`selective` with `sites=all projections=[q]`. To edit, `sample adapter=<run> source=<clip>` with
`source_prompt` and `prompt`: the clip is inverted, one unconditional embedding a step, shared by
all frames, is optimised until its guided reconstruction is the clip (section 3.2), and source and
edit are sampled together; the edit is guided from the plain unconditional embedding. Defaults of
the released code, but that it has a mask for the words that differ.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from trainer.methods.method import Edit, EditKind
from trainer.methods.shared.aligned import Inflated
from trainer.methods.shared.editing import Editing, Window

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel


class VideoP2P(Inflated, Editing):
    """Which attention is inflated, who trains it, and how clips are edited."""

    kind: ClassVar[EditKind] = "structure"
    systems: ClassVar[str] = "Video-P2P"
    paper: ClassVar[str] = "arXiv 2303.04761"
    when_sampling: ClassVar[frozenset[str]] = frozenset(Editing.model_fields)

    cross_steps: Window | None = Field(
        (0.0, 0.2), description="steps in which cross-attention has the source's maps"
    )
    self_steps: Window | None = Field(
        (0.0, 0.5), description="steps in which self-attention has the source's maps"
    )
    self_tokens: int = Field(
        32 * 32, gt=0, description="of the sites with no more tokens than this many"
    )
    blend: bool | tuple[str, ...] = Field(
        True,
        description="words outside of which the source stays as it is, found by their maps in "
        "both; true for those that differ, false to change all",
    )

    def apply(self, model: AttentionModel) -> Edit:
        edit = self.inflated(model, ("first",))
        hook = self.edits(None, needed=False, sites="self | cross")
        return replace(edit, sampling=(hook,))
