"""IP-Adapter's attention to reference pictures, beside that to the text, at one site.

    O <- O + scale * Attn(Q, c W_k, c W_v)          c the tokens of the pictures

Ye et al., arXiv 2308.06721, equation 5. At sites of joint attention Q are the queries of the image,
in two forms: `concatenated`, as published for Stable Diffusion 3, where the keys are those of the
image too, [K; norm(c W_k)]; and `added`, as published for FLUX, where they are c W_k alone, Q is
the one before rotary positions, and the result is added after the layer's own output projection.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.attention.op import Traits
from trainer.data.references import REFERENCE
from trainer.kernels.softmax import softmax_attention
from trainer.ops.branches.reference_tokens import reference_tokens

if TYPE_CHECKING:
    from trainer.attention.call import SiteCall
    from trainer.attention.sites import Site

NAME = "ip_adapter"
MASKS, STRENGTH = "reference_mask", "reference_scale"  # inputs of sampling, beside the pictures
TOKENS, SHARES, SCALES = "ip_adapter", "ip_adapter_mask", "ip_adapter_scale"  # of the condition
ENCODER, PROJECTOR = "ip_adapter_encoder", "ip_adapter_projector"  # the extra modules
OWNER = Traits(owner=NAME)
NORM_EPS = 1e-6


def encode_pictures(model: Any, inputs: Mapping[str, Tensor], present: Tensor) -> dict[str, Tensor]:
    """Of b samples with k reference pictures each, inputs[REFERENCE] (b, k, 3, H, W) in [-1, 1]:
    their tokens (b, k, n, d), where `present` (b,) is not those of nothing; where in the picture
    each counts, (b, k, H, W) in [0, 1], where that is given; and how much, (b,).

    Raises:
        ValueError: masks that are not as many as the pictures.
    """
    pictures = inputs[REFERENCE]
    count = pictures.shape[1]
    made = reference_tokens(model, pictures, present, encoder=ENCODER, projector=PROJECTOR)
    found = {TOKENS: made}
    found[SCALES] = inputs.get(STRENGTH, pictures.new_ones(len(pictures))).to(pictures)
    if MASKS in inputs:
        masks = inputs[MASKS]
        if masks.shape[1] != count:
            raise ValueError(
                f"{MASKS}: {masks.shape[1]} masks for {count} reference pictures; give one for each"
            )
        found[SHARES] = masks
    return found


class ImageKeys(nn.Module):
    """Attention of image queries to the tokens of reference pictures. keys, values: the weights
    (heads * d, c) that it starts from; normed: whether the keys of each head are normalised."""

    def __init__(
        self, keys: Tensor, values: Tensor, *, heads: int, scale: float, normed: bool = False
    ) -> None:
        super().__init__()
        self.heads, self.scale = heads, scale
        self.to_k, self.to_v = _started_from(keys), _started_from(values)
        self.norm_k = nn.RMSNorm(len(keys) // heads, eps=NORM_EPS) if normed else nn.Identity()

    def forward(
        self, q: Tensor, call: SiteCall, own: tuple[Tensor, Tensor] | None = None
    ) -> Tensor | None:
        """(b, h, n, d) for queries q of the image, times the scales; None where no reference is
        given. own: keys and values of the image (b, h, n, d) that come before the others."""
        condition = call.ctx.condition
        if condition is None or TOKENS not in condition.further:
            return None
        further = condition.further
        tokens, shares = further[TOKENS], further.get(SHARES)
        scale = 1.0 if call.ctx.training else self.scale
        strength = (scale * further[SCALES])[:, None, None, None].to(q)
        if shares is None:
            return strength * self._attend(q, tokens.flatten(1, 2), call, own=own)
        grid = call.grid(q.shape[2], NAME)
        masks = F.interpolate(shares.to(q), grid, mode="bicubic").flatten(2)
        each = [
            masks[:, number, None, :, None] * self._attend(q, picture, call, own=own)
            for number, picture in enumerate(tokens.unbind(1))
        ]
        return strength * torch.stack(each).sum(0)

    def _attend(
        self, q: Tensor, tokens: Tensor, call: SiteCall, *, own: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        k, v = (
            made.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for made in (self.to_k(tokens), self.to_v(tokens))
        )
        k, v = self.norm_k(k).to(q), v.to(q)
        if own is not None:
            k, v = torch.cat([own[0], k], 2), torch.cat([own[1], v], 2)
        return softmax_attention(q, k, v, scale=call.scale)


class ImageBranch(nn.Module):
    """At sites of cross-attention, whose queries are the image's."""

    name = NAME
    traits = OWNER

    def __init__(self, image: ImageKeys) -> None:
        super().__init__()
        self.image = image

    def branch(self, o: Tensor, q: Tensor, call: SiteCall) -> Tensor:
        added = self.image(q, call)
        return o if added is None else o + added


class JointBranch(nn.Module):
    """`concatenated`, at sites of joint attention; text tokens get nothing."""

    name = NAME
    traits = OWNER

    def __init__(self, image: ImageKeys) -> None:
        super().__init__()
        self.image = image

    def kv(self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall) -> tuple[Tensor, Tensor, Tensor]:
        at = call.spans(k.shape[2], keys=True).image
        call.scratch(self)["own"] = k[:, :, at], v[:, :, at]
        return q, k, v

    def branch(self, o: Tensor, q: Tensor, call: SiteCall) -> Tensor:
        at = call.spans(q.shape[2]).image
        added = self.image(q[:, :, at], call, call.scratch(self)["own"])
        if added is None:
            return o
        return torch.cat([o[:, :, : at.start], o[:, :, at] + added, o[:, :, at.stop :]], 2)


class LateBranch(nn.Module):
    """`added`, at sites of joint attention: after the output projection."""

    name = NAME
    traits = OWNER

    def __init__(self, image: ImageKeys) -> None:
        super().__init__()
        self.image = image

    def tokens(self, x: Tensor, call: SiteCall) -> Tensor:
        call.scratch(self)["x"] = x
        return x

    def restore(self, y: Tensor, call: SiteCall) -> Tensor:
        q = _queries(call.site, call.scratch(self)["x"])
        added = self.image(q, call)
        return y if added is None else y + added.transpose(1, 2).flatten(2).to(y)


def _queries(site: Site, x: Tensor) -> Tensor:
    """The queries (b, h, n, d) of tokens (b, n, c), normalised as the layer does, and without
    positions."""
    norm: Any = getattr(site.module, "norm_q", None)
    q: Tensor = site.projection("q")(x)
    across = norm is not None and norm.weight.numel() != site.head_dim  # of all heads at once
    q = (norm(q) if across else q).unflatten(-1, (site.heads, -1))
    return (q if norm is None or across else norm(q)).transpose(1, 2)


def _started_from(weight: Tensor) -> nn.Linear:
    """A layer without bias whose weight is a copy, in fp32."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device)
    made.weight.data.copy_(weight.detach())
    return made
