"""Guidance: from the denoiser's outputs for several groups of rows to one, as pure functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

UNCOND, COND = "target/uncond", "target/cond"
GIVEN = "target/given"  # told of all but the text


def classifier_free(
    outputs: Mapping[str, Tensor],
    scale: float,
    rescale: Callable[[Tensor, Tensor], Tensor] | None = None,
    *,
    branch: str = "target",
    given_scale: float | None = None,
) -> Tensor:
    """output = uncond + scale * (cond - uncond), arXiv 2207.12598, equation 6; each (b, c, h, w).
    Without an unconditional output, cond itself. rescale: (output, cond) -> what takes the place of
    the output, of models whose pipeline changes it. branch: of the rows.

    given_scale: of the conditions beside the text, which then have a scale of their own; with given
    the output for rows that are told of them and not of the text,

        uncond + given_scale * (given - uncond) + scale * (cond - given)

    InstructPix2Pix, arXiv 2211.09800, equation 3.
    """
    names = f"{branch}/uncond", f"{branch}/cond"
    if names[0] not in outputs:
        return outputs[names[1]]
    uncond, cond = (outputs[name] for name in names)
    if given_scale is None:
        output = uncond + scale * (cond - uncond)
    else:
        given = outputs[f"{branch}/given"]
        output = uncond + given_scale * (given - uncond) + scale * (cond - given)
    return output if rescale is None else rescale(output, cond)


def temporal(output: Tensor, uncond: Tensor, image: Tensor, scale: float) -> Tensor:
    """`output` of `classifier_free`, moved away from what the frames would be as images of their
    own: with image the unconditional output (b f, c, h, w) for frames that do not see each other,

        image + scale * (uncond - image) + guidance * (cond - uncond)

    Gen-1, arXiv 2302.03011, section 3.4.
    """
    return output + (scale - 1) * (uncond - image)
