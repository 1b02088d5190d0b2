"""Guidance: from the denoiser's outputs for several groups of rows to one, as pure functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

UNCOND, COND = "target/uncond", "target/cond"


def classifier_free(
    outputs: Mapping[str, Tensor],
    scale: float,
    rescale: Callable[[Tensor, Tensor], Tensor] | None = None,
    *,
    branch: str = "target",
) -> Tensor:
    """output = uncond + scale * (cond - uncond), arXiv 2207.12598, equation 6; each (b, c, h, w).
    Without an unconditional output, cond itself. rescale: (output, cond) -> what takes the place of
    the output, of models whose pipeline changes it. branch: of the rows."""
    names = f"{branch}/uncond", f"{branch}/cond"
    if names[0] not in outputs:
        return outputs[names[1]]
    uncond, cond = (outputs[name] for name in names)
    output = uncond + scale * (cond - uncond)
    return output if rescale is None else rescale(output, cond)


def temporal(output: Tensor, uncond: Tensor, image: Tensor, scale: float) -> Tensor:
    """`output` of `classifier_free`, moved away from what the frames would be as images of their
    own: with image the unconditional output (b f, c, h, w) for frames that do not see each other,

        image + scale * (uncond - image) + guidance * (cond - uncond)

    Gen-1, arXiv 2302.03011, section 3.4.
    """
    return output + (scale - 1) * (uncond - image)
