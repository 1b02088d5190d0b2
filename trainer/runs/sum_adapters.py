"""Several adapters on one backbone, each at its scale, without training.

    W = W0 + sum over adapters of scale_i * dW_i

Exact for methods whose change of the network is a dW (`Method.linear`); it is summed in float64 and
added once, in float32. The words of all adapters are there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from trainer.backbones.backbone import Backbone
from trainer.backbones.device import CPU, Placement, place
from trainer.backbones.four_bits import is_packed
from trainer.backbones.part_digests import part_digests
from trainer.backbones.retarget import retarget
from trainer.config import load
from trainer.config.header import read_header
from trainer.config.lineage import spec_of
from trainer.ops.adapters.inject import base_layer
from trainer.ops.adapters.token_rows import ExtendedEmbedding, extend, relearned
from trainer.runs.adapter import check_backbone, load_adapted, load_base
from trainer.runs.merge_check import ALLOWED
from trainer.runs.scale_adapter import check_linear, new_rows, owner_of, tuner_layers

Words = dict[str, dict[str, Tensor]]  # by the word and the text encoder, its row (d,)


def load_summed(
    paths: Sequence[Path],
    scales: Sequence[float],
    backbone: str | None = None,
    *,
    placement: Placement = CPU,
) -> tuple[Backbone, dict[str, Any]]:
    """The model that several adapters make of their backbone together, frozen, in eval mode and
    placed; and the first one's recipe, with the words of all.

    Args:
        backbone: a name or folder to use instead of the recipes' own.

    Raises:
        ValueError: an adapter has a method that cannot be added, two have learned one word, or they
            were trained on different backbones.
    """
    trees = [read_header(path)[0] for path in paths]
    words = _words_of(paths, trees)
    _check_backbones(paths, trees, backbone)
    first = trees[0]
    base = load_base(spec_of(first, backbone), backbone or first["backbone"])
    retarget(base, first.get("objective") or {})
    own = {_plain(name): value for name, value in base.named_parameters()}
    total: dict[str, Tensor] = {}
    rows: Words = {}
    for path, scale, added in zip(paths, scales, words, strict=True):
        model, _ = load_adapted(path, backbone)
        _check_fits(path, model, base, first=paths[0])
        for name, change in _changes(path, model, own).items():
            total[name] = total.get(name, torch.zeros_like(change)) + scale * change
        rows |= {word: _rows(model, number) for number, word in enumerate(added)}
    with torch.no_grad():
        for name, change in total.items():
            own[name].copy_(own[name].double() + change)
    _add_words(base, rows)
    changed = {id(own[name]) for name in total}
    stored = [name for name, value in base.named_parameters() if id(value) in changed]
    place(base.eval().requires_grad_(False), placement, stored)
    return base, _joined(first, [word for added in words for word in added])


def _words_of(paths: Sequence[Path], trees: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The new words of each adapter; raises ValueError where two have the same, or one has a method
    that cannot be added."""
    owners: dict[str, Path] = {}
    found = []
    for path, tree in zip(paths, trees, strict=True):
        methods = load.methods_of(tree["methods"])
        check_linear(path, methods, key="adapter")
        found.append([word for method in methods.values() for word in method.words])
        for word in found[-1]:
            other = owners.setdefault(word.lower(), path)  # CLIP reads lower case
            if other != path or found[-1].count(word) > 1:
                both = all(set(load.methods_of(each["methods"])) == ALLOWED for each in trees)
                join = ", or join them with `merge`, which renames the second" if both else ""
                raise ValueError(
                    f"adapter={other} and adapter={path} have both learned the word {word}, and a "
                    f"prompt could mean either; train one of them with another data.token{join}"
                )
    return found


def _check_backbones(
    paths: Sequence[Path], trees: Sequence[dict[str, Any]], backbone: str | None
) -> None:
    """Raises ValueError where adapters were trained on backbones of different files, or that read
    prompts differently."""
    specs = [spec_of(tree, backbone) for tree in trees]
    parts = [part_digests(spec) for spec in specs]
    for path, tree, spec, own in zip(paths, trees, specs, parts, strict=True):
        differing = [name for name in parts[0] | own if parts[0].get(name) != own.get(name)]
        if differing:
            raise ValueError(
                f"adapter={path} was trained on backbone {tree['backbone']} and adapter={paths[0]} "
                f"on {trees[0]['backbone']}, which differ in {', '.join(differing)}; only "
                "adapters of one backbone add up"
            )
        if spec.max_tokens != specs[0].max_tokens:
            raise ValueError(
                f"adapter={path} reads {spec.max_tokens} tokens of a prompt and "
                f"adapter={paths[0]} {specs[0].max_tokens}; only adapters of one text.max_tokens "
                "add up"
            )


