"""Texts that name a concept by {token}, its new word, and {class}, what kind of thing it is:
captions for a concept whose photos have none, and what an evaluation asks of a concept.

Many wordings keep the concept from being tied to a single one, as in textual inversion (Gal et al.,
arXiv:2208.01618) and DreamBooth (Ruiz et al., arXiv:2208.12242). Each wording is true of any photo
of the concept: none names a style, a position or a number.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from trainer.common.articles import article_of
from trainer.common.suggest import nearest

TOKEN = "<v1>"  # the new word where data.token is not given
TEMPLATES: tuple[str, ...] = (
    "a photo of a {}",
    "a picture of a {}",
    "a photo of the {}",
    "a snapshot of a {}",
    "an image showing a {}",
    "a photo with a {} in it",
    "a photo in which a {} can be seen",
    "a {} in a photo",
    "a {} in a picture",
    "a {} in the frame",
    "a {} as the subject",
    "a view of a {}",
    "a shot of one {}",
    "a photograph of a {}",
    "the {} in a photograph",
    "a photo taken of a {}",
    "a picture that shows the {}",
    "this is a {}",
    "here is a photo of a {}",
    "look at this {}",
    "a {}",
)
# what an evaluation asks for: the concept as it is, in other places, and as other kinds of picture,
# the ideas of DreamBooth's and Custom Diffusion's (arXiv:2212.04488) lists; each is sensible for a
# thing, an animal and a person
CONCEPT_PROMPTS: tuple[str, ...] = (
    "a photo of a {token} {class}",
    "a {token} {class} by the sea",
    "a {token} {class} in deep snow",
    "a {token} {class} in front of a brick wall",
    "a {token} {class} on a lawn at sunset",
    "a {token} {class} in a busy street at night",
    "an oil painting of a {token} {class}",
    "a pencil drawing of a {token} {class}",
)
# other things of its kind, which the model should still tell from the concept
CLASS_PROMPTS: tuple[str, ...] = ("a {class}", "a photo of a {class}")
PLACES = ("token", "class")
PLACE = re.compile(r"(?P<article>\b[Aa]n?(?P<gap>\s+))?\{(?P<place>\w+)\}")


def render(template: str, phrase: str) -> str:
    """Replaces `{}` by a phrase such as "<v1> cat", and puts the right article before it.

    Raises:
        ValueError: the template does not have exactly one `{}`, or the phrase is blank.
    """
    if template.count("{}") != 1:
        raise ValueError(
            f"template {template!r}: write {{}} exactly once, where the concept's name goes"
        )
    if not phrase.strip():
        raise ValueError("the phrase is blank; give the new token, such as '<v1> cat'")
    # not str.format: other braces in a template or a phrase are plain text
    return fill(template.replace("{}", "{token}"), phrase.strip(), None)


def fill(text: str, token: str | None, kind: str | None) -> str:
    """`text` with the token for {token} and the kind of thing for {class}, each after the right
    article. Without a kind, {class} after {token} is left out: a photo of a {token} {class} becomes
    a photo of a <v1>.

    Raises:
        ValueError: there is no such word, or no such place.
    """
    if kind is None:
        text = re.sub(r"\{token\}\s+\{class\}", "{token}", text)
    values = {"token": token, "class": kind}

    def put(found: re.Match[str]) -> str:
        place = found["place"]
        if place not in values:
            raise ValueError(f"{{{place}}} stands for nothing{nearest(place, PLACES)}")
        value = values[place]
        if value is None:
            what = "a new word" if place == "token" else "data.class_word"
            raise ValueError(f"{{{place}}} stands for {what}, and this recipe has none")
        if found["article"] is None:
            return value
        article = article_of(value)
        own = article.capitalize() if found["article"][0] == "A" else article
        return f"{own}{found['gap']}{value}"

    return PLACE.sub(put, text)


def check_phrase(text: str, *, kind: bool) -> None:
    """Checks words of a user. kind: what kind of thing a concept is, which the texts above put an
    article before.

    Raises:
        ValueError: they are blank, or such a kind has an article of its own.
    """
    if not text.strip():
        raise ValueError("it is blank; write words, as in dog, or leave it out")
    if kind and (own := re.match(r"(?:an?|the)\s+(.+)", text.strip(), re.IGNORECASE)):
        raise ValueError(
            f"{text!r} has an article, and captions put one before it, as in "
            f"'a photo of a {TOKEN} {own[1]}'; write {own[1]} alone"
        )


def with_class_words(words: Iterable[str], data: Mapping[str, Any]) -> list[str]:
    """Each new word, followed by the class word it was trained with, as in "<v1> cat"; alone where
    it had none. data: the section of a recipe's tree, which a stranger may have written."""
    tokens = texts_of(data.get("token")) or (TOKEN,)
    classes = dict(zip(tokens, texts_of(data.get("class_word")), strict=False))
    return [f"{word} {classes[word]}" if classes.get(word) else word for word in words]


def texts_of(value: Any) -> tuple[str, ...]:
    """The texts that a value of a stored recipe is, one or a list; none of any other value."""
    if isinstance(value, str):
        return (value,)
    listed = value if isinstance(value, list | tuple) else ()
    return tuple(each for each in listed if isinstance(each, str))
