"""`merged`: the complete pipeline in diffusers layout, which stock diffusers loads by itself.
Older readers load it too, see `older_readers.py`."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from trainer.attention.extras import PART, Extras
from trainer.attention.host import Host
from trainer.export.cannot_carry import CannotCarryError
from trainer.export.formats import Format
from trainer.export.job import Job
from trainer.export.older_readers import complete_tokenizer, for_older_readers
from trainer.export.usage import Usage, stock_usage
from trainer.ops.adapters.inject import fold
from trainer.ops.adapters.token_rows import RowsEmbedding

STOCK = ("torch", "diffusers", "transformers")


def refuse(job: Job) -> None:
    for name, module in job.adapted.named_modules():
        if isinstance(module, Extras):
            _refuse_extras(module)
        if reason := getattr(module, "unfoldable", None):
            raise CannotCarryError(f"format=merged cannot carry {name}: {reason}")
    _refuse_unwritten(job.base.denoiser)


def write(job: Job, folder: Path, dtype: torch.dtype) -> None:
    merged = merge(job.adapted).to(dtype)
    merged.pipeline().save_pretrained(folder, safe_serialization=True)
    for part, encoder in merged.text_encoders.items():
        for_older_readers(folder / part, encoder)
        complete_tokenizer(folder / part.replace("text_encoder", "tokenizer"), merged.folder)


def merge(backbone: Any) -> Any:
    """Folds all adapters and trained words into plain layers, in place; returns the backbone.

    Raises:
        CannotCarryError: a module is left that a stock pipeline has no place for.
    """
    Host.attach(backbone.denoiser).detach()
    fold(backbone)
    for encoder in backbone.text_encoders.values():
        table = encoder.get_input_embeddings()
        if isinstance(table, RowsEmbedding):
            encoder.set_input_embeddings(table.merged())
            # also the config, and the head of a language model
            encoder.resize_token_embeddings(table.num_embeddings, mean_resizing=False)
    for name, module in backbone.named_modules():
        if isinstance(module, Extras):
            _refuse_extras(module)
        elif name and type(module).__module__.split(".")[0] not in STOCK:
            raise CannotCarryError(
                f"format=merged cannot carry {name} ({type(module).__name__}): a stock pipeline "
                "has no place for it"
            )
    _refuse_unwritten(backbone.denoiser)
    return backbone


def _refuse_extras(extras: Extras) -> None:
    """Refuses modules that methods have added beside the denoiser; a model without any is fine."""
    if names := list(extras):
        raise CannotCarryError(
            f"format=merged cannot carry {PART}.{names[0]}, {len(names)} such modules: a stock "
            "pipeline has no place for them"
        )


def _refuse_unwritten(denoiser: Any) -> None:
    """Refuses a network whose layers differ from those its config describes, since the config is
    all that a pipeline's folder says of them."""
    kind: Any = type(denoiser)
    stock = _stock_keys(kind, denoiser.to_json_string())
    # a layer in 4 bits has more, like `weight.absmax`, which is none of the network's
    own = {key for key in denoiser.state_dict() if ".weight." not in key}
    if unlike := sorted(stock ^ own):
        have = "has" if unlike[0] in stock else "lacks"
        raise CannotCarryError(
            f"format=merged cannot carry this network: made from its config it {have} {unlike[0]}, "
            f"{len(unlike)} tensors in all; generate from the adapter, or continue training from "
            "it with run.start_from: the adapter says how the network is made"
        )


@lru_cache(maxsize=8)  # every export asks, in whatever format, and `merged` once more
def _stock_keys(kind: Any, config: str) -> frozenset[str]:
    """The names of the tensors of a network that is made from a config."""
    with torch.device("meta"):
        return frozenset(kind.from_config(json.loads(config)).state_dict())


def _from_pretrained(folder: Path, base: Any) -> Any:
    """Loads the folder as a stock pipeline and puts its parts in place of the backbone's."""
    pipeline = type(base.pipeline()).from_pretrained(folder, dtype=torch.float32)
    for name, part in pipeline.components.items():
        if hasattr(base, name) and part is not None:
            setattr(base, name, part.eval() if isinstance(part, torch.nn.Module) else part)
    return base


def usage(job: Job, folder: Path) -> Usage:
    return stock_usage(job, call=(), complete=True)


FORMAT = Format(
    write,
    readers={"from_pretrained": _from_pretrained},
    usage=usage,
    refuse=refuse,
    carries_known_words=True,
)
