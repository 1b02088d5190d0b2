"""Merges several Custom Diffusion adapters into one without training, by the paper's closed form.

For each key and value matrix W0 of cross-attention, which the run of concept n trained to W_n:

    W = argmin |W C_reg^T - W0 C_reg^T|  such that  W C^T = V^T

C (s, d) holds the text features of the concepts' own words, V (s, out) the outputs that each
concept's W_n gives for its own words, and C_reg (m, d) the features of ordinary captions, whose
outputs are to stay as they were. By Lagrange multipliers (Custom Diffusion, arXiv 2212.04488,
equations 5 and 6):

    W = W0 + v^T D,   D = C (C_reg^T C_reg)^-1,   v^T = (V^T - W0 C^T) (D C^T)^-1

A transformer whose cross-attention has K and V is merged in the same way. Its features are the text
after the projection that all layers share, and a bias is one more column of W, for a feature that
is always 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.backbones.backbone import Backbone
from trainer.backbones.device import CPU, Placement, proving
from trainer.config import load
from trainer.config.lineage import spec_of
from trainer.data.caption_templates import TOKEN, with_class_words
from trainer.methods.apply import Plan, apply_methods
from trainer.runs.adapter import load_adapted, load_base, save_adapter
from trainer.runs.merge_check import check_mergeable
from trainer.runs.merge_texts import concept_prompts, ordinary_texts

LATENT_SIDE = 8  # of the latents in a forward in which only the text matters


@dataclass(frozen=True)
class LearnedConcept:
    """One adapter to merge.

    parameters: of the adapted model, by name; tree: its recipe; tokens: what its tokens are called
    in the merged adapter; phrases: these, each followed by its class word, as in "<v2> cat".
    """

    parameters: Mapping[str, Tensor]
    tree: Mapping[str, Any]
    tokens: list[str]
    phrases: list[str]


@dataclass(frozen=True)
class TextFeatures:
    """What the merged K and V read, in float64.

    ordinary (m, d): the features of ordinary captions; targets: (s, d) of each concept's words.
    """

    ordinary: Tensor
    targets: list[Tensor]


def merge_concepts(
    paths: Sequence[Path],
    out: Path,
    captions: Sequence[str] | None = None,
    placement: Placement = CPU,
) -> list[str]:
    """Writes one adapter with the concepts of all `paths` and returns its tokens in their order.

    A token that an earlier adapter also has is renamed, `<v1>` to `<v2>` and so on.

    captions: the ordinary captions; by default 200 that fit the backbone, see `ordinary_texts`.
    placement: where the model reads them; the rest is computed on the CPU, in float64.

    Raises:
        ValueError: there are fewer than two adapters, they have different backbones or options or
            were trained with other methods than `selective` and `new_token`, or the text encoder
            cannot tell their words apart.
    """
    if out.exists():
        raise ValueError(f"out={out} exists; give a file that does not, nothing is overwritten")
    if len(paths) < 2:
        raise ValueError("adapter: give at least two, as in adapter=[runs/a/1,runs/b/1]")
    out.parent.mkdir(parents=True, exist_ok=True)
    concepts = _load(paths)
    first = concepts[0].tree
    tree = _merged_recipe(concepts)
    model = load_base(spec_of(first), first["backbone"])
    plan = apply_methods(model, load.methods_of(tree["methods"]))
    rows = _copy_rows(model, plan, concepts)
    with proving(model, placement):
        text = TextFeatures(
            ordinary=features(model, list(captions or ordinary_texts(model.tokenizer)), None),
            targets=[_concept_features(model, concept) for concept in concepts],
        )
    solved = _solve_layers(model, plan, concepts, text=text)
    save_adapter(out, rows | solved, tree=tree, identity=model.identity())
    return tree["methods"]["new_token"]["tokens"]


def _load(paths: Sequence[Path]) -> list[LearnedConcept]:
    """The adapters at `paths`, checked against the first."""
    models = [load_adapted(path) for path in paths]
    check_mergeable(paths, models)
    found = []
    for (model, tree), own in zip(models, _tokens([tree for _, tree in models]), strict=True):
        parameters, phrases = dict(model.named_parameters()), _phrases(tree, own)
        found.append(LearnedConcept(parameters, tree, tokens=own, phrases=phrases))
    return found


def _phrases(tree: Mapping[str, Any], tokens: Sequence[str]) -> list[str]:
    """An adapter's tokens under their new names, each with its class word."""
    names = _own_tokens(tree)
    phrases = with_class_words(names, tree.get("data") or {})
    each = zip(names, tokens, phrases, strict=True)
    return [token + phrase.removeprefix(name) for name, token, phrase in each]


