"""Several Custom Diffusion adapters into one, without training: the closed-form solution of the
paper.

For each key and value matrix W0 of cross-attention, whose concepts n trained it to W_n:

    W = argmin |W C_reg^T - W0 C_reg^T|  such that  W C^T = V

C (s, d): text features of the concepts' own words, V (s, out) what each concept's W_n made of its
own, C_reg (m, d): features of ordinary captions, which are to stay as they were. By Lagrange
multipliers (Custom Diffusion, arXiv 2212.04488, equations 5 and 6):

    W = W0 + v^T D,   D = C (C_reg^T C_reg)^-1,   v^T = (V^T - W0 C^T) (D C^T)^-1

A DiT whose cross-attention has K and V is solved the same way. Its features are the text as it has
projected it for all layers, and a bias is one more column of W, for a feature that is always 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.backbones.backbone import Backbone
from trainer.config import load
from trainer.config.lineage import spec_of
from trainer.methods.apply import apply_methods
from trainer.runs import adapter
from trainer.runs.adapter import load_adapted, load_base, save_adapter

CONCEPT_PROMPTS = ("{}", "a photo of {}")  # as the official code asks for them
NUM_CAPTIONS = 200
LATENT_SIDE = 8  # of the latent, where only the text matters
ALLOWED = {"selective", "new_token"}


def merge_concepts(
    paths: Sequence[Path], out: Path, captions: Sequence[str] | None = None
) -> list[str]:
    """Writes one adapter with the concepts of all `paths` and returns its tokens, in their order.

    A token that an earlier adapter has already is renamed, `<v1>` to `<v2>` and so on. captions:
    the ordinary ones, 200 of the embedded world if None.

    Raises:
        ValueError: fewer than two adapters, of different backbones or options, trained with other
        methods than `selective` and `new_token`, or whose words the text encoder cannot tell apart.
    """
    if out.exists():
        raise ValueError(f"out={out} exists; name a file that does not, nothing is written over")
    if len(paths) < 2:
        raise ValueError("adapter: give at least two, as in adapter=[runs/a/1,runs/b/1]")
    parts = [load_adapted(path) for path in paths]
    first, tree = parts[0]
    for path, (model, other) in zip(paths, parts, strict=True):
        _refuse_others(path, other, tree)
        adapter.check_backbone(path, first.identity(), model.identity())
    names = _tokens([other for _, other in parts])
    merged_tree = _tree(tree, parts, names)
    name = tree["backbone"]
    merged = load_base(spec_of(tree), name)
    plan = apply_methods(merged, load.methods_of(merged_tree["methods"]))
    base = {name: value.detach().clone() for name, value in merged.named_parameters()}
    sources = [dict(model.named_parameters()) for model, _ in parts]
    rows = [name for name in plan.names if ".rows." in name]
    _copy_rows(base, rows, merged, sources)
    ordinary = features(merged, list(captions or _world_captions()), None)
    own = [
        [
            features(merged, [prompt.format(name) for prompt in CONCEPT_PROMPTS], name)
            for name in new
        ]
        for new in names
    ]
    targets = [torch.cat(each) for each in own]
    tensors = {name: base[name] for name in rows}
    for name in sorted(plan.names):
        if name.endswith(".weight"):
            bias = f"{name.removesuffix('weight')}bias"
            layer = [name, bias] if bias in plan.names else [name]
            tensors |= _solved(layer, base, sources, targets, ordinary)
    save_adapter(out, tensors, merged_tree, merged.identity())
    return [name for new in names for name in new]


def closed_form(weight: Tensor, ordinary: Tensor, targets: Tensor, values: Tensor) -> Tensor:
    """The constrained least squares of this file's head, in float64.

    weight (out, d), ordinary (m, d), targets (s, d), values (s, out); returns (out, d).

    Raises:
        ValueError: targets that are not independent, which no matrix can serve at once.
    """
    keep = _independent(targets)
    targets, values = targets[keep], values[keep]
    gram = ordinary.T @ ordinary
    # features of few captions may not span the space; what they leave open is free
    directions = torch.linalg.lstsq(gram, targets.T, driver="gelsd").solution.T  # s d
    inner = directions @ targets.T
    if torch.linalg.matrix_rank(inner) < len(inner):
        raise ValueError(
            "the concepts' words cannot be told apart by their text features, beside the ordinary "
            "captions; train them with tokens of their own, or give more captions"
        )
    change = torch.linalg.solve(inner.T, (values.T - weight @ targets.T).T).T
    return weight + change @ directions


def _solved(
    layer: Sequence[str],
    base: Mapping[str, Tensor],
    sources: Sequence[Mapping[str, Tensor]],
    targets: Sequence[Tensor],
    ordinary: Tensor,
) -> dict[str, Tensor]:
    """The merged tensors of one layer: of its weight, and of its bias if that is named behind.

    targets: (s, d) of each source.
    """
    biased = len(layer) - 1

    def matrix(tensors: Mapping[str, Tensor]) -> Tensor:
        parts = [tensors[name].detach().double() for name in layer]
        return torch.cat([part.view(len(part), -1) for part in parts], dim=1)

    def seen(features: Tensor) -> Tensor:
        return F.pad(features, (0, biased), value=1.0)

    own = [seen(each) for each in targets]
    values = [each @ matrix(source).T for each, source in zip(own, sources, strict=True)]
    found = closed_form(matrix(base), seen(ordinary), torch.cat(own), torch.cat(values)).float()
    width = found.shape[1] - biased
    return dict(zip(layer, (found[:, :width], found[:, -1]), strict=False))


@torch.no_grad()
def features(model: Backbone, prompts: Sequence[str], word: str | None) -> Tensor:
    """What K and V read (n, d), in float64, of the prompts' tokens up to the end of text, from
    `word` on if one is given, from the second token otherwise."""
    found = []
    tokenizer = model.tokenizer
    states = _read(model, prompts).double()
    wanted = None if word is None else tokenizer.convert_tokens_to_ids(word)
    for prompt, state in zip(prompts, states, strict=True):
        ids = tokenizer(prompt, truncation=True, max_length=tokenizer.model_max_length).input_ids
        begin = 1 if wanted is None else ids.index(wanted)
        found.append(state[begin : len(ids)])
    return torch.cat(found)


def _read(model: Backbone, prompts: Sequence[str]) -> Tensor:
    """What reaches K of the cross-attention layers (b, tokens, d), seen in a forward of a small
    latent.

    Raises:
        ValueError: it is not the same for all layers, so that no one solution is right for all.
    """
    seen: list[Tensor] = []
    layers = [site.projection("k") for site in model.sites if site.kind == "cross"]
    hooks = [
        layer.register_forward_pre_hook(lambda _, given: seen.append(given[0])) for layer in layers
    ]
    x_t = torch.zeros(len(prompts), model.latent_channels, LATENT_SIDE, LATENT_SIDE)
    try:
        model.predict(x_t, torch.zeros(len(prompts)), model.encode_prompts(prompts))
    finally:
        for hook in hooks:
            hook.remove()
    if not all(torch.equal(seen[0], other) for other in seen[1:]):
        raise ValueError(
            "the cross-attention layers of this backbone read the text each in a way of its own; "
            "merge is for those that read the same, train the concepts together, in one run"
        )
    return seen[0]


def _independent(rows: Tensor) -> list[int]:
    """Row numbers without those that repeat an earlier row."""
    keep: list[int] = []
    for number, row in enumerate(rows):
        if not any(torch.allclose(row, rows[other], rtol=0, atol=1e-9) for other in keep):
            keep.append(number)
    return keep


def _world_captions() -> list[str]:
    from trainer.data.world.scenes import draw_layout

    return [draw_layout(5, index).caption for index in range(NUM_CAPTIONS)]


def _refuse_others(path: Path, tree: dict[str, Any], first: dict[str, Any]) -> None:
    used = {name for name, options in tree["methods"].items() if options is not None}
    if used != ALLOWED:
        raise ValueError(
            f"adapter={path} was trained with {', '.join(sorted(used))}; only Custom Diffusion's "
            "selective and new_token merge in closed form"
        )
    if tree["methods"]["selective"] != first["methods"]["selective"]:
        raise ValueError(
            f"adapter={path}: its methods.selective is not that of the first adapter; they must "
            "have trained the same layers"
        )
    if set(tree["methods"]["selective"].get("projections", ("k", "v"))) - {"k", "v"}:
        raise ValueError(
            f"adapter={path}: the closed form is for k and v, which read the text; it trained "
            f"{tree['methods']['selective']['projections']}"
        )
    kind = tree["methods"]["selective"].get("sites", "cross")
    if "cross" not in kind:
        raise ValueError(f"adapter={path}: the closed form is for cross-attention, not {kind!r}")


def _tokens(trees: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The words of each adapter in the merged one; a word that is taken gets the next free
    number."""
    taken: set[str] = set()
    names = []
    for tree in trees:
        own = []
        for token in tree["methods"]["new_token"].get("tokens", ["<v1>"]):
            number = 1
            while token in taken:
                number += 1
                token = f"<v{number}>"
            taken.add(token)
            own.append(token)
        names.append(own)
    return names


