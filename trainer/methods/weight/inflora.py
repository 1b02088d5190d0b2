"""InfLoRA: a LoRA for every task of a sequence reads only input directions that no earlier task
uses, so that learning a new task leaves the earlier ones unchanged.

    W_t = W_0 + sum_{t' <= t} B_t' A_t',  A_t' fixed, B_t trained from zero
    A_t = the r directions in which the new task's inputs H_t, less their part in M_t, vary most
    A_t x = 0 for every x in span(M_t), the subspace of the earlier tasks' inputs

Liang and Li, arXiv 2404.00228 (the paper calls the fixed matrix B and the trained one A). After
task t, M grows until it holds the share eps_t of that task's input energy; eps_t goes from
`energy[0]` towards `energy[1]` (`trainer/ops/adapters/subspace.py`). Energy is |H|_F^2 as in the
paper; the authors' code squares the eigenvalues of the covariance, which takes fewer directions,
and divides A by sqrt(3), which is left to alpha here.

The inputs of a new task are read before its first step, for A, and again after its last, for M: by
then the new tokens have moved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, model_validator

from trainer.methods.method import Edit, EditKind
from trainer.methods.shared.lowrank import LowRank, Projections, Rank, Sites, edit_of
from trainer.methods.shared.options import NumTasks, TaskNumber, check_task

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel

KEPT, COMPLEMENT = "inflora_kept", "inflora_complement"


class Inflora(LowRank):
    """Options of low rank, on linear layers only, and which task trains."""

    kind: ClassVar[EditKind] = "adapt"
    systems: ClassVar[str] = "InfLoRA"
    paper: ClassVar[str] = "arXiv 2404.00228"

    rank: Rank = 10
    sites: Sites = "cross"
    projections: Projections = ("k", "v")
    task: TaskNumber = 0
    num_tasks: NumTasks = 5
    energy: tuple[float, float] = Field(
        (0.95, 1.0),
        description="share eps of a task's input energy that M keeps: of the first task, and what "
        "it would be after the last, linear in between",
    )

    @model_validator(mode="after")
    def _in_range(self) -> Inflora:
        check_task(self.task, self.num_tasks)
        if not 0 < self.energy[0] <= self.energy[1] <= 1:
            raise ValueError(f"energy={list(self.energy)} must rise within 0 and 1")
        return self

    @property
    def linear(self) -> bool:
        return True

    def apply(self, model: AttentionModel) -> Edit:
        from torch import nn

        from trainer.ops.adapters.inject import base_layer, layer_of, stack

        targets = self.targets(model)
        for target in targets:
            if isinstance(base_layer(layer_of(model, target)), nn.Conv2d):
                raise ValueError(f"layers: {target.path} is a convolution; name linear layers")
        tasks = stack(model, targets, self.config, owner=self.name, count=self.task + 1)
        trains = tuple(name for name in tasks[-1] if ".lora_B." in name)
        keeps = [name for names in tasks for name in names if name not in trains]
        layers = {target.path: layer_of(model, target) for target in targets}
        for path, layer in layers.items():
            keeps += _add_memory(layer, path)
        prepare, finish = self._design(layers), self._remember(layers)
        return edit_of(targets, trains, keeps, prepare=prepare, finish=finish)

    def _design(self, layers: Mapping[str, Any]) -> Callable[[Callable[[], None]], None]:
        def prepare(run: Callable[[], None]) -> None:
            import torch

            from trainer.ops.adapters.input_moments import input_moments
            from trainer.ops.adapters.subspace import design, unpack

            moments = input_moments(layers, run)
            for path, layer in layers.items():
                free = unpack(getattr(layer, KEPT), bool(getattr(layer, COMPLEMENT)))
                if not free.shape[1]:
                    raise ValueError(
                        f"methods.inflora: earlier tasks use all {len(free)} input directions of "
                        f"{path}, so nothing is left to learn with; train them with a lower energy"
                    )
                matrix = layer.lora_A[layer.active_adapters[-1]].weight
                with torch.no_grad():
                    matrix.copy_(design(free, moments[path], len(matrix)))

        return prepare

    def _remember(self, layers: Mapping[str, Any]) -> Callable[[Callable[[], None]], None]:
        first, last = self.energy
        energy = first + (last - first) * self.task / self.num_tasks

        def finish(run: Callable[[], None]) -> None:
            import torch

            from trainer.ops.adapters.input_moments import input_moments
            from trainer.ops.adapters.subspace import claim, pack_subspace, unpack

            moments = input_moments(layers, run)
            for path, layer in layers.items():
                free = unpack(getattr(layer, KEPT), bool(getattr(layer, COMPLEMENT)))
                kept, complement = pack_subspace(claim(free, moments[path], energy))
                with torch.no_grad():
                    getattr(layer, KEPT).copy_(kept)
                    getattr(layer, COMPLEMENT).fill_(complement)

        return finish


def _add_memory(layer: Any, path: str) -> list[str]:
    """An empty M beside the adapters of a layer; the names of its two buffers."""
    import torch

    weight = layer.lora_A[layer.active_adapters[0]].weight
    width = weight.shape[1]
    layer.register_buffer(KEPT, weight.new_zeros(width, width // 2))
    layer.register_buffer(COMPLEMENT, torch.zeros((), dtype=torch.bool, device=weight.device))
    return [f"{path}.{KEPT}", f"{path}.{COMPLEMENT}"]
