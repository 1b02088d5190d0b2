"""Weights of its own for the text, in attention layers that read image and text by the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from trainer.attention.op import Traits

if TYPE_CHECKING:
    from trainer.attention.call import SiteCall


class TextSpan(nn.Module):
    """What the text's keys and values differ by, in a layer whose K and V read image and text:

        y_i <- y_i + dW x_i + db    for the tokens i of the text alone; dW and db start at zero

    so that W + dW reads the text and W the image. layers: the layers to be changed, by their roles
    k and v; db is there where a layer has a bias.
    """

    name = "text_span"
    traits = Traits()

    def __init__(self, layers: Mapping[str, nn.Linear]) -> None:
        super().__init__()
        self.changes = nn.ModuleDict()
        for role, layer in layers.items():
            biased = getattr(layer, "bias", None) is not None
            change = nn.Linear(layer.in_features, layer.out_features, bias=biased)
            for parameter in change.parameters():
                nn.init.zeros_(parameter)
            self.changes[role] = change.to(layer.weight.device)

    def project(self, made: Tensor, x: Tensor, role: str, call: SiteCall) -> Tensor:
        """made (b, n, c) of x (b, n, c'), with the tokens of the text changed."""
        if role not in self.changes:
            return made
        text = call.spans(x.shape[1], keys=True).text
        changed = made[:, text] + self.changes[role](x[:, text]).to(made.dtype)
        return torch.cat([made[:, : text.start], changed, made[:, text.stop :]], dim=1)
