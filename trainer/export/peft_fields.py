"""What a peft configuration says of its adapter: how strongly it acts, and where it started.

Some starts of peft take a part out of W0 and put it into A and B, so that the adapter is to be
added to what is left of W0. PiSSA's and OLoRA's part is computed from W0 again and subtracted; the
others depend on data or chance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from torch import Tensor

from trainer.export.bundle import DoRADelta, LowRankDelta

Fields = Mapping[str, Any]
Pair = LowRankDelta | DoRADelta
# starts that leave W0 as it is, because B or A is zero, or B A
KEEPING = ("true", "false", "gaussian", "eva", "orthogonal", "mica")
CONVERT = (
    "in the run that made it, save it with model.save_pretrained(folder, "
    "path_initial_model_for_weight_conversion=<the adapter saved before its first step>), which "
    "makes a plain LoRA of it"
)
MERGE = (
    "fold it into the model that it was trained on with merge_and_unload(), and train on that with "
    "backbone=<folder>"
)
STARTS = {
    "pissa_niter": f"a start drawn at random ({CONVERT})",
    "corda": f"a start from the inputs of its own data ({CONVERT})",
    "lora_ga": f"a start from the gradients of its own data ({CONVERT})",
    "loftq": f"a model that was quantised for it ({MERGE})",
}
# other fields that change what the matrices do
OTHERS = {
    "alora_invocation_tokens": "acts only after certain words (aLoRA)",
    "layer_replication": "is for a model with repeated layers",
    "use_qalora": "pools the inputs of A (QALoRA)",
    "use_bdlora": "has block-diagonal matrices (BD-LoRA)",
    "arrow_config": "chooses among experts (Arrow)",
    "kasa_config": "is a KaSA adapter, whose singular values are no part of its matrices",
    "target_parameters": "adapts parameters that are no layers",
    "megatron_config": "is for a model in parallel slices (Megatron)",
}


def check_fields(fields: Fields) -> None:
    """Checks that an adapter of this configuration can be read.

    Raises:
        ValueError: it starts from a changed W0 that cannot be computed again, or is of another kind
            than LoRA and DoRA; the message says what to do.
    """
    start = _start(fields)
    if start not in (*KEEPING, "pissa", "olora"):
        kind = next((name for name in STARTS if start.startswith(name)), None)
        if kind is None:
            raise ValueError(
                f"the adapter has init_lora_weights={start}, a start that is not known here; it "
                f"may have changed the model's own weights ({CONVERT})"
            )
        raise ValueError(
            f"the adapter has init_lora_weights={start}, which changed the model's own weights: it "
            f"needs {STARTS[kind]}"
        )
    for name, what in OTHERS.items():
        if fields.get(name):
            raise ValueError(f"the adapter has {name}, so it {what}; {MERGE}")


def _start(fields: Fields) -> str:
    found = fields.get("init_lora_weights")
    return "true" if found is None else str(found).lower()


def strength(fields: Fields, name: str, rank: int) -> float:
    """A layer's factor alpha / r by a peft configuration (alpha / sqrt(r) for rsLoRA); 1 if the
    configuration has no alpha. rank: of its matrices, which is r, but for those that were taken out
    of a W0 with fewer directions than r."""
    given = fields.get("lora_alpha", fields.get("alpha"))
    if given is None:
        return 1.0
    patterns = fields.get("alpha_pattern") or {}
    module = name.partition(".")[2]
    alpha: Any = patterns.get(get_pattern_key(list(patterns), module), given)
    if _start(fields) not in KEEPING:
        rank = max(rank, rank_in(fields, name))
    return float(alpha) / (rank**0.5 if fields.get("use_rslora") else rank)


def rank_in(fields: Fields, name: str) -> int:
    """A layer's rank by a peft configuration, for a LoKr whose tensors do not show it."""
    patterns = fields.get("rank_pattern") or {}
    own = get_pattern_key(list(patterns), name.partition(".")[2])
    rank: Any = patterns.get(own, fields.get("r", 1))
    return int(rank)


@torch.no_grad()
def without_start(fields: Fields, delta: Pair, weight: Tensor) -> Pair:
    """The delta to W0 (out, in) of a pair that was trained from a part of W0: twice the rank, B A
    of the file minus the start's."""
    start = _start(fields)
    if start in KEEPING:
        return delta
    down, up = _pissa(weight, delta.rank) if start == "pissa" else _olora(weight, delta.rank)
    scale = delta.scale if start == "olora" else 1.0
    both = torch.cat([delta.up * delta.scale, -scale * up], dim=1)
    return replace(delta, down=torch.cat([delta.down, down]), up=both, scale=1.0)


def _pissa(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The `rank` largest singular directions of W0 (arXiv 2404.02948, equations 2 and 3); peft
    divides them by the adapter's strength, which then multiplies them again."""
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    root = s[:rank].sqrt()
    return root[:, None] * v[:rank], u[:, :rank] * root


def _olora(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The first rows of R and columns of Q of W0 = Q R (arXiv 2406.01775)."""
    q, r = torch.linalg.qr(weight)
    return r[:rank], q[:, :rank]
