"""DiffuMask: pictures with a mask for each of some words, made of the attention that generated
them.

    M = mean over layers of resize(A_word) / max,   mask = M > threshold

Wu et al., ICCV 2023, arXiv 2303.11681. It changes nothing of the picture, and nothing trains: what
it makes trains a segmenter of real pictures (`python bench/editing.py --only diffumask`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from trainer.methods.method import Edit, EditKind, Method, Use

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel

ASPECT = "the masks of words"


class DiffuMask(Method):
    """Which words get a mask, and where it ends."""

    kind: ClassVar[EditKind] = "attention"
    use: ClassVar[Use] = "sample"
    systems: ClassVar[str] = "DiffuMask"
    paper: ClassVar[str] = "arXiv 2303.11681"

    mask_words: tuple[str, ...] = Field(
        ("fox",), min_length=1, description="words of the prompt, a mask for each"
    )
    threshold: float = Field(0.5, gt=0, lt=1, description="of the average map, of 0 to 1")
    mask_tokens: int = Field(64 * 64, gt=0, description="the largest grid whose maps are read")

    def apply(self, model: AttentionModel) -> Edit:
        from trainer.attention.sites import require
        from trainer.ops.diffumask import MaskMaker, WordMasks
        from trainer.ops.editing.installed import editing_hook

        told = WordMasks(
            self.name, self.mask_words, threshold=self.threshold, tokens=self.mask_tokens
        )
        maker = MaskMaker(told)
        sites = require(model.sites, "cross", "sites")
        hook = editing_hook(self.name, maker, None, shown=maker.shown)
        names = tuple(site.name for site in sites)
        claims = tuple((f"{model.denoiser_name}.{name}", ASPECT) for name in names)
        return Edit(names, claims=claims, sampling=(hook,))
