"""`merged`: the whole pipeline in diffusers layout, which stock diffusers loads by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from trainer.attention.host import Host
from trainer.export.job import Job
from trainer.ops.adapters.inject import fold
from trainer.ops.adapters.token_rows import RowsEmbedding

relearns = True
STOCK = ("torch", "diffusers", "transformers")


def write(job: Job, folder: Path, dtype: torch.dtype) -> None:
    merge(job.live).to(dtype).pipeline().save_pretrained(folder, safe_serialization=True)


def merge(backbone: Any) -> Any:
    """Folds everything a stock pipeline has no name for into plain layers, in place.

    Raises:
        ValueError: something is left that a stock pipeline has no place for.
    """
    Host.attach(backbone.denoiser).detach()
    fold(backbone)
    for encoder in backbone.text_encoders.values():
        table = encoder.get_input_embeddings()
        if isinstance(table, RowsEmbedding):
            encoder.set_input_embeddings(table.merged())
            encoder.config.vocab_size = table.num_embeddings
    for name, module in backbone.named_modules():
        if name and type(module).__module__.split(".")[0] not in STOCK:
            raise ValueError(
                f"format=merged cannot carry {name} ({type(module).__name__}): a stock pipeline "
                "has no place for it"
            )
    _refuse_unwritten(backbone.denoiser)
    return backbone


def _refuse_unwritten(denoiser: Any) -> None:
    """A folder holds a network as its config, from which a layer more or less cannot be known."""
    with torch.device("meta"):
        stock = type(denoiser).from_config(dict(denoiser.config)).state_dict().keys()
    if apart := sorted(stock ^ denoiser.state_dict().keys()):
        have = "has" if apart[0] in stock else "lacks"
        raise ValueError(
            f"format=merged cannot carry this network: made again from its config it {have} "
            f"{apart[0]}, {len(apart)} tensors in all; paint, or train on with run.start_from, "
            "from the adapter, which says how it was made"
        )


def _from_pretrained(folder: Path, base: Any) -> Any:
    """The parts of the stock pipeline, under the names the backbone has for them."""
    pipeline = type(base.pipeline()).from_pretrained(folder, dtype=torch.float32)
    for name, part in pipeline.components.items():
        if hasattr(base, name) and part is not None:
            setattr(base, name, part.eval() if isinstance(part, torch.nn.Module) else part)
    return base


READERS = {"from_pretrained": _from_pretrained}
