"""Adapters for other tools: written, read back by the tool's own loader, and kept only if that
gives the model's own output. `trainer/export/formats/` has one file a form."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors import safe_open
from torch import Tensor

from trainer.attention.host import Host
from trainer.attention.insertion import insertions
from trainer.backbones import load_backbone
from trainer.backbones.placement import CPU, Placement
from trainer.config import load as load_
from trainer.config.header import read_header
from trainer.config.lineage import spec_of
from trainer.export.apply_bundle import add_to
from trainer.export.factor import truncated
from trainer.export.find_format import find_format, format_names
from trainer.export.formats.merged import merge
from trainer.export.job import Job
from trainer.export.proof import LIMIT, NOISE, PROOF_FRAMES, Probe, difference
from trainer.export.tokens import known_words
from trainer.methods.apply import in_order
from trainer.methods.method import Method
from trainer.methods.shared.temporal import Temporal
from trainer.runs.adapter import load_adapted

__all__ = ["export", "merge"]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LOW_RANK = ("comfyui", "diffusers", "kohya", "peft")
Say = Callable[[str], None]


def export(
    path: Path,
    out: Path,
    form: str = "merged",
    dtype: str = "float32",
    rank: int | None = None,
    say: Say = print,
    placement: Placement = CPU,
) -> Path:
    """Writes an adapter in another form to `out`, a folder that must not exist yet.

    dtype: what the file holds; it is proven in float32 first. rank: cut every layer's change to its
    largest singular directions, which loses something, and how much is said. placement: where the
    models are asked for the proof; files are computed on the CPU.

    Raises:
        ValueError: an unknown format or dtype, the folder exists, the form cannot carry the
        adapter, or what its loader gives differs from the model by more than `LIMIT`.
    """
    kind = find_format(form)
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype}: no such dtype; there are: {', '.join(DTYPES)}")
    if rank is not None and form not in LOW_RANK:
        raise ValueError(f"rank={rank} is for the forms {', '.join(LOW_RANK)}, not for {form}")
    if out.exists():
        raise ValueError(f"out={out} exists; name a folder that does not, nothing is written over")
    tree, _ = read_header(path)
    _refuse_runs(tree)
    live, _ = load_adapted(path)
    with safe_open(path, "pt") as file:
        stored = tuple(file.keys())
    fresh = partial(base_of, tree)
    _refuse_inserted(live, form)
    _refuse_known(live, form)
    _say_base(tree, form, say)
    probe = Probe(live, _words(live), _frames(live), placement=placement)
    wanted = probe(live)
    _refuse_ops(live, form, probe, wanted)
    if text := getattr(kind, "remark", lambda *_: None)(live, probe, wanted):
        say(text)
    job = Job(live, fresh, stored, out.name)
    if rank is not None:
        wanted = _cut(job, rank, probe, wanted, say)
    part = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        with torch.no_grad():
            _write(kind, job, part, dtype)
        dropped = job.bundle.dropped if "bundle" in vars(job) else ()
        del live, job
        _prove(kind, form, part / "exact", fresh, probe, wanted, dropped, say)
        if dtype != "float32":
            _measure(kind, part / dtype, fresh, probe, wanted, dtype, say)
        os.replace(part / (dtype if dtype != "float32" else "exact"), out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return out


def _refuse_runs(tree: dict[str, Any]) -> None:
    """An adapter of a model that an earlier run has made: a form would lack what that one did."""
    if spec_of(tree).adapters:
        raise ValueError(
            f"this adapter was trained over another, {tree['backbone']}, which no form holds with "
            "it; paint with `python -m trainer sample adapter=...`, or export that one with "
            "format=merged and train with backbone=<the folder it writes>"
        )


def base_of(tree: dict[str, Any]) -> Any:
    """The backbone a recipe names, plain but for how it stores its frozen weights, and for layers
    inserted that did not train, which an adapter names and does not hold."""
    name = tree["backbone"]
    base = load_backbone(spec_of(tree), name)
    for method in _methods(tree).values():
        if method.kind == "storage" or _given(method):
            method.apply(base)
    return base.eval().requires_grad_(False)


def _methods(tree: dict[str, Any]) -> dict[str, Method]:
    return in_order(load_.methods_of(tree["methods"]))


def _given(method: Method) -> TypeGuard[Temporal]:
    """Whether it inserts layers that another run has trained."""
    return isinstance(method, Temporal) and not method.train


def _say_base(tree: dict[str, Any], form: str, say: Say) -> None:
    """What a reader must have beside the backbone."""
    for name, method in _methods(tree).items():
        if method.kind == "storage" and form != "merged":
            say(f"proven on the base as methods.{name} stores it; stored otherwise it rounds so")
        if _given(method):
            say(f"methods.{name} did not train: its layers are those of weights={method.weights}")


def _words(model: Any) -> list[str]:
    """The words a model has learned, in the first text encoder's tokenizer."""
    for part, encoder in model.text_encoders.items():
        table = encoder.get_input_embeddings()
        old = getattr(table, "table", table).num_embeddings
        new = model.tokenizers[part].convert_ids_to_tokens(range(old, table.num_embeddings))
        return [*new, *known_words(model)]
    return []


