"""eDiff-I's paint-with-words: words of the prompt attend to where they are painted.

    A = softmax((Q K^T + w M) / sqrt(d)),    w = w' log(1 + sigma) max(Q K^T)

Balaji et al., arXiv 2211.01324, section 5. M is 1 for the image tokens of a region and the text
tokens of its words. It has nothing to train, and at weight=0 the picture is that of the prompt:

    python -m trainer sample backbone=tiny prompt="a fox and a tree on a white background" \\
        'methods.ediff_i={boxes: {fox: [0, 0, 0.5, 1], tree: [0.5, 0, 1, 1]}}'

The paper has w' of no stated value; 0.4 is usual. Its experts for ranges of noise are not built.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import AfterValidator, Field

from trainer.common.field_words import Called
from trainer.methods.method import Edit, EditKind, Method
from trainer.methods.shared.options import SELECTOR, SiteSelector

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.attention.model import AttentionModel

ASPECT = "the painted words"
Corners = tuple[float, float, float, float]


def _inside(box: Corners) -> Corners:
    left, top, right, bottom = box
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise ValueError(
            "a box is left, top, right and bottom as shares of the picture, as in [0, 0, 0.5, 1] "
            "for its left half"
        )
    return box


Box = Annotated[Corners, AfterValidator(_inside), Called("box")]


class EdiffI(Method):
    """Which words are painted where, and how strongly."""

    kind: ClassVar[EditKind] = "attention"
    systems: ClassVar[str] = "eDiff-I (paint-with-words)"
    paper: ClassVar[str] = "arXiv 2211.01324"

    boxes: dict[str, Box] = Field(
        default_factory=dict,
        description="of words or phrases of the prompt, where each is: left, top, right and bottom "
        "as shares of the picture, as in {fox: [0, 0, 0.5, 1]}",
    )
    masks: dict[str, Path] = Field(
        default_factory=dict,
        description="likewise a picture of the shape of what is generated, white where the word is",
    )
    strengths: dict[str, float] = Field(
        default_factory=dict, description="of words that count more or less than 1"
    )
    weight: float = Field(0.4, ge=0, description="w', strength of all of it")
    sites: SiteSelector = Field(
        "cross", description=f"the attention to the text that follows the painting: {SELECTOR}"
    )

    def apply(self, model: AttentionModel) -> Edit:
        from trainer.attention.hooks import SamplingHook
        from trainer.attention.sites import require
        from trainer.ops.ediff_i import Painted, Painting

        sites = require(model.sites, self.sites, "sites")
        if other := [site for site in sites if site.kind != "cross"]:
            raise ValueError(
                f"sites: {other[0].name} is {other[0].kind} attention, in which words are not "
                "apart; select cross-attention, as in sites=cross"
            )
        op = Painted(self._regions(), self.strengths, weight=self.weight, shaped=self.masks)
        painting = Painting(op, self.sites)
        hook = SamplingHook(open=painting.open, close=painting.close)
        names = tuple(site.name for site in sites)
        claims = tuple((f"{model.denoiser_name}.{name}", ASPECT) for name in names)
        return Edit(names, claims=claims, sampling=(hook,))

    def _regions(self) -> dict[str, Tensor]:
        """Of each word; ValueError where there is none, one is painted twice, or not painted."""
        from trainer.media.images import read_image, to_tensor
        from trainer.ops.ediff_i import box_region

        if not self.boxes and not self.masks:
            raise ValueError(
                "nothing is painted; give boxes or masks of words, as in "
                "boxes={fox: [0, 0, 0.5, 1]}"
            )
        if both := sorted(self.boxes.keys() & self.masks.keys()):
            raise ValueError(f"{both[0]!r} has a box and a mask; give one of them")
        painted = {word: box_region(box) for word, box in self.boxes.items()}
        for word, path in self.masks.items():
            painted[word] = to_tensor(read_image(path.expanduser())).mean(0) / 2 + 0.5
            if not painted[word].max() > 0:
                raise ValueError(f"masks: {path} is all black; paint white where {word!r} is")
        if unknown := sorted(self.strengths.keys() - painted.keys()):
            raise ValueError(f"strengths: {unknown[0]!r} is not painted; give it a box or a mask")
        return painted
