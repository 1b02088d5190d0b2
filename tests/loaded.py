"""Parts of pipeline folders that are read once: later loads of the same files get a copy of what
the real loading made, in a tenth of the time."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

from trainer.backbones import pipeline_folder
from trainer.backbones.pipeline_folder import PipelineFolder
from trainer.backbones.stored_in import read_in

SMALL = 20_000_000  # bytes of a part that is worth keeping
KEPT = 24  # parts
PLAIN = (str, int, float, bool, bytes, type(None), type, torch.dtype, torch.device)
Memo = dict[int, Any]


def copied(module: Any, memo: Memo) -> Any:
    """What `copy.deepcopy(module, memo)` gives, without its thousands of calls for the empty
    dictionaries that every layer has."""
    if module is None or id(module) in memo:
        return module if module is None else memo[id(module)]
    if not isinstance(module, nn.Module) or hasattr(type(module), "__deepcopy__"):
        return copy.deepcopy(module, memo)
    new = memo[id(module)] = type(module).__new__(type(module))
    own: dict[str, Any] = {}
    new.__dict__ = own
    for key, value in module.__dict__.items():
        if key == "_modules":
            own[key] = {name: copied(each, memo) for name, each in value.items()}
        elif key == "_parameters":
            own[key] = {name: _parameter(each, memo) for name, each in value.items()}
        elif isinstance(value, PLAIN):
            own[key] = value
        elif type(value) in (dict, OrderedDict, set, list) and not value:
            own[key] = type(value)()
        else:
            own[key] = copy.deepcopy(value, memo)
    return new


def _parameter(value: Any, memo: Memo) -> Any:
    if type(value) is not nn.Parameter or value.grad is not None:
        return copy.deepcopy(value, memo)
    if id(value) not in memo:
        memo[id(value)] = nn.Parameter(value.detach().clone(), value.requires_grad)
    return memo[id(value)]


def read_once(patch: pytest.MonkeyPatch) -> None:
    """From here on a part whose files are as they were is not read again. One that is read by
    something that a test put in the place of the library is not kept."""
    kept: dict[Any, Any] = {}
    read = PipelineFolder.load

    def load(folder: PipelineFolder, part: str, kind: Any) -> Any:
        where = folder.of(part)
        stats = {path: path.stat() for path in sorted(where.glob("*")) if path.is_file()}
        made = part in folder.scratch or pipeline_folder.WITHOUT_VALUES.get() or folder.file
        if made or not 0 < sum(each.st_size for each in stats.values()) < SMALL:
            return read(folder, part, kind)
        files = [(path, each.st_mtime_ns, each.st_size) for path, each in stats.items()]
        key = (where, kind, kind.from_pretrained.__func__, read_in(folder, part), *files)
        if key not in kept:
            kept[key] = read(folder, part, kind)
            if len(kept) > KEPT:
                del kept[next(iter(kept))]
        return copied(kept[key], {})

    patch.setattr(PipelineFolder, "load", load)
