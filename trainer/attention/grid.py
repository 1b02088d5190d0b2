"""Where the tokens of a site lie in the image, or in time."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.attention.context import StepContext
    from trainer.attention.sites import Site


def latent_grid(site: Site, ctx: StepContext) -> tuple[int, int] | None:
    """Height and width of the tokens of one picture of the latent's size, None where that or the
    site's divisor is not known; strided convolutions round up at odd sizes."""
    if ctx.latent_size is None or site.divisor is None:
        return None
    height, width = (-(-length // site.divisor) for length in ctx.latent_size)
    return height, width


def token_grid(tokens: int, *, site: Site, ctx: StepContext, who: str) -> tuple[int, int]:
    """Height and width of the token grid. The tokens of a temporal site are frames, in one line.

    Raises:
        ValueError: the number fits neither the latent's size nor a square; the message names who
            asked.
    """
    if site.kind == "temporal":
        return 1, tokens
    grid = latent_grid(site, ctx)
    if grid is not None and grid[0] * grid[1] == tokens:
        return grid
    if site.keeps_processor:  # its tokens may be others than one picture's: no square is guessed
        raise ValueError(
            f"{who} cannot find the grid of {tokens} tokens at {site.name!r}, which are not those "
            f"of one picture of the latent's size; choose other sites, or give the StepContext the "
            "latent_size that the denoiser is called with"
        )
    side = round(tokens**0.5)
    if side * side != tokens:
        raise ValueError(
            f"{who} cannot find the grid of {tokens} tokens at {site.name!r}; give the "
            "StepContext the latent_size the denoiser is called with"
        )
    return side, side