def _refuse_known(live: Any, form: str) -> None:
    """Known words that learned anew, where a form has no place for them."""
    if not (words := known_words(live)):
        return
    able = [name for name in format_names() if getattr(find_format(name), "relearns", False)]
    if form not in able:
        raise ValueError(
            f"format={form} cannot carry {words[0]!r}, a known word that has learned anew, "
            f"{len(words)} in all; the text encoder has its row in "
            + " and ".join(f"format={name}" for name in able)
        )


def _frames(live: Any) -> int:
    """Of the clips a model is asked for; 1, images, where it has no layers that look through
    time."""
    longest: list[Any] = [found.block.max_frames for found in insertions(live.denoiser)]
    return min(PROOF_FRAMES, *longest) if longest else 1


def _refuse_inserted(live: Any, form: str) -> None:
    """Layers that look through time, where a form has no place for them."""
    blocks = [type(found.block).__name__ for found in insertions(live.denoiser)]
    if not blocks or _carries(form, live):
        return
    able = " and ".join(f"format={name}" for name in format_names() if _carries(name, live))
    raise ValueError(
        f"format={form} cannot carry the {len(blocks)} layers that look through time "
        f"({blocks[0]}); {f'{able} can, or ' if able else ''}"
        "paint with `python -m trainer sample adapter=... frames=...`"
    )


def _carries(form: str, live: Any) -> bool:
    carries = getattr(find_format(form), "carries", None)
    return carries is not None and bool(carries(live))


def _refuse_ops(live: Any, form: str, probe: Probe, wanted: Tensor) -> None:
    """Ops that only train leave the output as it is without them; the others stay behind."""
    ops = {
        op.name: site for site, item in live.host.processors.items() for op in item.ops
    }  # one site of each is enough to name it
    traits = live.host.traits
    Host.attach(live.denoiser).detach()
    Host.attach(live.denoiser, traits)  # which tells what is inserted of a clip's frames
    lost = difference(probe(live), wanted)
    if lost > LIMIT:
        what = ", ".join(f"{name} (on {site})" for name, site in ops.items())
        raise ValueError(
            f"format={form} cannot carry {what}: it acts in attention when the model paints, and a "
            f"file of weights has no place for it (without it the output differs by {lost:.1e}); "
            "paint with `python -m trainer sample adapter=...`"
        )


def _cut(job: Job, rank: int, probe: Probe, wanted: Tensor, say: Say) -> Tensor:
    """Cuts the job's bundle to a rank; the output of the model that is left."""
    if job.inserts:
        raise ValueError(
            f"rank={rank} cuts the change of layers, and the layers this adapter inserts are none; "
            "leave it out"
        )
    job.bundle, kept = truncated(job.bundle, rank)
    answer = probe(add_to(job.fresh(), job.bundle))
    say(
        f"rank {rank}: every layer keeps {kept:.1%} of its change's energy or more; the output "
        f"differs from the trained model's by {difference(answer, wanted):.1e}"
    )
    return answer


def _write(kind: Any, job: Job, part: Path, dtype: str) -> None:
    """The file in float32, in `exact`, and beside it the one that was asked for."""
    for name, chosen in {"exact": torch.float32, dtype: DTYPES[dtype]}.items():
        if name != "float32":
            (part / name).mkdir(parents=True)
            kind.write(job, part / name, chosen)
    if not any((part / "exact").iterdir()):
        raise ValueError("the adapter changes nothing; there is nothing to write")


def _prove(
    kind: Any,
    form: str,
    folder: Path,
    fresh: Callable[[], Any],
    probe: Probe,
    wanted: Tensor,
    dropped: tuple[str, ...],
    say: Say,
) -> None:
    """Every reader must give the model's output; a small change to the base less than a tenth of
    itself away, so that a file which loads and does nothing never passes."""
    for reader, load in kind.READERS.items():
        base = fresh()
        effect = difference(probe(base), wanted)
        allowed = min(LIMIT, max(effect / 10, NOISE))
        try:
            model = load(folder, base)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"format={form}: {reader} does not read the file: {error}") from error
        if model is None:
            continue
        apart = difference(probe(model), wanted)
        if apart > allowed:
            also = f"; it has no place for {dropped[0]}, {len(dropped)} tensors" if dropped else ""
            raise ValueError(
                f"format={form} cannot carry this adapter: read back by {reader}, the file gives "
                f"an output {apart:.1e} from the model's, where {allowed:.0e} is allowed{also}; "
                "nothing was written. format=merged folds everything into the weights"
            )
        say(
            f"{form}, read back by {reader}: largest difference {apart:.1e} (allowed "
            f"{allowed:.0e}; the adapter itself makes {effect:.1e})"
        )


def _measure(
    kind: Any,
    folder: Path,
    fresh: Callable[[], Any],
    probe: Probe,
    wanted: Tensor,
    dtype: str,
    say: Say,
) -> None:
    """What rounding to the chosen dtype costs; ValueError where numbers leave its range."""
    read = ((reader, load(folder, fresh())) for reader, load in kind.READERS.items())
    reader, model = next((reader, model) for reader, model in read if model is not None)
    apart = difference(probe(model), wanted)
    if apart == float("inf"):
        raise ValueError(f"dtype={dtype}: some numbers are beyond its range; take bfloat16")
    say(f"rounded to {dtype}, read back by {reader}: largest difference {apart:.1e}")