def _tree(
    tree: dict[str, Any], parts: Sequence[tuple[Any, dict[str, Any]]], names: list[list[str]]
) -> dict[str, Any]:
    """The merged adapter's recipe: the first one's, with all concepts and tokens."""
    token = {"tokens": [name for new in names for name in new]}
    data = dict(tree.get("data") or {})
    trees = [other for _, other in parts]
    if all(isinstance((other.get("data") or {}).get("concept"), str) for other in trees):
        words = [other["data"].get("class_word") for other in trees]
        data["concept"] = [other["data"]["concept"] for other in trees]
        data["token"] = [new[0] for new in names]
        data["class_word"] = words if all(words) else None
    return {**tree, "data": data, "methods": {**tree["methods"], "new_token": token}}


@torch.no_grad()
def _copy_rows(
    base: dict[str, Tensor],
    rows: Sequence[str],
    merged: Backbone,
    sources: Sequence[dict[str, Any]],
) -> None:
    """Every source's token rows, in order, into the merged model's."""
    own = dict(merged.named_parameters())
    for part in dict.fromkeys(name.rpartition(".")[0] for name in rows):
        learned = [row for source in sources for row in _rows(source, part)]
        for number, value in enumerate(learned):
            name = f"{part}.{number}"
            own[name].copy_(value)
            base[name] = value.clone()


def _rows(source: dict[str, Any], part: str) -> list[Tensor]:
    """The token rows of one text encoder in their order."""
    count = sum(name.rpartition(".")[0] == part for name in source)
    return [source[f"{part}.{number}"].detach() for number in range(count)]
