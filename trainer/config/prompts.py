"""Prompts of a recipe: {token} and {class} in them become the concept's word and kind, and a word
in angle brackets is one that the model has."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainer.backbones.prompt_tokens import vocabulary
from trainer.backbones.spec import BackboneSpec
from trainer.common.section import Section
from trainer.common.suggest import nearest
from trainer.config.header import read_header
from trainer.config.schema import RecipeError
from trainer.config.sections import EvaluateSpec, PreviewSpec
from trainer.data.caption_templates import fill
from trainer.data.source import Source
from trainer.methods.apply import find_method, method_names
from trainer.methods.method import Method

ANGLED = re.compile(r"<[^<>\s|/][^<>\s|]*>")
NEEDS_TOKEN = "{token}"


@dataclass(frozen=True)
class Words:
    """What a prompt may name: the concept's new word and its kind, where there are some, and all
    words in angle brackets that the model has. spelled: whether its vocabulary has a word, asked
    for those that are not in `added`."""

    token: str | None
    kind: str | None
    added: Collection[str]
    spelled: Callable[[str], bool]

    def prompt(self, text: str, key: str) -> str:
        """A prompt with its places filled. key: names it in errors.

        Raises:
            RecipeError: a place or a word in angle brackets that stands for nothing.
        """
        try:
            filled = fill(text, self.token, self.kind)
        except ValueError as error:
            raise RecipeError(f"{key}: {text!r}: {error}") from None
        self.known(filled, text, key)
        return filled

    def known(self, filled: str, text: str, key: str) -> None:
        """Raises RecipeError for a word in angle brackets that the model does not have. text: the
        prompt as it was written."""
        for word in ANGLED.findall(filled):
            if word not in self.added and not self.spelled(word):
                known = nearest(word, self.added) if self.added else "; it has none"
                raise RecipeError(
                    f"{key}: {text!r}: {word} is no word of this model{known}"
                    + ("; {token} stands for the concept's" if self.token else "")
                )


def words_of(
    data: Source, methods: Mapping[str, Method], spec: BackboneSpec, *, kinds: Sequence[str]
) -> Words:
    """The words of a recipe's model: those of its data and methods, and of the runs that its
    backbone is the result of. kinds: what the words stand for, in their order."""
    own = [word for method in methods.values() for word in method.words]
    tokens = list(dict.fromkeys([*data.words, *own]))
    return Words(
        token=tokens[0] if tokens else None,
        kind=kinds[0] if kinds else None,
        added=[*tokens, *_words_below(spec)],
        spelled=lambda word: word in vocabulary(spec),
    )


def check_texts(data: Source, words: Words, spec: BackboneSpec) -> None:
    """Raises RecipeError for a word that the model does not have in a caption that is an option of
    the data, or that the base model does not have in a prompt of class images."""
    base = replace(words, token=None, added=_words_below(spec))
    for text in getattr(data, "prior_prompts", ()):
        base.prompt(text, "data.prior_prompts")
    for key in ("template", "prompt"):  # of the sources folder and video
        if (text := getattr(data, key, None)) is not None:
            words.known(text, text, f"data.{key}")


def unspelled(data: Source, methods: Mapping[str, Method], spec: BackboneSpec) -> list[str]:
    """A sentence for each word of the data in angle brackets that no method adds."""
    own = [word for method in methods.values() for word in method.words]
    return [
        f"data.token={word}: no method adds it, so it is read as several tokens; "
        "methods.new_token={} makes it one, and a plain word like sks is read as it is"
        for word in data.words
        if ANGLED.fullmatch(word)
        and word not in (*own, *_words_below(spec))
        and word not in vocabulary(spec)
    ]


def words_in(tree: Mapping[str, Any], vocabulary: Collection[str]) -> Words:
    """The words of an adapter's recipe, on a model whose tokenizer has a vocabulary."""
    data, methods = tree.get("data") or {}, tree.get("methods") or {}
    token, kind = (_first(data.get(key)) for key in ("token", "class_word"))
    added = added_by(methods)
    known = [*added, *(word for word in vocabulary if ANGLED.fullmatch(word))]
    return Words(
        token=token or next(iter(added), None),
        kind=kind,
        added=list(dict.fromkeys(known)),
        spelled=lambda word: False,
    )


def _first(value: Any) -> str | None:
    found = value[0] if isinstance(value, list) and value else value
    return found if isinstance(found, str) else None


def _words_below(spec: BackboneSpec) -> list[str]:
    """The words that the runs have added that a backbone is the result of."""
    trees = [read_header(Path(path))[0] for path in spec.adapters]
    return [word for tree in trees for word in added_by(tree["methods"])]


def added_by(methods: Mapping[str, Any]) -> list[str]:
    """The words that the methods of a stored recipe have added."""
    return [
        str(word)
        for name, values in methods.items()
        if isinstance(values, Mapping) and _adds_words(name)
        for word in values.get("tokens", find_method(name).model_fields["tokens"].default)
    ]


def follow_data(methods: Any, data: Source) -> Any:
    """The tree of methods, in which those that add words, and name none, add the data's."""
    if not isinstance(methods, dict) or not data.words:
        return methods
    return {
        name: {**values, "tokens": list(data.words)}
        if isinstance(values, dict) and "tokens" not in values and _adds_words(name)
        else values
        for name, values in methods.items()
    }


def _adds_words(name: str) -> bool:
    return name in method_names() and find_method(name).adds_words


def with_words(sections: Mapping[str, Section], words: Words) -> dict[str, Section]:
    """The sections `preview` and `evaluate` with the words in their prompts."""
    preview, evaluate = sections["preview"], sections["evaluate"]
    assert isinstance(preview, PreviewSpec) and isinstance(evaluate, EvaluateSpec)
    return {"preview": _shown(preview, words), "evaluate": _asked(evaluate, words)}


def _shown(preview: PreviewSpec, words: Words) -> PreviewSpec:
    if not preview.every:  # none are made; a recipe's own may name a token that is not there
        return preview.model_copy(update={"prompts": (), "maps": None})
    prompts = tuple(words.prompt(text, "preview.prompts") for text in preview.prompts)
    maps = None if preview.maps is None else words.prompt(preview.maps, "preview.maps")
    negative = words.prompt(preview.negative, "preview.negative")
    return preview.model_copy(update={"prompts": prompts, "maps": maps, "negative": negative})


def _asked(evaluate: EvaluateSpec, words: Words) -> EvaluateSpec:
    """Without a token, the prompts of a concept are left out."""

    def filled(key: str) -> tuple[str, ...]:
        own: Sequence[str] = getattr(evaluate, key)
        if words.token is None:
            own = [text for text in own if NEEDS_TOKEN not in text]
        return tuple(words.prompt(text, f"evaluate.{key}") for text in own)

    found = {key: filled(key) for key in ("alone", "beside", "together", "known")}
    negative = words.prompt(evaluate.negative, "evaluate.negative")
    return evaluate.model_copy(update={**found, "negative": negative})