def _concept_features(model: Backbone, concept: LearnedConcept) -> Tensor:
    """The features (s, d) of a concept's prompts, for each of its tokens."""
    own = zip(concept.phrases, concept.tokens, strict=True)
    return torch.cat([features(model, concept_prompts(phrase), token) for phrase, token in own])


def closed_form(weight: Tensor, ordinary: Tensor, targets: Tensor, values: Tensor) -> Tensor:
    """The constrained least squares of this file's docstring, in float64.

    weight: W0 (out, d); ordinary: C_reg (m, d); targets: C (s, d); values: V (s, out).

    Returns:
        W (out, d).

    Raises:
        ValueError: targets that depend on each other linearly, so that no matrix meets them all.
    """
    keep = _independent(targets)
    targets, values = targets[keep], values[keep]
    gram = ordinary.T @ ordinary
    # the features of few captions may not span the space; the least-norm solution is one of many
    directions = torch.linalg.lstsq(gram, targets.T, driver="gelsd").solution.T  # s d
    inner = directions @ targets.T
    if torch.linalg.matrix_rank(inner) < len(inner):
        raise ValueError(
            "the concepts' words cannot be told apart by their text features, beside the ordinary "
            "captions; train them with tokens of their own, or give more captions"
        )
    change = torch.linalg.solve(inner.T, (values.T - weight @ targets.T).T).T
    return weight + change @ directions


def _solve_layers(
    model: Backbone, plan: Plan, concepts: Sequence[LearnedConcept], *, text: TextFeatures
) -> dict[str, Tensor]:
    """The merged tensors of all layers that the concepts trained, by name."""
    base = dict(model.named_parameters())
    solved: dict[str, Tensor] = {}
    for name in sorted(plan.names):
        if name.endswith(".weight"):
            bias = f"{name.removesuffix('weight')}bias"
            layer = [name, bias] if bias in plan.names else [name]
            matrices = [_matrix(concept.parameters, layer) for concept in concepts]
            merged = _solve_matrix(_matrix(base, layer), matrices, text)
            width = merged.shape[1] - (len(layer) - 1)
            solved |= zip(layer, (merged[:, :width], merged[:, -1]), strict=False)
    return solved


def _matrix(tensors: Mapping[str, Tensor], layer: Sequence[str]) -> Tensor:
    """A layer's weight (out, d), or with its bias as a last column (out, d + 1), in float64."""
    parts = [tensors[name].detach().double() for name in layer]
    return torch.cat([part.view(len(part), -1) for part in parts], dim=1)


def _solve_matrix(base: Tensor, sources: Sequence[Tensor], text: TextFeatures) -> Tensor:
    """The merged matrix of one layer in float32, of its base matrix and each concept's."""
    extra = base.shape[1] - text.ordinary.shape[1]  # 1 where a bias is the last column

    def widened(features: Tensor) -> Tensor:
        return F.pad(features, (0, extra), value=1.0)

    targets = [widened(each) for each in text.targets]
    values = [own @ source.T for own, source in zip(targets, sources, strict=True)]
    return closed_form(
        weight=base,
        ordinary=widened(text.ordinary),
        targets=torch.cat(targets),
        values=torch.cat(values),
    ).float()


@torch.no_grad()
def features(model: Backbone, prompts: Sequence[str], word: str | None) -> Tensor:
    """What K and V read (n, d), in float64, for the prompts' tokens up to the end of text: from
    `word` on if one is given, else from the second token, after the start of text."""
    found = []
    tokenizer = model.tokenizer
    states = _read(model, prompts).cpu().double()
    wanted = None if word is None else tokenizer.convert_tokens_to_ids(word)
    for prompt, state in zip(prompts, states, strict=True):
        text, most = model.prompts.as_read(prompt), tokenizer.model_max_length
        ids = tokenizer(text, truncation=True, max_length=most).input_ids
        begin = 1 if wanted is None else ids.index(wanted)
        found.append(state[begin : len(ids)])
    return torch.cat(found)


