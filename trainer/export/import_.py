"""Makes an adapter of another tool's file, so that a run can start from it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.backbones.placement import CPU, Placement
from trainer.common.atomic import written_atomically
from trainer.config import load
from trainer.config.lineage import backbone_spec
from trainer.export.apply_bundle import add_to
from trainer.export.bundle import Bundle, DoRADelta, FullDelta, LowRankDelta
from trainer.export.detect import detect
from trainer.export.factor import fitted, folded
from trainer.export.find_format import find_format
from trainer.export.proof import LIMIT, Probe, Say, difference
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
    *,
    format_name: str = "auto",
    say: Say = print,
    placement: Placement = CPU,
) -> Path:
    """Writes a LoRA, DoRA, Custom Diffusion or embedding file as an adapter to `out`.

    path: a file, or the folder of an export; backbone: the name or folder of the backbone it is
    for; format_name: `auto` recognises the format; say: receives each line for the user; placement:
    where the adapter is proven. Returns `out`.

    Raises:
        ValueError: `out` exists; the file is not safetensors, is damaged, is of no known format or
            was made for another backbone; or it changes layers that no method adapts.
    """
    _check_paths(path, out)
    spec = backbone_spec(backbone)
    found = detect(path) if format_name == "auto" else format_name
    base = load_base(spec, backbone)
    bundle = _read(found, path, base)
    for note in bundle.notes:
        say(note)
    methods = recipe_of(bundle, base)
    probe = Probe(base, [*bundle.tokens, *bundle.known], placement=placement)
    wanted = probe(add_to(base, bundle))
    del base  # changed, and its memory is needed
    tensors, identity = _tensors(bundle, methods, load_base(spec, backbone))
    tree = {"backbone": backbone, "methods": methods}
    out.parent.mkdir(parents=True, exist_ok=True)
    with written_atomically(out) as part:
        save_adapter(part, tensors, tree=tree, identity=identity)
        largest = difference(probe(load_adapted(part)[0]), wanted)
        _refuse_difference(path, largest)
    say(f"{found}: {_counted(bundle)}; largest difference {largest:.1e} (allowed {LIMIT:.0e})")
    say(f"to start from it: run.start_from={out} and methods: {json.dumps(methods)}")
    return out


def _check_paths(path: Path, out: Path) -> None:
    if out.exists():
        raise ValueError(f"out={out} exists; give a file that does not, nothing is overwritten")
    if not path.exists():
        raise ValueError(f"file={path}: no such file or folder")


def _refuse_difference(path: Path, largest: float) -> None:
    if largest > LIMIT:
        raise ValueError(
            f"file={path}: the output of the adapter differs by {largest:.1e} from what the file "
            f"gives, and {LIMIT:.0e} is allowed; nothing was written"
        )


def _read(format_name: str, path: Path, base: Any) -> Bundle:
    """What a file adds to the base, with no rank above what its layer can have."""
    if format_name == "embedding":
        bundle = read_tokens([path], base)
    else:
        reader = find_format(format_name).read
        if reader is None:
            raise ValueError(
                f"format={format_name} is a complete pipeline; train on it with backbone={path}"
            )
        try:
            bundle = reader(path, base)
        except ValueError as error:
            named = str(path) in str(error)
            raise (error if named else ValueError(f"file={path}: {error}")) from None
    layers = {
        path: fitted(delta) if isinstance(delta, LowRankDelta) else delta
        for path, delta in bundle.layers.items()
    }
    return replace(bundle, layers=layers)


def recipe_of(bundle: Bundle, base: Any) -> dict[str, dict[str, Any]]:
    """The `methods` of a recipe whose trained tensors can hold a bundle.

    Raises:
        ValueError: the bundle is empty, or changes layers that no method adapts.
    """
    tree: dict[str, dict[str, Any]] = {}
    for name, kind in (("lora", LowRankDelta), ("dora", DoRADelta)):
        ranks = {p: d.rank for p, d in bundle.layers.items() if isinstance(d, kind)}
        if ranks:
            tree[name] = _low_rank(ranks, base)
    full = [path for path, delta in bundle.layers.items() if isinstance(delta, FullDelta)]
    if full:
        name, options = _full(full, base)
        tree[name] = options
    if bundle.tokens:
        tree["new_token"] = {"tokens": list(bundle.tokens)}
    if bundle.known:
        tree["word_embedding"] = {"tokens": list(bundle.known)}
    if not tree:
        raise ValueError("the file changes nothing; there is nothing to start from")
    return tree


def _low_rank(ranks: Mapping[str, int], base: Any) -> dict[str, Any]:
    """The options of `lora` or `dora` for layers of these ranks."""
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
    """The options that choose exactly these layers: sites and projections where possible, with the
    names of the remaining layers; else all names."""
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
    """The roles of a text encoder's layers. Layers of these roles that the file does not change are
    adapted too, and start without a change.

    Raises:
        ValueError: the file adapts other layers of a text encoder than its attention.
    """
    roles = [r for r in KNOWN_METHODS if any(p.rpartition(".")[2] in TEXT_LAYERS[r] for p in paths)]
    named = {target.path for target in text_targets(base, roles)} if roles else set()  # type: ignore[arg-type]
    if others := [path for path in paths if path not in named]:
        raise ValueError(
            f"the file adapts {others[0]}, {len(others)} such layers; of a text encoder, methods "
            "adapt the attention only. Fold the file into a model with the tool that made it, and "
            "train on that with backbone=<folder>"
        )
    return roles


def _full(paths: list[str], base: Any) -> tuple[str, dict[str, Any]]:
    """The method that trains these layers' weights, and its options: `selective` if all of them are
    projections of attention sites, else `full`."""
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
    bundle: Bundle, methods: Mapping[str, Any], base: Any
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of the adapter, and the identity of its backbone: the initial values of the
    methods, replaced by the file's where it has some."""
    identity = base.identity()
    plan = apply_methods(base, load.methods_of(methods))
    own = dict(base.named_parameters()) | dict(base.named_buffers())
    tensors = {name: own[name].detach().clone() for name in plan.stored}
    _put_layers(tensors, bundle)
    _put_words(tensors, bundle, base)
    return tensors, identity


def _put_layers(tensors: dict[str, Tensor], bundle: Bundle) -> None:
    """Puts a bundle's deltas into the tensors of an adapter."""
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
            initial = tensors[f"{path}.{key}"]
            initial.copy_(value.view_as(initial))


def _put_words(tensors: dict[str, Tensor], bundle: Bundle, model: Any) -> None:
    """Puts a bundle's words into the tensors of an adapter; `model` has a row for each of them."""
    for part, encoder in model.text_encoders.items():
        names = {id(parameter): name for name, parameter in encoder.named_parameters()}
        table = encoder.get_input_embeddings()
        new = table.rows if isinstance(table, ExtendedEmbedding) else ()
        known = found.rows if (found := relearned(encoder)) else ()
        for rows, words in ((new, bundle.tokens), (known, bundle.known)):
            for row, word in zip(rows, words, strict=bool(rows)):
                tensors[f"{part}.{names[id(row)]}"] = words[word][part]


def _counted(bundle: Bundle) -> str:
    """What a bundle holds, in words."""
    kinds = {LowRankDelta: "LoRA", DoRADelta: "DoRA", FullDelta: "full"}
    counts = Counter(kinds[type(delta)] for delta in bundle.layers.values())
    words = [f"{count} {kind} layers" for kind, count in counts.items()]
    words += [f"the words {', '.join(bundle.tokens)}"] if bundle.tokens else []
    words += [f"the known words {', '.join(bundle.known)}"] if bundle.known else []
    return ", ".join(words)
