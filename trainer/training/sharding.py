"""Shards the denoiser of a run over its ranks with FSDP2, PyTorch's `fully_shard` (Zhao et al.,
arXiv 2304.11277, by parameter): each rank holds a part of every weight, frozen ones included, and
has a block whole while it computes with it.

`fsdp` shards over all ranks; `hsdp` shards over the devices of a node, and every node has a copy.
Text encoders, the VAE and single numbers are whole on every rank, which takes the mean of
their gradients.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from trainer.backbones.backbone import Backbone
from trainer.config.run_section import RunSpec
from trainer.methods.apply import Plan
from trainer.methods.method import Edit, Method
from trainer.training.distributed import local_part, mean_of_ranks, num_ranks

BETWEEN = {
    "loss": "adds a loss of its own",
    "schedule": "changes the model before each step",
    "at_step": "changes the model before each step",
    "finish": "looks at the data after the last step",
}


def check_sharded(
    run: RunSpec,
    methods: Mapping[str, Method],
    plan: Plan,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Raises ValueError where a run that shards has a method that reads or changes a model which
    must be whole for that, or computes in fp16. dtype: what it computes in, where that is known."""
    if not run.shards:
        return
    if dtype == torch.float16:
        raise ValueError(
            f"run.strategy={run.strategy} does not go with fp16, in which this backbone is "
            "published; give run.precision=bf16 or fp32"
        )
    for name, edit in plan.edits.items():
        if (why := _not_sharded(methods.get(name), edit)) is not None:
            raise ValueError(
                f"run.strategy={run.strategy} does not go with methods.{name}, which {why}; give "
                "run.strategy=ddp"
            )


def _not_sharded(method: Method | None, edit: Edit) -> str | None:
    """Why a method needs a whole model, or None."""
    if method is not None and method.kind == "storage":
        return "stores weights in a form whose parts do not stand alone"
    for field, what in BETWEEN.items():
        if getattr(edit, field) is not None:
            return f"{what}, for which it must be whole"
    return None


def shard(backbone: Backbone, run: RunSpec, *, trained: Mapping[str, nn.Parameter]) -> None:
    """Shards the denoiser of a backbone on every rank, in place; parameters keep their names.

    Raises:
        ValueError: something holds a trained parameter outside of its module, and would go on with
            a copy that does not train.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    kind = backbone.device.type
    if run.strategy == "hsdp":
        mesh = init_device_mesh(kind, (run.nodes, run.devices), mesh_dim_names=("copy", "shard"))
    else:
        mesh = init_device_mesh(kind, (num_ranks(),), mesh_dim_names=("shard",))
    parts = {value for value in backbone.denoiser.parameters() if value.ndim}
    before = {name: weakref.ref(value) for name, value in trained.items() if value in parts}
    for name, value in trained.items():
        if name not in before:  # every rank has all of it, and its own gradient
            value.register_hook(mean_of_ranks)
    alone = {value for value in backbone.denoiser.parameters() if not value.ndim}
    for module in (*blocks_of(backbone), backbone.denoiser):
        fully_shard(module, mesh=mesh, ignored_params=alone)
    del trained, parts, value
    held = [name for name, found in before.items() if found() is not None]
    if held:
        raise ValueError(
            f"run.strategy={run.strategy}: {held[0]} is held outside of its module, so its method "
            "cannot be sharded; give run.strategy=ddp"
        )


def blocks_of(backbone: Backbone) -> list[nn.Module]:
    """The blocks that hold attention, inner ones first: what is whole at the same time."""
    names = {site.name.rpartition(".")[0] for site in backbone.sites} - {""}
    ordered = sorted(names, key=lambda name: (-name.count("."), name))
    return [backbone.denoiser.get_submodule(name) for name in ordered]


def resident_bytes(values: Mapping[str, Tensor]) -> int:
    """Bytes of these tensors that are on this rank between steps."""
    parts = [local_part(each) for each in values.values()]
    return sum(each.numel() * each.element_size() for each in parts)
