"""Which tokens of an attention layer's sequence are image, and which are text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainer.attention.grid import latent_grid

if TYPE_CHECKING:
    from trainer.attention.context import StepContext
    from trainer.attention.sites import Site


@dataclass(frozen=True)
class Spans:
    """Slices of the tokens of one sequence; an empty slice where it has none of a kind. Keys that
    an op has appended are in neither."""

    image: slice
    text: slice


@dataclass(frozen=True)
class Lengths:
    """What a layer was called with, in tokens: the image stream, or both streams where they come
    as one; and the text stream, where the layer has it as an argument of its own. rows: of the
    batch."""

    stream: int
    text: int | None = None
    rows: int = 0


def spans_of(
    tokens: int, *, site: Site, ctx: StepContext, lengths: Lengths | None, keys: bool
) -> Spans:
    """The spans of a sequence of so many queries, or keys, of a site.

    Raises:
        ValueError: text and image share the sequence, and which is which is not known.
    """
    nothing, everything = slice(0, 0), slice(0, tokens)
    if site.text_alone or (site.kind == "cross" and keys):
        return Spans(image=nothing, text=everything)
    if site.kind != "joint":
        _refuse_unforeseen(site)
        return Spans(image=everything, text=nothing)
    if lengths is None:
        raise ValueError(
            f"which tokens of {site.name!r} are text is known only while the layer runs, and on "
            "tokens (b, n, c); choose other sites"
        )
    if lengths.text is not None and tokens == lengths.stream and not keys:
        return Spans(image=everything, text=nothing)  # only the keys have text
    image, text = image_and_text(site, ctx, lengths)
    if tokens < image + text:
        raise ValueError(
            f"{site.name!r} was called with {image} image and {text} text tokens and attends to "
            f"{tokens}; which of them are text is not known"
        )
    assert site.joint is not None
    if site.joint.text_first:
        return Spans(image=slice(text, text + image), text=slice(0, text))
    return Spans(image=slice(0, image), text=slice(image, image + text))


def image_and_text(site: Site, ctx: StepContext, lengths: Lengths) -> tuple[int, int]:
    """How many image tokens and how many text tokens a joint site has in this call.

    Raises:
        ValueError: its family declares no order, or neither number is known.
    """
    joint = site.joint
    if joint is None:
        raise ValueError(
            f"{site.name!r} has text and image in one sequence, and the model's family does not "
            "declare their order; choose other sites, or a method that needs no spans"
        )
    if lengths.text is not None:
        return lengths.stream, lengths.text
    if joint.counts == "image":
        image = _image_tokens(site, ctx, joint.multiple)
        text = lengths.stream - image
    else:
        text = -1 if ctx.text_tokens is None else ctx.text_tokens
        image = lengths.stream - text
    if text < 0 or image < 0:
        raise ValueError(
            f"{site.name!r} has {lengths.stream} tokens of text and image, and how many are text "
            "is not known; give the StepContext text_tokens and latent_size"
        )
    return image, text


def _image_tokens(site: Site, ctx: StepContext, multiple: int) -> int:
    grid = latent_grid(site, ctx)
    return -1 if grid is None else -(-grid[0] * grid[1] * ctx.frames // multiple) * multiple


def _refuse_unforeseen(site: Site) -> None:
    if site.undeclared:
        raise ValueError(
            f"{site.name!r} may have text among its tokens: the model's family does not declare in "
            "which layers image and text share a sequence; choose another backbone"
        )
