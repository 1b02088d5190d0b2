"""CODA-Prompt: keys and values are put together from a pool of parts, chosen by attention to the
prompt, and each task trains its own slice of the pool.

    alpha_m = cos(q (.) A_m, K_m),  p = sum_m alpha_m P_m,  keys <- [keys; p_K], values likewise
    L = L_diffusion + ortho * sum over sites of |P P^T - I|^2 + |K K^T - I|^2 + |A A^T - I|^2

Smith et al., CVPR 2023, arXiv 2211.13218, section 4. There q is the image's class token and the
prompts are prefixes of self-attention; here q is the mean text feature and the prefixes are those
of cross-attention (`trainer/ops/coda_prompt.py`). Training does not start at the base model: the
prompts act from the first step. Of M parts, task t of T has those from t M / T up to
(t + 1) M / T; earlier ones stay as they are, later ones do not exist yet. As in the authors' code,
a task starts with parts that Gram-Schmidt makes orthogonal to those of all earlier tasks, as these
were trained, and to each other. That code scales the penalty by 1e-6 and takes its mean, and its
default weight is 0; this is the paper's penalty.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, model_validator

from trainer.methods.method import Edit, EditKind, Method
from trainer.methods.shared.options import SELECTOR, NumTasks, SiteSelector, TaskNumber, check_task

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.attention.model import AttentionModel
    from trainer.ops.coda_prompt import PromptPool


class CodaPrompt(Method):
    """The pool, and which slice of it trains."""

    kind: ClassVar[EditKind] = "attention"
    systems: ClassVar[str] = "CODA-Prompt"
    paper: ClassVar[str] = "arXiv 2211.13218"

    pool: int = Field(100, gt=0, description="M, parts of a site for all tasks (100 in the paper)")
    length: int = Field(
        8, gt=0, multiple_of=2, description="tokens of a prompt, half keys and half values"
    )
    sites: SiteSelector = Field(
        "cross", description=f"cross-attention that gets prompts: {SELECTOR}"
    )
    task: TaskNumber = 0
    num_tasks: NumTasks = 5
    ortho: float = Field(0.1, ge=0, description="weight of the orthogonality penalty")

    @model_validator(mode="after")
    def _in_range(self) -> CodaPrompt:
        check_task(self.task, self.num_tasks)
        if self.pool < self.num_tasks:
            raise ValueError(
                f"pool={self.pool} has no part for each of num_tasks={self.num_tasks}; raise it"
            )
        return self

    def apply(self, model: AttentionModel) -> Edit:
        from trainer.attention.sites import require
        from trainer.ops.coda_prompt import PromptPool

        sites = require(model.sites, self.sites, "sites")
        if other := [site for site in sites if site.kind != "cross"]:
            raise ValueError(
                f"sites: {other[0].name} is {other[0].kind} attention, which gets no text to "
                "choose prompts by; select cross-attention, as in sites=cross"
            )
        bounds = [task * self.pool // self.num_tasks for task in range(self.task + 2)]
        counts = [end - start for start, end in pairwise(bounds)]
        pools = []
        trains: list[str] = []
        keeps: list[str] = []
        for site in sites:
            text = site.projection("k").in_features
            width = site.heads * site.head_dim
            pool = PromptPool(counts, self.length, width=width, text=text)
            model.host.install(pool, [site])
            pools.append(pool)
            for task, components in enumerate(pool.tasks):
                path = f"{model.denoiser_name}.{site.name}.{pool.name}.tasks.{task}"
                names = [f"{path}.{name}" for name, _ in components.named_parameters()]
                (trains if task == self.task else keeps).extend(names)
        return Edit(
            sites=tuple(site.name for site in sites),
            claims=tuple((name, "weight") for name in (*trains, *keeps)),
            trains=tuple(trains),
            keeps=tuple(keeps),
            loss=self._penalty(pools) if self.ortho else None,
            check_new_run=self._check_room({s.name: p for s, p in zip(sites, pools, strict=True)}),
            prepare=self._separate(pools),
        )

    def _check_room(self, pools: Mapping[str, PromptPool]) -> Callable[[], None]:
        """pools: by the names of their sites."""

        def check() -> None:
            for site, pool in pools.items():
                if self.pool > pool.room:
                    raise ValueError(
                        f"methods.coda_prompt: pool={self.pool}: at {site} no more than "
                        f"{pool.room} parts can be orthogonal to each other; choose a smaller pool"
                    )

        return check

    def _separate(self, pools: Sequence[PromptPool]) -> Callable[[Callable[[], None]], None]:
        def prepare(run: Callable[[], None]) -> None:
            for pool in pools:  # here, since the earlier tasks' parts are loaded by now
                pool.separate()

        return prepare

    def _penalty(self, pools: Sequence[PromptPool]) -> Callable[[object], Tensor]:
        def penalty(step: object) -> Tensor:
            import torch

            return self.ortho * torch.stack([pool.orthogonality() for pool in pools]).sum()

        return penalty
