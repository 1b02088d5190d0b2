"""Prompts that are composed for each input from a pool of learned parts, and appended to the keys
and values of the context.

CODA-Prompt, Smith et al., CVPR 2023 (arXiv 2211.13218), section 4:

    alpha_m = cos(q (.) A_m, K_m),  p = sum_m alpha_m P_m,  keys <- [keys; p_K], values likewise
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.attention.op import Traits

if TYPE_CHECKING:
    from trainer.attention.call import SiteCall


class Components(nn.Module):
    """The parts of one task: prompts P (m, length, width), keys K and attentions A (m, text), each
    set with orthonormal rows."""

    def __init__(self, count: int, *, length: int, width: int, text: int) -> None:
        super().__init__()
        self.prompts = nn.Parameter(_orthonormal(count, length * width).unflatten(1, (length, -1)))
        self.keys = nn.Parameter(_orthonormal(count, text))
        self.attentions = nn.Parameter(_orthonormal(count, text))


class PromptPool(nn.Module):
    """The parts of all tasks so far, `counts` of them each, at one cross-attention site.

    The query q (b, text) is the mean over what `to_k` gets, padding included: in a causal text
    encoder the padding has read the complete prompt, too. No gradient flows through it: the paper's
    query function is frozen. The prompt's tokens come after the context's, whose positions stay.
    """

    name = "coda_prompt"
    traits = Traits(owner="coda_prompt", appends=True)

    def __init__(self, counts: Sequence[int], length: int, width: int, text: int) -> None:
        super().__init__()
        self.tasks = nn.ModuleList(
            Components(count, length=length, width=width, text=text) for count in counts
        )
        self.added = length // 2
        self.room = min(text, length * width)  # so many parts can be orthogonal to each other

    def context(self, k_ctx: Tensor, v_ctx: Tensor, call: SiteCall) -> tuple[Tensor, Tensor]:
        call.scratch(self)["query"] = k_ctx.detach().mean(1)
        return k_ctx, v_ctx

    def kv(self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall) -> tuple[Tensor, Tensor, Tensor]:
        call.spans(k.shape[2], keys=True)  # refuses keys that are not the text's
        query = call.scratch(self)["query"]  # `context` ran just before
        keys, values = (
            half.unflatten(2, (k.shape[1], -1)).transpose(1, 2).to(k)  # b h l d
            for half in self.prompt(query).chunk(2, dim=1)
        )
        return q, torch.cat([k, keys], dim=2), torch.cat([v, values], dim=2)

    def mask(self, mask: Tensor | None, q: Tensor, k: Tensor, call: SiteCall) -> Tensor | None:
        """The prompt is seen by every query."""
        if mask is None:
            return None
        return F.pad(mask, (0, self.added), value=mask.dtype == torch.bool)

    def prompt(self, query: Tensor) -> Tensor:
        """q (b, text) to p (b, length, width)."""
        prompts, keys, attentions = self.parts()
        seen = F.normalize(query[:, None] * attentions, dim=2)
        alphas = torch.einsum("bmc,mc->bm", seen, F.normalize(keys, dim=1))
        return torch.einsum("bm,mle->ble", alphas, prompts)

    def orthogonality(self) -> Tensor:
        """sum over B in {P, K, A} of |B B^T - I|_F^2, the rows of B being the parts of all tasks.
        Earlier tasks' parts are frozen: they take part, but get no gradient."""
        sets = [part.flatten(1) for part in self.parts()]
        eye = torch.eye(len(sets[0])).to(sets[0])
        return torch.stack([(rows @ rows.T - eye).square().sum() for rows in sets]).sum()

    @torch.no_grad()
    def separate(self) -> None:
        """Sets the last task's parts orthonormal, and orthogonal to those of all earlier tasks, as
        training has left them: where a new task starts."""
        *earlier, own = self.tasks
        if not earlier:
            return
        for name, parameter in own.named_parameters():
            taken = torch.cat([task.get_parameter(name) for task in earlier]).flatten(1)
            parameter.copy_(orthonormal_beside(taken, parameter.flatten(1)).view_as(parameter))

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """P (M, length, width), K and A (M, text) of all tasks."""
        return self._all("prompts"), self._all("keys"), self._all("attentions")

    def _all(self, part: str) -> Tensor:
        return torch.cat([getattr(task, part) for task in self.tasks])


def orthonormal_beside(taken: Tensor, rows: Tensor) -> Tensor:
    """Gram-Schmidt: `rows` (m, c) made orthonormal and orthogonal to `taken` (n, c), whose own rows
    may be at any angle; n + m is at most c. In float64, since float32 leaves cosines of 1e-6."""
    every = torch.cat([taken, rows]).cpu().double()
    basis, _ = torch.linalg.qr(every.T)  # the first n columns span what `taken` spans
    return basis[:, len(taken) :].T.to(rows)


def _orthonormal(rows: int, columns: int) -> Tensor:
    return nn.init.orthogonal_(torch.zeros(rows, columns))
