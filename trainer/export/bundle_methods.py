"""The methods of a recipe whose trained tensors can hold a bundle, and those tensors' values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trainer.attention.sites import TEXT_ROLES
from trainer.config import load
from trainer.export.bundle import Bundle, Delta, DoRADelta, FullDelta, LowRankDelta
from trainer.export.factor import compact, fitted, folded
from trainer.export.lycoris_options import options_of
from trainer.methods.apply import apply_methods
from trainer.ops.adapters.inject import TEXT_LAYERS, site_targets, text_targets
from trainer.ops.adapters.token_rows import ExtendedEmbedding, relearned

ROLES = ("q", "k", "v", "out")
SITES = ("cross", "self", "all")
BIAS = (
    "the file changes the bias or the norm {path} and low-rank matrices elsewhere, which no method "
    "trains together; merge it into a model with the tool that made it, and train on that with "
    "backbone=<folder>"
)


def trainable(bundle: Bundle, base: Any) -> Bundle:
    """The bundle as methods can hold it, every dW unchanged: no rank above what its layer can have;
    whole matrices beside low-rank ones, and LoHa and LoKr that peft's layers cannot hold, as pairs.

    Raises:
        ValueError: a bias or a norm was trained beside low-rank matrices.
    """
    kept = options_of(bundle.forms, base)
    forms = {path: form for path, form in bundle.forms.items() if kept and form.type == kept.type}
    mixed = bool(forms) or any(not isinstance(d, FullDelta) for d in bundle.layers.values())
    mixed = mixed or bool(bundle.forms)
    layers: dict[str, Delta] = {}
    for path, delta in bundle.layers.items():
        if isinstance(delta, FullDelta) and mixed and path not in forms:
            if delta.weight is None or delta.bias is not None or delta.weight.ndim < 2:
                raise ValueError(BIAS.format(path=path))
            delta = compact(delta.weight)
        layers[path] = fitted(delta) if isinstance(delta, LowRankDelta) else delta
    notes = bundle.notes
    if lost := len(bundle.forms) - len(forms):
        kinds = {form.type for path, form in bundle.forms.items() if path not in forms}
        notes += (f"{lost} layers of {' and '.join(sorted(kinds))} become LoRA of the same change",)
    return replace(bundle, layers=layers, forms=forms, notes=notes)


def recipe_of(bundle: Bundle, base: Any) -> dict[str, dict[str, Any]]:
    """The `methods` of a recipe whose trained tensors can hold a bundle.

    Raises:
        ValueError: the bundle is empty.
    """
    tree: dict[str, dict[str, Any]] = {}
    for name, kind in (("lora", LowRankDelta), ("dora", DoRADelta)):
        ranks = {p: d.rank for p, d in bundle.layers.items() if isinstance(d, kind)}
        if ranks:
            tree[name] = _ranks(ranks) | chosen(ranks, base)
    if (form := options_of(bundle.forms, base)) is not None:
        own = {"type": form.type, "options": form.options, **chosen(bundle.forms, base)}
        tree["peft_adapter"] = own | ({"ranks": form.ranks} if form.ranks else {})
    full = [
        p for p, d in bundle.layers.items() if isinstance(d, FullDelta) if p not in bundle.forms
    ]
    if bundle.bare:
        tree["full"] = {"denoiser": True, "text_encoder": any(not _inside(p, base) for p in full)}
    elif full:
        name, options = _full(full, base)
        tree[name] = options
    if bundle.tokens:
        tree["new_token"] = {"tokens": list(bundle.tokens)}
    if bundle.known:
        tree["word_embedding"] = {"tokens": list(bundle.known)}
    if not tree:
        raise ValueError("the file changes nothing; there is nothing to start from")
    return tree


def _inside(path: str, base: Any) -> bool:
    return path.startswith(f"{base.denoiser_name}.")


def _ranks(ranks: Mapping[str, int]) -> dict[str, Any]:
    usual = Counter(ranks.values()).most_common(1)[0][0]
    other = {path: rank for path, rank in ranks.items() if rank != usual}
    return {"rank": usual} | ({"ranks": other} if other else {})


def chosen(paths: Iterable[str], base: Any) -> dict[str, Any]:
    """The options that choose exactly these layers of the denoiser: sites and projections where
    possible, with the names of the remaining layers, else all names; and those of the text
    encoders by their roles, which may be more layers, that start without a change."""
    start = f"{base.denoiser_name}."
    paths = list(paths)
    options = _in_denoiser({path for path in paths if path.startswith(start)}, base)
    text = [path for path in paths if not path.startswith(start)]
    roles = [r for r in TEXT_ROLES if any(p.rpartition(".")[2] in TEXT_LAYERS[r] for p in text)]
    named = {target.path for target in text_targets(base, roles)} if roles else set()
    if roles:
        options["text_encoder"] = roles
    if others := sorted({path.partition(".")[2] for path in text if path not in named}):
        options["text_layers"] = others
    return options


def _in_denoiser(wanted: set[str], base: Any) -> dict[str, Any]:
    for sites in SITES:
        every = _at(base, sites, ROLES)
        roles = [role for role in ROLES if set(_at(base, sites, (role,))) <= wanted]
        named = set(_at(base, sites, roles)) if every else set()
        if named and named == wanted & set(every) == wanted & set(_at(base, "all", ROLES)):
            rest = sorted(path.partition(".")[2] for path in wanted - named)
            return {"sites": sites, "projections": roles} | ({"layers": rest} if rest else {})
    names = sorted(path.partition(".")[2] for path in wanted)
    return {"sites": None} | ({"layers": names} if names else {})


def _at(base: Any, sites: str, roles: Iterable[Any]) -> list[str]:
    try:
        return [target.path for target in site_targets(base, sites, list(roles))]
    except ValueError:  # this backbone has no such sites
        return []


def _full(paths: list[str], base: Any) -> tuple[str, dict[str, Any]]:
    """The method that trains these layers' weights, and its options: `selective` if all of them are
    projections of attention sites, else `full`."""
    for sites in SITES:
        for roles in (("k", "v"), ("q", "k", "v"), ROLES):
            if set(paths) <= set(_at(base, sites, roles)):
                used = [r for r in roles if set(paths) & set(_at(base, sites, (r,)))]
                return "selective", {"sites": sites, "projections": used}
    start = f"{base.denoiser_name}."
    inside = [path.startswith(start) for path in paths]
    return "full", {"denoiser": any(inside), "text_encoder": not all(inside)}


@torch.no_grad()
def tensors_of(
    bundle: Bundle, methods: Mapping[str, Any], base: Any
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of the adapter, and the identity of its backbone: the initial values of the
    methods, replaced by the file's where it has some."""
    identity, form = base.identity(), options_of(bundle.forms, base)
    plan = apply_methods(base, load.methods_of(methods))
    own = dict(base.named_parameters()) | dict(base.named_buffers())
    tensors = {name: own[name].detach().clone() for name in plan.stored}
    _put_layers(tensors, bundle)
    for path, values in form.tensors.items() if form else ():
        for name, value in values.items():
            tensors[f"{path}.{name}.peft_adapter"].copy_(value)
    _put_words(tensors, bundle, base)
    return tensors, identity


