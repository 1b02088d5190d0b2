"""Options of methods that edit a source by its attention maps, and the hooks they make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field

from trainer.common.field_words import Called
from trainer.methods.method import Edit, Method, Use

if TYPE_CHECKING:
    from trainer.attention.hooks import SamplingHook
    from trainer.attention.sites import Site
    from trainer.ops.editing.installed import Editor


def _has_length(window: tuple[float, float]) -> tuple[float, float]:
    first, last = window
    if not 0 <= first < last <= 1:
        raise ValueError(
            "an empty window of steps; give two shares of the steps, as in [0,0.8], or null for no "
            "step"
        )
    return window


Window = Annotated[
    tuple[float, float],
    AfterValidator(_has_length),
    Called("list of 2 shares of the steps, as in [0,0.8]"),
]


class SourceEdit(Method):
    """An edit whose source is generated or inverted beside it."""

    use: ClassVar[Use] = "sample"

    source: str | None = Field(
        None, description="the source's prompt; null takes the source_prompt of the sampling"
    )

    def edit_by(
        self, editor: Editor, sites: Sequence[Site], *, branch: Mapping[str, Any], **functions: Any
    ) -> Edit:
        """The edit of an editor whose source runs beside it. branch: of the `SourceBranch`;
        functions: of the hook."""
        from trainer.attention.hooks import SourceBranch
        from trainer.ops.editing.installed import editing_hook

        source = SourceBranch(self.source, needed=True, **branch)
        hook = editing_hook(self.name, editor, source, **functions)
        return Edit(tuple(site.name for site in sites), sampling=(hook,))


class Editing(Method):
    """An edit of what a source prompt shows, or of an inverted clip: how far its attention maps are
    the source's, and where the source stays."""

    edit: Literal["replace", "refine"] = Field(
        "replace",
        description="which words have the source's maps: replace, all, each that of the word in "
        "its place (both prompts have as many words); refine, those that the source has too",
    )
    cross_steps: Window | None = Field(
        (0.0, 0.8), description="steps in which cross-attention has the source's maps"
    )
    word_steps: dict[str, Window] = Field(
        {}, description="those of single words of the prompt, as in {cat: [0,0.3]}"
    )
    self_steps: Window | None = Field(
        (0.0, 0.4), description="steps in which self-attention has the source's maps"
    )
    self_tokens: int = Field(
        16 * 16, gt=0, description="of the sites with no more tokens than this many"
    )
    word_weights: dict[str, float] = Field(
        {}, description="factors on the maps of words of the prompt, as in {red: 2}"
    )
    blend: bool | tuple[str, ...] = Field(
        False,
        description="words outside of which the source stays as it is, found by their maps in "
        "both; true for those that differ, false to change all",
    )
    threshold: float = Field(
        0.3, gt=0, lt=1, description="of these maps, as a share of the largest value"
    )
    blend_from: float = Field(
        0.2, ge=0, lt=1, description="share of the steps before the source is put back"
    )
    blend_tokens: int = Field(
        16 * 16,
        gt=0,
        description="the largest grid whose maps make the mask; the finest of them do",
    )
    null_text: int = Field(
        10,
        ge=0,
        description="of an inverted source: most steps by which the unconditional embedding of "
        "each sampling step is optimised (arXiv 2211.09794); 0 for none, which is faster and does "
        "not guide the source",
    )

    def idle(self) -> dict[str, str]:
        unblended = dict.fromkeys(
            ("threshold", "blend_from", "blend_tokens"), "blend=false makes no mask"
        )
        found = {} if self.blend else unblended
        if self.self_steps is None:
            found["self_tokens"] = "self_steps=null leaves self-attention as it is"
        return found

    def edits(self, source: str | None, *, needed: bool, sites: str) -> SamplingHook:
        """source: its prompt, None for that of the sampling; needed: whether one must be given;
        sites: a selector of those whose maps are the source's."""
        from trainer.attention.hooks import SamplingHook, SourceBranch
        from trainer.ops.p2p import MapEdits, PromptToPrompt

        control = PromptToPrompt(
            MapEdits(
                owner=self.name,
                sites=sites,
                replace=self.edit == "replace",
                cross=self.cross_steps,
                words=self.word_steps,
                own=self.self_steps,
                tokens=self.self_tokens,
                weights=self.word_weights,
                blend=self.blend or False,
                threshold=self.threshold,
                blend_from=self.blend_from,
                blend_tokens=self.blend_tokens,
            )
        )
        return SamplingHook(
            open=control.open,
            after_step=control.after_step,
            close=control.close,
            source=SourceBranch(source, needed, self.null_text),
        )
