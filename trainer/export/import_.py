"""A file made elsewhere becomes an adapter of ours, so that a run can go on from it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.backbones.placement import CPU, Placement
from trainer.common.atomic import written_whole
from trainer.config import load
from trainer.config.lineage import backbone_spec
from trainer.export.apply_bundle import add_to
from trainer.export.bundle import Bundle, DoRADelta, FullDelta, LowRankDelta
from trainer.export.detect import detect
from trainer.export.factor import fitted, folded
from trainer.export.find_format import find_format
from trainer.export.proof import LIMIT, Probe, difference
from trainer.export.tokens import read_tokens
from trainer.methods.apply import apply_methods
from trainer.ops.adapters.inject import TEXT_LAYERS, site_targets, text_targets
from trainer.ops.adapters.token_rows import ExtendedEmbedding, relearned
from trainer.runs.adapter import load_adapted, load_base, save_adapter

KNOWN_METHODS = ("q", "k", "v", "out")
SITES = ("cross", "self", "all")


def import_file(
    path: Path,
    backbone: str,
    out: Path,
    form: str = "auto",
    say: Callable[[str], None] = print,
    placement: Placement = CPU,
) -> Path:
    """Writes a LoRA, DoRA, Custom Diffusion or embedding file as an adapter to `out`, which must
    not exist yet. placement: where the models are asked for the proof.

    Raises:
        ValueError: the file is no safetensors, is damaged, is of no form we read or was made for
        another backbone; or its layers are none that our methods name.
    """
    if out.exists():
        raise ValueError(f"out={out} exists; name a file that does not, nothing is written over")
    if not path.exists():
        raise ValueError(f"file={path}: no such file or folder")
    spec = backbone_spec(backbone)
    kind = detect(path) if form == "auto" else form
    base = load_base(spec, backbone)
    bundle = _read(kind, path, base)
    for note in bundle.notes:
        say(note)
    tree = recipe_of(bundle, base)
    probe = Probe(base, [*bundle.tokens, *bundle.known], placement=placement)
    wanted = probe(add_to(base, bundle))
    del base
    tensors, identity = _tensors(bundle, tree, load_base(spec, backbone))
    out.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(out) as part:
        save_adapter(part, tensors, {"backbone": backbone, "methods": tree}, identity)
        apart = difference(probe(load_adapted(part)[0]), wanted)
        if apart > LIMIT:
            raise ValueError(
                f"file={path}: as an adapter it gives an output {apart:.1e} from what the file "
                f"does, where {LIMIT:.0e} is allowed; nothing was written"
            )
    say(f"{kind}: {_counted(bundle)}; largest difference {apart:.1e} (allowed {LIMIT:.0e})")
    say(f"go on from it with run.start_from={out} and methods: {json.dumps(tree)}")
    return out


def _read(kind: str, path: Path, base: Any) -> Bundle:
    if kind == "embedding":
        bundle = read_tokens([path], base)
    else:
        reader = getattr(find_format(kind), "read", None)
        if reader is None:
            raise ValueError(f"format={kind} is a whole pipeline; train on it with backbone={path}")
        try:
            bundle = reader(path, base)
        except ValueError as error:
            raise (
                error if str(path) in str(error) else ValueError(f"file={path}: {error}")
            ) from None
    layers = {
        path: fitted(delta) if isinstance(delta, LowRankDelta) else delta
        for path, delta in bundle.layers.items()
    }
    return replace(bundle, layers=layers)


def recipe_of(bundle: Bundle, base: Any) -> dict[str, dict[str, Any]]:
    """The methods whose tensors hold a bundle, as a recipe says them."""
    tree: dict[str, dict[str, Any]] = {}
    for name, kind in (("lora", LowRankDelta), ("dora", DoRADelta)):
        ranks = {p: d.rank for p, d in bundle.layers.items() if isinstance(d, kind)}
        if ranks:
            tree[name] = _low_rank(ranks, base)
    whole = [path for path, delta in bundle.layers.items() if isinstance(delta, FullDelta)]
    if whole:
        name, options = _whole(whole, base)
        tree[name] = options
    if bundle.tokens:
        tree["new_token"] = {"tokens": list(bundle.tokens)}
    if bundle.known:
        tree["word_embedding"] = {"tokens": list(bundle.known)}
    if not tree:
        raise ValueError("the file changes nothing; there is nothing to go on from")
    return tree


def _low_rank(ranks: Mapping[str, int], base: Any) -> dict[str, Any]:
    start = f"{base.denoiser_name}."
    own = [path for path in ranks if path.startswith(start)]
    usual = Counter(ranks.values()).most_common(1)[0][0]
    options: dict[str, Any] = {"rank": usual, **_chosen(own, base)}
    if text := [path for path in ranks if not path.startswith(start)]:
        options["text_encoder"] = _text_roles(text, base)
    if other := {path: rank for path, rank in ranks.items() if rank != usual}:
        options["ranks"] = other
    return options


def _chosen(paths: Iterable[str], base: Any) -> dict[str, Any]:
    """A selector where it names exactly these layers, and their names where none does."""
    wanted = set(paths)
    for sites in SITES:
        every = _at(base, sites, KNOWN_METHODS)
        roles = [role for role in KNOWN_METHODS if set(_at(base, sites, (role,))) <= wanted]
        named = set(_at(base, sites, roles)) if every else set()
        if named and named == wanted & set(every) == wanted & set(_at(base, "all", KNOWN_METHODS)):
            rest = sorted(path.partition(".")[2] for path in wanted - named)
            return {"sites": sites, "projections": roles} | ({"layers": rest} if rest else {})
    return {"sites": None, "layers": sorted(path.partition(".")[2] for path in wanted)}


def _at(base: Any, sites: str, roles: Iterable[Any]) -> list[str]:
    try:
        return [target.path for target in site_targets(base, sites, list(roles))]
    except ValueError:  # this backbone has no such sites
        return []


def _text_roles(paths: list[str], base: Any) -> list[str]:
    """Layers of these roles that the file leaves alone start, and stay, at no change."""
    roles = [r for r in KNOWN_METHODS if any(p.rpartition(".")[2] in TEXT_LAYERS[r] for p in paths)]
    named = {target.path for target in text_targets(base, roles)} if roles else set()  # type: ignore[arg-type]
    if strange := [path for path in paths if path not in named]:
        raise ValueError(
            f"the file adapts {strange[0]}, {len(strange)} such layers; our methods adapt a text "
            "encoder's attention only. Fold it into a model with the tool that made it, and train "
            "from that with backbone=<folder>"
        )
    return roles


def _whole(paths: list[str], base: Any) -> tuple[str, dict[str, Any]]:
    """`selective` where all are projections of attention sites, else `full`."""
    for sites in SITES:
        for roles in (("k", "v"), ("q", "k", "v"), KNOWN_METHODS):
            if set(paths) <= set(_at(base, sites, roles)):
                used = [r for r in roles if set(paths) & set(_at(base, sites, (r,)))]
                return "selective", {"sites": sites, "projections": used}
    start = f"{base.denoiser_name}."
    inside = [path.startswith(start) for path in paths]
    return "full", {"denoiser": any(inside), "text_encoder": not all(inside)}


@torch.no_grad()
def _tensors(
    bundle: Bundle, tree: Mapping[str, Any], base: Any
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The adapter's tensors: what the methods start from, with the file's values where it has
    some."""
    identity = base.identity()
    plan = apply_methods(base, load.methods_of(tree))
    own = dict(base.named_parameters()) | dict(base.named_buffers())
    tensors = {name: own[name].detach().clone() for name in plan.stored}
    for path, delta in bundle.layers.items():
        if isinstance(delta, FullDelta):
            for leaf, change in (("weight", delta.weight), ("bias", delta.bias)):
                if change is not None:
                    tensors[f"{path}.{leaf}"] += change
            continue
        name = "dora" if isinstance(delta, DoRADelta) else "lora"
        down, up = folded(delta)
        values = {f"lora_A.{name}.weight": down, f"lora_B.{name}.weight": up}
        if isinstance(delta, DoRADelta):
            values[f"lora_magnitude_vector.{name}.weight"] = delta.magnitude
        for key, value in values.items():
            held = tensors[f"{path}.{key}"]
            held.copy_(value.view_as(held))
    for part, encoder in base.text_encoders.items():
        names = {id(parameter): name for name, parameter in encoder.named_parameters()}
        table = encoder.get_input_embeddings()
        new = table.rows if isinstance(table, ExtendedEmbedding) else ()
        anew = found.rows if (found := relearned(encoder)) else ()
        for rows, words in ((new, bundle.tokens), (anew, bundle.known)):
            for row, word in zip(rows, words, strict=bool(rows)):
                tensors[f"{part}.{names[id(row)]}"] = words[word][part]
    return tensors, identity


def _counted(bundle: Bundle) -> str:
    kinds = {LowRankDelta: "LoRA", DoRADelta: "DoRA", FullDelta: "whole"}
    counts = Counter(kinds[type(delta)] for delta in bundle.layers.values())
    words = [f"{count} {kind} layers" for kind, count in counts.items()]
    words += [f"the words {', '.join(bundle.tokens)}"] if bundle.tokens else []
    words += [f"the known words {', '.join(bundle.known)}"] if bundle.known else []
    return ", ".join(words)
