"""Writes adapters for other tools: each is read back by the tool's own loader, and kept only if
that gives the adapted model's output. `formats/` has one file for each format."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors import safe_open

from trainer.attention.host import Host
from trainer.attention.insertion import insertions
from trainer.backbones import load_backbone
from trainer.backbones.device import CPU, Placement
from trainer.common.atomic import beside
from trainer.config import load as load_
from trainer.config.header import read_header
from trainer.config.lineage import spec_of
from trainer.export.apply_bundle import add_to
from trainer.export.card import card_of
from trainer.export.factor import truncated
from trainer.export.find_format import find_format, format_names
from trainer.export.job import Job
from trainer.export.out_path import check_out, is_one_file, only_file
from trainer.export.probe import LIMIT, PROOF_FRAMES, Probe, Say, difference
from trainer.export.prompt_lines import prompt_entries
from trainer.export.proof import Proof, measure_rounding, prove, prove_printed_call
from trainer.export.refusal import proposal, refuse
from trainer.export.settle_folder import settle
from trainer.export.tokens import known_words
from trainer.export.usage import write_readme
from trainer.methods.apply import in_order
from trainer.methods.method import Method
from trainer.methods.shared.temporal import Temporal
from trainer.ops.adapters.token_rows import ExtendedEmbedding
from trainer.runs.adapter import load_adapted

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
EXACT = "float32"  # the dtype of the files that are proven
LOW_RANK = ("comfyui", "diffusers", "kohya", "peft")


@dataclass(frozen=True)
class Request:
    """The format to write, who receives the lines for the user, and where the files are proven."""

    format_name: str
    say: Say
    placement: Placement


def export(
    path: Path,
    out: Path,
    format_name: str = "merged",
    *,
    dtype: str = EXACT,
    rank: int | None = None,
    title: str | None = None,
    say: Say = print,
    placement: Placement = CPU,
) -> Path:
    """Writes an adapter in another format to `out`: a new folder, or the file of the format.

    path: the adapter's file. dtype: of the written files, which are proven in float32 before they
    are rounded. rank: reduces every layer's change to its largest singular directions; what that
    loses is reported. title: what files in a folder are called, by default as the folder. say:
    receives each line for the user. placement: where the models are proven; the files are computed
    on the CPU. Returns `out`.

    Raises:
        ValueError: an option is wrong, `out` exists or must be a folder, the format cannot carry
            the adapter, or the output of the files read back differs by more than `LIMIT`.
    """
    _check_options(out, format_name, dtype=dtype, rank=rank)
    request = Request(format_name, say, placement)
    called = out.stem if is_one_file(out) else title or out.name
    job, proof = _prepare(path, called, request)
    if rank is not None:
        job, proof = _reduce_rank(job, proof, rank)
    part = beside(out)
    try:
        proof = _write(job, proof, part, dtype=dtype)
        del job  # the adapted model, whose memory the proof needs
        made = only_file(part / dtype, out) if is_one_file(out) else part / dtype
        _prove_all(proof, part, dtype=dtype)
        os.replace(made, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return out


def _prove_all(proof: Proof, part: Path, *, dtype: str) -> None:
    """Proves what `_write` has written."""
    effect = prove(proof, part / EXACT)
    if dtype != EXACT:
        measure_rounding(proof, part / dtype, dtype)
    prove_printed_call(proof, part / dtype, effect=effect, exact=dtype == EXACT)


def _check_options(out: Path, format_name: str, *, dtype: str, rank: int | None) -> None:
    find_format(format_name)
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype}: no such dtype; there are: {', '.join(DTYPES)}")
    if rank is not None and format_name not in LOW_RANK:
        raise ValueError(f"rank={rank} is for format={', '.join(LOW_RANK)}, not for {format_name}")
    check_out(out, format_name)


def _prepare(path: Path, title: str, request: Request) -> tuple[Job, Proof]:
    """Loads an adapter and asks its model for the output that the files must give.

    Raises:
        ValueError: the format cannot carry the adapter.
    """
    name, say = request.format_name, request.say
    tree, _ = read_header(path)
    _refuse_runs(tree)
    adapted, _ = load_adapted(path)
    adapted.pipeline()  # where there is none, nothing is written
    with safe_open(path, "pt") as file:
        stored = tuple(file.keys())
    make_base = partial(base_of, tree)
    words = _words(adapted)
    card = card_of(title, tree, adapted, words=words)
    job = Job(adapted, make_base, stored=stored, title=title, card=card)
    _say_base(tree, name, say)
    probe = Probe(adapted, words, _frames(adapted), placement=request.placement)
    wanted = probe(adapted)
    proof = Proof(name, make_base, probe=probe, wanted=wanted, say=say, tree=tree)
    proof = replace(proof, whole=not any(m.kind == "storage" for m in _methods(tree).values()))
    refuse_ops(adapted, proof)
    refuse(job, name)
    if text := find_format(name).remark(adapted, probe, proof.wanted):
        say(text)
    return job, proof


def _refuse_runs(tree: dict[str, Any]) -> None:
    """Refuses an adapter that was trained on top of another: the files would lack the other."""
    if spec_of(tree).adapters:
        raise ValueError(
            f"this adapter was trained on top of another, {tree['backbone']}, which no format "
            "includes; generate with `python -m trainer sample adapter=...`, or export the other "
            "one with format=merged and train with backbone=<the folder it writes>"
        )


def base_of(tree: dict[str, Any]) -> Any:
    """The backbone that a recipe names, without what the recipe trains: with its frozen weights
    stored as the recipe says, and with inserted layers that did not train, since an adapter holds
    no tensors of those."""
    base = load_backbone(spec_of(tree), tree["backbone"])
    for method in _methods(tree).values():
        if method.kind == "storage" or _is_given(method):
            method.apply(base)
    return base.eval().requires_grad_(False)


def _methods(tree: dict[str, Any]) -> dict[str, Method]:
    return in_order(load_.methods_of(tree["methods"]))


def _is_given(method: Method) -> TypeGuard[Temporal]:
    """Whether a method inserts layers that another run has trained."""
    return isinstance(method, Temporal) and not method.train


def _say_base(tree: dict[str, Any], format_name: str, say: Say) -> None:
    """Reports what a reader of the files needs besides the backbone."""
    for name, method in _methods(tree).items():
        if method.kind == "storage" and format_name != "merged":
            say(
                f"proven on the base as methods.{name} stores it; on a base stored otherwise the "
                "output differs by that rounding"
            )
        if _is_given(method):
            say(f"methods.{name} did not train: its layers are those of weights={method.weights}")


def _words(model: Any) -> list[str]:
    """The trained words of a model, new and known, in its first text encoder."""
    for part, encoder in model.text_encoders.items():
        table = encoder.get_input_embeddings()
        ids = table.ids if isinstance(table, ExtendedEmbedding) else ()
        new = model.tokenizers[part].convert_ids_to_tokens(list(ids))
        return [*new, *known_words(model)]
    return []


def _frames(adapted: Any) -> int:
    """The latent frames of the proof's clips; 1, for images, if the model has no temporal layers
    and is none of clips."""
    if adapted.layout == "tokens":
        return PROOF_FRAMES
    longest: list[Any] = [found.block.max_frames for found in insertions(adapted.denoiser)]
    return min(PROOF_FRAMES, *longest) if longest else 1


def refuse_ops(adapted: Any, proof: Proof) -> None:
    """Removes the model's attention ops, and refuses those that change its output: a file of
    weights has no place for them. Ops that act only in training change nothing.

    Raises:
        ValueError: names the ops and one site of each.
    """
    sites = {op.name: site for site, item in adapted.host.processors.items() for op in item.ops}
    if sites and set(sites) <= set(find_format(proof.format_name).ops):
        return
    traits = adapted.host.traits
    Host.attach(adapted.denoiser).detach()
    Host.attach(adapted.denoiser, traits)  # gives inserted layers the number of a clip's frames
    lost = difference(proof.probe(adapted), proof.wanted)
    if lost > LIMIT:
        what = ", ".join(f"{name} (on {site})" for name, site in sites.items())
        raise ValueError(
            f"format={proof.format_name} cannot carry {what}: it acts in attention when the model "
            "generates, and a file of weights has no place for it (without it the output differs "
            f"by {lost:.1e}); {_instead(set(sites))}"
        )


def _instead(ops: set[str]) -> str:
    """What to do with a model whose ops a format has no place for, as a clause."""
    able = [name for name in format_names() if ops <= set(find_format(name).ops)]
    if able:
        return f"format={able[0]} carries it"
    return "generate with `python -m trainer sample adapter=...`"


def _reduce_rank(job: Job, proof: Proof, rank: int) -> tuple[Job, Proof]:
    """Reduces every layer's change to a rank. The proof then wants the output of that model."""
    if job.inserts:
        raise ValueError(
            f"rank={rank} reduces changes of existing layers, and this adapter inserts layers; "
            "leave rank out"
        )
    bundle, kept = truncated(job.bundle, rank)
    output = proof.probe(add_to(job.make_base(), bundle))
    proof.say(
        f"rank {rank}: every layer keeps {kept:.1%} of its change's energy or more; the output "
        f"differs from the trained model's by {difference(output, proof.wanted):.1e}"
    )
    return job.with_bundle(bundle), replace(proof, wanted=output)


@torch.no_grad()
def _write(job: Job, proof: Proof, part: Path, *, dtype: str) -> Proof:
    """Writes the files in float32 and in `dtype`, each into a folder named like the dtype. Returns
    the proof with what it needs to know of the job."""
    chosen = find_format(proof.format_name)
    others = proposal(job, but=proof.format_name)
    for name in dict.fromkeys((EXACT, dtype)):
        folder = part / name
        folder.mkdir(parents=True)
        chosen.write(job, folder, DTYPES[name])
        if not any(folder.iterdir()):
            raise ValueError("the adapter changes nothing; there is nothing to write")
        usage = chosen.usage(job, folder)
        write_readme(job, usage, format_name=proof.format_name, folder=folder)
        settle(folder, {**job.card.entries, **prompt_entries(job.base)})
    if usage.warning:
        proof.say(usage.warning)
    whole = proof.whole and not usage.partial
    return replace(proof, dropped=job.dropped, others=others, whole=whole)
