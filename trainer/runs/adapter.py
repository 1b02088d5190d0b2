"""The adapter: one safetensors file that holds exactly the trained tensors by parameter name, the
frozen tensors that methods store beside them, and the recipe in its header."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainer.backbones import load_backbone
from trainer.backbones.device import CPU, Placement, place
from trainer.backbones.held_layers import reading
from trainer.backbones.retarget import resolved, retarget
from trainer.common.adapter_header import HEADER
from trainer.config import load
from trainer.config.header import ADAPTER_FORMAT, read_header
from trainer.config.lineage import spec_of
from trainer.data.identity import LETTERS, sha256_of_file
from trainer.methods.apply import apply_methods
from trainer.runs.run_folder import run_of_adapter, step_of_kept
from trainer.runs.sampling_methods import sampling_methods
from trainer.runs.scale_adapter import Scale, copy_scaled, scale_by_method

if TYPE_CHECKING:
    from trainer.backbones.backbone import Backbone
    from trainer.backbones.spec import BackboneSpec
    from trainer.methods.apply import Plan
    from trainer.methods.method import Method


def save_adapter(
    path: Path,
    tensors: Mapping[str, Tensor],
    tree: Mapping[str, Any],
    identity: Mapping[str, str],
) -> None:
    """Writes an adapter. The file is written under another name and then renamed, so that a full
    disk leaves no incomplete file.

    tree: the recipe; identity: what the backbone is (`Backbone.identity`).

    Raises:
        OSError: the file could not be written; its number is the system's.
    """
    facts = {"format": ADAPTER_FORMAT, "recipe": dict(tree), "backbone": dict(identity)}
    # in one entry, since safetensors writes several entries in an order that changes between calls
    metadata = {HEADER: json.dumps(facts, sort_keys=True)}
    part = path.with_name(f".{path.name}.part")
    try:
        save_file(
            {name: value.detach().cpu().contiguous() for name, value in tensors.items()},
            part,
            metadata,
        )
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except SafetensorError as error:  # how safetensors reports a full disk
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(
            int(number[1]) if number else errno.EIO,
            f"the adapter was not written: {error}",
            str(path),
        ) from None
    finally:
        part.unlink(missing_ok=True)


def adapter_facts(path: Path) -> dict[str, Any]:
    """The name of an adapter, of a run that of its recipe and its own, the hash of the file, and
    its step where the run has kept it along the way."""
    digest, run, step = sha256_of_file(path)[:LETTERS], run_of_adapter(path), step_of_kept(path)
    name = f"{run.parent.name}/{run.name}" if (run / "recipe.yaml").is_file() else path.stem
    if name == "adapter":  # one that ships, in a folder of its name
        name = run.name
    facts = {"adapter": name, "adapter_sha256": digest}
    return facts if step is None else {**facts, "step": step}


def check_backbone(
    path: Path,
    stored: Mapping[str, str],
    own: Mapping[str, str],
    *,
    other: str | None = None,
) -> None:
    """Checks that a file's backbone, as `stored` describes it, is the loaded one, or that of
    `other`, an adapter.

    Raises:
        ValueError: it is another one; the message names both.
    """
    for part, value in stored.items():
        if part != "name" and own.get(part) != value:
            here, mend = f"{other} on", "give adapters of one backbone"
            if other is None:
                here, mend = "the one loaded is", "give the backbone that it was trained on"
            raise ValueError(
                f"adapter={path} was trained on backbone {stored.get('name')} ({part} {value}); "
                f"{here} {own.get('name')} ({part} {own.get(part)}); {mend}"
            )


def check_tensors(path: Path, tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Checks that a file's tensors are those the model stores.

    Raises:
        ValueError: a missing or additional name, another shape, or a value that is not finite.
    """
    missing, extra = sorted(set(wanted) - set(tensors)), sorted(set(tensors) - set(wanted))
    if missing or extra:
        raise ValueError(
            f"adapter={path} does not fit its recipe: the model stores "
            f"{missing[:3] or 'nothing more'}, which the file "
            f"lacks; the file holds {extra[:3] or 'nothing more'}, which the model does not store"
        )
    for name, own_value in wanted.items():
        check_shape(path, name, tuple(tensors[name].shape), own=tuple(own_value.shape))
        if not torch.isfinite(tensors[name]).all():
            raise ValueError(
                f"adapter={path}: {name} holds values that are not finite; its training diverged, "
                "train again with a smaller optim.lr"
            )


def check_shape(path: Path, name: str, stored: tuple[int, ...], *, own: tuple[int, ...]) -> None:
    """Raises ValueError for a tensor that has one shape in a file and another in the model."""
    if stored != own:
        raise ValueError(f"adapter={path}: {name} is {stored} in the file and {own} in the model")