def _read(model: Backbone, prompts: Sequence[str]) -> Tensor:
    """The input (b, tokens, d) of the cross-attention layers' K, recorded in a forward on small
    latents.

    Raises:
        ValueError: it differs between layers, so that the closed form does not apply.
    """
    seen: list[Tensor] = []
    layers = [site.projection("k") for site in model.sites if site.kind == "cross"]
    if not layers:
        raise ValueError(
            "this backbone has no cross-attention, so no K of it reads the text alone, which the "
            "closed form needs; train the concepts in one run instead"
        )
    hooks = [
        layer.register_forward_pre_hook(lambda _, given: seen.append(given[0])) for layer in layers
    ]
    shape = (len(prompts), model.latent_channels, LATENT_SIDE, LATENT_SIDE)
    x_t, t = (torch.zeros(size, device=model.device) for size in (shape, len(prompts)))
    try:
        model.predict(x_t, t, model.encode_prompts(prompts))
    finally:
        for hook in hooks:
            hook.remove()
    if not all(torch.equal(seen[0], other) for other in seen[1:]):
        raise ValueError(
            "the cross-attention layers of this backbone do not all read the same text features, "
            "which merge needs; train the concepts together, in one run"
        )
    return seen[0]


def _independent(rows: Tensor) -> list[int]:
    """The numbers of the rows that do not repeat an earlier row."""
    keep: list[int] = []
    for number, row in enumerate(rows):
        if not any(torch.allclose(row, rows[other], rtol=0, atol=1e-9) for other in keep):
            keep.append(number)
    return keep


def _own_tokens(tree: Mapping[str, Any]) -> list[str]:
    return list(tree["methods"]["new_token"].get("tokens", [TOKEN]))


def _tokens(trees: Sequence[dict[str, Any]]) -> list[list[str]]:
    """What each adapter's tokens are called in the merged one; a token that an earlier adapter has
    becomes `<v2>`, `<v3>`, ..., the first that is free."""
    taken: set[str] = set()
    names = []
    for tree in trees:
        own = []
        for token in _own_tokens(tree):
            number = 1
            while token in taken:
                number += 1
                token = f"<v{number}>"
            taken.add(token)
            own.append(token)
        names.append(own)
    return names


def _merged_recipe(concepts: Sequence[LearnedConcept]) -> dict[str, Any]:
    """The merged adapter's recipe: the first concept's, with the tokens and data of all."""
    trees = [concept.tree for concept in concepts]
    first = trees[0]
    new_token = {"tokens": [token for concept in concepts for token in concept.tokens]}
    data = dict(first.get("data") or {})
    if all(isinstance((tree.get("data") or {}).get("concept"), str) for tree in trees):
        words = [tree["data"].get("class_word") for tree in trees]
        data["concept"] = [tree["data"]["concept"] for tree in trees]
        data["token"] = [concept.tokens[0] for concept in concepts]
        data["class_word"] = words if all(words) else None
    return {**first, "data": data, "methods": {**first["methods"], "new_token": new_token}}


@torch.no_grad()
def _copy_rows(
    model: Backbone, plan: Plan, concepts: Sequence[LearnedConcept]
) -> dict[str, Tensor]:
    """Copies every concept's token rows, in order, into the merged model; returns them by name."""
    own = dict(model.named_parameters())
    names = [name for name in plan.names if ".rows." in name]
    for part in dict.fromkeys(name.rpartition(".")[0] for name in names):
        learned = [row for concept in concepts for row in _rows(concept.parameters, part)]
        for number, value in enumerate(learned):
            own[f"{part}.{number}"].copy_(value)
    return {name: own[name].detach().clone() for name in names}


def _rows(parameters: Mapping[str, Tensor], part: str) -> list[Tensor]:
    """The token rows of one text encoder in their order."""
    count = sum(name.rpartition(".")[0] == part for name in parameters)
    return [parameters[f"{part}.{number}"] for number in range(count)]
