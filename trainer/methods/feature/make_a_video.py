"""Make-A-Video: pseudo-3D layers, a convolution over frames after each spatial one and attention
over frames after each spatial attention, which alone learn from clips.

    ConvP3D(h) = Conv1D(Conv2D(h)),  Conv1D the identity at first
    AttnP3D(h) = h' + W_o attention(h') over frames,  h' = Attn2D(h), W_o zero at first

Singer et al., arXiv 2209.14792, section 3.2, equations 2 and 3, and section 3.3: frames a second
are one more condition, embedded and added as the timestep is, zero at first here. Clips need no
captions. The paper trains on no images after the layers are inserted; here images bypass them and
stay as the image model generates them.

A transformer has no convolutions between its blocks and gets the attention and the frame rate
alone; in a U-Net the convolutions of shortcuts and of resampling are left as they are. The paper
does not describe how the attention tells frames apart; here sines of their number are added.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from trainer.methods.method import Edit, EditKind
from trainer.methods.shared.temporal import DefaultRate, PseudoThreeD, frame_rate

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel


class MakeAVideo(PseudoThreeD):
    """Pseudo-3D layers and the embedding of frames a second."""

    kind: ClassVar[EditKind] = "structure"
    systems: ClassVar[str] = "Make-A-Video"
    paper: ClassVar[str] = "arXiv 2209.14792"

    fps: DefaultRate = 8.0

    def apply(self, model: AttentionModel) -> Edit:
        items = [frame_rate(model, self.fps), *self.layers(model, "sines")]
        return self.inserted(model, items)