def _check_fits(path: Path, model: Backbone, base: Backbone, *, first: Path) -> None:
    """Raises ValueError where an adapter's model is of another backbone than the base, predicts
    something else, or is stored in 4 bits."""
    check_backbone(path, model.identity(), base.identity(), other=f"adapter={first}")
    paths = [(one.target, one.alphas_cumprod is None) for one in (model, base)]
    if paths[0] != paths[1]:
        raise ValueError(
            f"adapter={path} predicts {model.target}, and adapter={first} {base.target}; only "
            "adapters of one objective add up"
        )
    if any(is_packed(base_layer(layer)) for layer in model.denoiser.modules()):
        raise ValueError(
            f"adapter={path} was trained on weights in 4 bits (methods.nf4), to which no dW can be "
            "added; use it alone"
        )


def _plain(name: str) -> str:
    """The name of a parameter without the adapters around its layer."""
    return name.replace(".base_layer.", ".")


@torch.no_grad()
def _changes(path: Path, model: Backbone, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """dW of each parameter of the base that an adapter changes, in float64, by its name.

    Raises:
        ValueError: it has a weight that the base has not.
    """
    layers, words, own = tuner_layers(model), new_rows(model), dict(model.named_parameters())
    found = _of_known_words(model)
    with safe_open(path, "pt") as file:
        names = list(file.keys())
    adapters: dict[str, set[str]] = {}
    for name in names:
        where, adapter = owner_of(name, layers)
        if adapter is not None:
            adapters.setdefault(where, set()).add(adapter)
        elif name in own and id(own[name]) not in words and ".rows." not in name:
            key = _plain(name)
            if key not in base:
                key = key.replace(".table.weight", ".weight")  # beneath the rows of new words
            if key not in base:
                raise ValueError(
                    f"adapter={path} has {name}, which is no change of a weight of the base but "
                    "one of its own; use it alone"
                )
            found[key] = own[name].double() - base[key].double()
    for where, chosen in adapters.items():
        deltas = [layers[where].get_delta_weight(one).double() for one in sorted(chosen)]
        found[f"{_plain(f'{where}.')}weight"] = torch.stack(deltas).sum(0)
    return found


def _of_known_words(model: Backbone) -> dict[str, Tensor]:
    """The change (v, d) of the embedding tables in which known words have learned new rows."""
    found = {}
    for part, encoder in model.text_encoders.items():
        if (table := relearned(encoder)) is not None:
            outer: Any = encoder
            outer = outer.get_input_embeddings()
            name = next(path for path, module in encoder.named_modules() if module is outer)
            before = table.table.weight.double()
            found[f"{part}.{name}.weight"] = table.weight.double() - before
    return found


def _rows(model: Backbone, number: int) -> dict[str, Tensor]:
    """The row of a model's new word, by text encoder."""
    found = {}
    for part, encoder in model.text_encoders.items():
        module: Any = encoder
        table = module.get_input_embeddings()
        assert isinstance(table, ExtendedEmbedding)
        found[part] = table.rows[number].detach().clone()
    return found


@torch.no_grad()
def _add_words(base: Backbone, rows: Words) -> None:
    """New words with their rows, in order."""
    if not rows:
        return
    for part, encoder in base.text_encoders.items():
        extend(encoder, base.tokenizers[part], tokens=list(rows), words=[None] * len(rows))
        module: Any = encoder
        table = module.get_input_embeddings()
        for own, word in zip(table.rows, rows, strict=True):
            own.copy_(rows[word][part])


def _joined(first: dict[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """The first recipe, whose methods add the words of all."""
    if not words:
        return first
    return {**first, "methods": {**first["methods"], "new_token": {"tokens": list(words)}}}
