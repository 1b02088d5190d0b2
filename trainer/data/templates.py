"""Captions for a concept whose photos have none; `{}` is replaced by the token phrase.

Many wordings keep the concept from being tied to a single one, as in textual inversion (Gal et al.,
arXiv:2208.01618) and DreamBooth (Ruiz et al., arXiv:2208.12242). Each wording is true of any photo
of the concept: none names a style, a position or a number.
"""

from __future__ import annotations

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


def render(template: str, token_phrase: str) -> str:
    """Replaces `{}` by a token phrase such as "<new1> cat".

    The article is the template's: a phrase that needs "an" needs another template.

    Raises:
        ValueError: the template does not have exactly one `{}`, or the phrase is blank.
    """
    if template.count("{}") != 1:
        raise ValueError(
            f"template {template!r}: write {{}} exactly once, where the concept's name goes"
        )
    if not token_phrase.strip():
        raise ValueError("the token phrase is blank; give the new token, such as '<new1> cat'")
    # not str.format: other braces in a template or a phrase are plain text
    return template.replace("{}", token_phrase.strip())
