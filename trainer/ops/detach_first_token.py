"""Small attention ops without parameters of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainer.attention.op import Traits

if TYPE_CHECKING:
    from trainer.attention.call import SiteCall


class DetachFirstToken:
    """Stops the gradient of k and v at the first context token; values stay as they are.

        k <- [sg(k_0), k_1, ..., k_m],  v likewise

    The first token (BOS) is the same in every caption, so training through it would teach it the
    new concept and leak that into all prompts. Custom Diffusion, Kumari et al., CVPR 2023 (arXiv
    2212.04488).
    """

    name = "detach_first_token"
    traits = Traits()

    def kv(self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall) -> tuple[Tensor, Tensor, Tensor]:
        call.spans(k.shape[2], keys=True)  # refuses keys that are not the text's
        return q, _detach_first(k), _detach_first(v)


def _detach_first(x: Tensor) -> Tensor:
    return torch.cat([x[:, :, :1].detach(), x[:, :, 1:]], dim=2)  # b h m d
