"""The subspace of the inputs of earlier tasks, stored as in DualGPM: by a basis of the subspace
while that is small, by a basis of its complement once that is smaller.

DualGPM: Liang and Li, CVPR 2023, as InfLoRA uses it (arXiv 2404.00228). All of it is worked out in
the complement, which both bases describe: `free`, orthonormal columns (d, f) in float64 that span
what no earlier task uses. `kept` is what is stored, (d, d // 2) with unused columns zero: the same
shape after any number of tasks. H is the moment sum x x^T (d, d) of a task's inputs, see
`input_moments.input_moments`; its trace is the inputs' energy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.ops.adapters.input_moments import leading
from trainer.ops.exact import in_float64

ROUNDING = 1e-13  # of the energy: what float64 leaves open when all of it is asked for


def unpack(kept: Tensor, complement: bool) -> Tensor:
    """`free` from what is stored; orthonormal again, since it was stored in single precision."""
    columns = in_float64(kept[:, kept.square().sum(0) > 0.5])
    basis, _ = torch.linalg.qr(columns, mode="complete")
    count = columns.shape[1]
    return basis[:, :count] if complement else basis[:, count:]


def pack_subspace(free: Tensor) -> tuple[Tensor, bool]:
    """`kept`, and whether it holds the complement of the old tasks' subspace."""
    width, count = free.shape
    complement = count <= width // 2
    basis, _ = torch.linalg.qr(free, mode="complete")
    columns = basis[:, :count] if complement else basis[:, count:]
    kept = free.new_zeros(width, width // 2)
    kept[:, : columns.shape[1]] = columns
    return kept, complement


def design(free: Tensor, moment: Tensor, rank: int) -> Tensor:
    """Unit rows (rank, d): where a new task's inputs vary most within what the old ones leave free.
    Rows beyond what is free are zero."""
    rows = leading(free.T @ moment.to(free) @ free, rank) @ free.T
    return torch.cat([rows, rows.new_zeros(rank - len(rows), rows.shape[1])])


def claim(free: Tensor, moment: Tensor, energy: float) -> Tensor:
    """What is still free after a task: the fewest directions are taken with which the old subspace
    and they hold the share `energy` of the task's inputs."""
    inner = free.T @ moment.to(free) @ free
    values, vectors = torch.linalg.eigh(inner)
    total = moment.to(free).trace()
    kept = torch.cat([total - values.sum()[None], values.flip(0)]).cumsum(0)
    wanted = total * min(energy, 1 - ROUNDING)
    taken = int((kept < wanted).sum())
    return free @ vectors.flip(1)[:, min(taken, free.shape[1]) :]