def _put_layers(tensors: dict[str, Tensor], bundle: Bundle) -> None:
    """Puts a bundle's deltas into the tensors of an adapter."""
    for name, moved in bundle.bare.items():
        tensors[name] += moved
    for path, delta in bundle.layers.items():
        if path in bundle.forms:
            continue
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
    """Puts a bundle's words into the tensors of an adapter; `model` has a row for each of them.

    Raises:
        ValueError: a new word has no row for a text encoder that reads it too.
    """
    for part, encoder in model.text_encoders.items():
        names = {id(parameter): name for name, parameter in encoder.named_parameters()}
        table = encoder.get_input_embeddings()
        new = table.rows if isinstance(table, ExtendedEmbedding) else ()
        known = found.rows if (found := relearned(encoder)) else ()
        for rows, words in ((new, bundle.tokens), (known, bundle.known)):
            for row, word in zip(rows, words, strict=bool(rows)):
                if part in words[word]:
                    tensors[f"{part}.{names[id(row)]}"] = words[word][part]
                elif rows is new:
                    raise ValueError(
                        f"the file holds the word {word} for {' and '.join(words[word])} alone, "
                        f"and this backbone's {part} reads it too, where it would be noise; take "
                        "a file with vectors for each text encoder, as one trained on this kind of "
                        "model has"
                    )