def load_adapted(
    path: Path,
    backbone: str | None = None,
    placement: Placement = CPU,
    *,
    scale: Scale = 1.0,
    sampling: Mapping[str, Any] | None = None,
) -> tuple[Backbone, dict[str, Any]]:
    """The model that an adapter makes of its backbone, frozen, in eval mode and placed, and its
    recipe.

    Args:
        backbone: a name or folder to use instead of the recipe's own; it must have the same shapes.
        placement: where it runs, and in which precision.
        scale: of what the adapter changes, or of what some of its methods do, by their names; see
            `scale_adapter`.
        sampling: by method, options of the adapter's methods that are for sampling alone, and
            options of further methods, which train nothing.

    Raises:
        ValueError: see `read_header`, `check_backbone`, `check_tensors`, `scale_by_method` and
            `sampling_methods`.
    """
    tree, _ = read_header(path)
    own, further = sampling_methods(tree["methods"], sampling or {})
    spec, name = spec_of(tree, backbone), backbone or tree["backbone"]
    loaded = load_base(spec, name, placement, hold=False, read_held=True)
    plan = _add(path, loaded, scale, methods=own)
    if further:
        apply_methods(loaded, further, trains=False, over=plan.edits)
    place(loaded.eval().requires_grad_(False), placement, plan.stored)
    return loaded, tree


def load_base(
    spec: BackboneSpec,
    name: str,
    placement: Placement = CPU,
    hold: bool = True,
    read_held: bool = False,
) -> Backbone:
    """The backbone that a spec describes, frozen, in eval mode and placed. If it is the result of
    earlier runs, their methods are applied and their tensors loaded.

    hold: as of `place`. read_held: parts that are stored in what their layers will be held in are
    read so, see `Placement.read_in`; not for what is to be written in fp32.

    Raises:
        ValueError: see `load_backbone` and `load_adapted`.
    """
    with reading(placement.read_in) if read_held else nullcontext():
        loaded = place(load_backbone(spec, name), placement, hold=False)
    for path in map(Path, spec.adapters):
        plan = _add(path, loaded)
        for edit in plan.edits.values():
            if edit.schedule is not None:  # that run is finished, so its schedule is at the end
                edit.schedule(1.0)
        loaded.include_adapter(path)
    return place(loaded.eval().requires_grad_(False), placement, hold=hold)


def _add(
    path: Path,
    backbone: Backbone,
    scale: Scale = 1.0,
    *,
    methods: Mapping[str, Method] | None = None,
) -> Plan:
    """Applies an adapter's methods to a backbone and copies its tensors. methods: in the place of
    its own, where options of sampling are others."""
    tree, stored = read_header(path)
    check_backbone(path, stored, backbone.identity())
    retarget(backbone, tree.get("objective") or {})
    methods = methods or load.methods_of(tree["methods"])
    scales = scale_by_method(path, methods, scale)
    plan = apply_methods(backbone, methods)
    own = _tensors(backbone)
    wanted = {key: own[key] for key in plan.stored}
    tensors = load_file(path)
    check_tensors(path, tensors, wanted)
    if set(scales.values()) <= {1}:
        _copy(tensors, wanted)
    else:
        of_tensors = {key: scales[name] for name, edit in plan.edits.items() for key in edit.stored}
        copy_scaled(backbone, tensors, wanted, scales=of_tensors)
    return plan


def check_start(path: Path, backbone: Backbone, objective: Mapping[str, Any]) -> None:
    """Checks that a run with this objective may continue from an earlier adapter.

    Raises:
        ValueError: what the earlier run's network predicts is something else.
    """
    tree, _ = read_header(path)
    earlier, own = resolved(backbone, tree.get("objective") or {}), resolved(backbone, objective)
    if earlier != own:
        raise ValueError(
            f"run.start_from={path}: its network predicts {earlier[0]}, and this recipe's {own[0]};"
            " give the objective.target and objective.path of the earlier run"
        )


def check_names(path: Path, backbone: Backbone, plan: Plan) -> set[str]:
    """Checks that a model can start from an earlier adapter, without reading its tensors.

    Returns:
        the names of its tensors.

    Raises:
        ValueError: the file was trained on another backbone, or holds a tensor that this model
            lacks, has in another shape, or that its own adapter, by `plan`, would not store.
    """
    _, stored = read_header(path)
    check_backbone(path, stored, backbone.identity())
    own = _tensors(backbone)
    with safe_open(path, "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    if lost := sorted(set(shapes) - set(plan.stored)):
        raise ValueError(
            f"run.start_from={path}: the adapter of this recipe stores no {lost[0]}, {len(lost)} "
            "tensors in all; give the methods, and their options, that the earlier adapter was "
            f"trained with, or train on top of it with backbone={path}"
        )
    for name, shape in shapes.items():
        check_shape(path, name, shape, own=tuple(own[name].shape))
    return set(shapes)


def start_from(path: Path, backbone: Backbone, plan: Plan) -> Plan:
    """Copies every tensor of an earlier adapter into a model that may have more; what the adapter
    does not hold keeps its initial values.

    Returns:
        the plan of the model as it is now: methods whose trained tensors have all come from the
        adapter get no start from the data, which would write over what was learned.

    Raises:
        ValueError: as `check_names`, or a value is not finite.
    """
    check_names(path, backbone, plan)
    own, tensors = _tensors(backbone), load_file(path)
    wanted = {key: own[key] for key in tensors}
    check_tensors(path, tensors, wanted)
    _copy(tensors, wanted)
    return plan.started(set(tensors))


def _tensors(model: Backbone) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


@torch.no_grad()
def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    for key, value in target.items():
        value.copy_(source[key])
