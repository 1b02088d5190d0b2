"""FEC's three schemes: against loops, and that the source's prompt gives the picture itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from edit_checks import (
    UNGUIDED_SOURCE,
    apart,
    call_at,
    edited,
    loop_attention,
    outputs,
    pictures,
    qkv,
    site_of,
    some_trajectory,
)

from trainer.attention.bank import FeatureBank
from trainer.diffusion.image_edit import EditJob, invert_picture
from trainer.diffusion.sampling_settings import Sampling
from trainer.ops.fec import REUSE, Consistency, Consistent

OWN = "a fox on a red background"
SCHEMES = ("reference", "noise", "kv-reuse")


def test_keys_and_values_kept_are_those_used_at_their_step(tiny: Any) -> None:
    op = Consistent(Consistency("fec", "self", scheme=REUSE, steps=(0.0, 0.5)), FeatureBank())
    site, made = site_of(tiny), qkv(3, 16)
    op.keeping = True
    kept = qkv(1, 16)
    outputs(op, kept, call_at(site, 1, groups=("source/cond",)))
    outputs(op, kept, call_at(site, 2, groups=("source/cond",)))
    assert list(op.bank) == [(1, site.name)]
    op.keeping = False
    found = outputs(op, made, call_at(site, 1, groups=UNGUIDED_SOURCE))
    for n, group in enumerate(UNGUIDED_SOURCE):
        k, v = (made[1][n], made[2][n]) if group == "source/cond" else (kept[1][0], kept[2][0])
        torch.testing.assert_close(found[group][0], loop_attention(made[0][n], k, v))
    with pytest.raises(ValueError, match="nothing was kept of"):
        outputs(op, made, call_at(site, 0, groups=UNGUIDED_SOURCE))


def test_two_schemes_are_two_ways_to_one_edit(tiny: Any) -> None:
    """Keys of rows beside, and keys kept before, of the same latents."""
    told: Any = {"source": OWN, "trajectory": some_trajectory(tiny), "inverted": True}
    found = [
        edited(tiny, {"fec": {"scheme": scheme, "sites": "self"}}, "a cat", **told)[0]
        for scheme in ("reference", "kv-reuse")
    ]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-3)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_sources_prompt_gives_the_picture(scheme: str, tiny: Any) -> None:
    """Exactly with the noise scheme, guided or not; with the others where nothing guides."""
    how = Sampling(steps=4, guidance=3.0 if scheme == "noise" else 1.0)
    picture = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    own = invert_picture(tiny, picture, OWN, settings=how)
    job = EditJob([OWN, "a cat"], OWN, seed=0, settings=how, inverted=own)
    made = pictures(tiny, {"fec": {"scheme": scheme}}, job)
    there = tiny.decode(own.trajectory[4])
    assert made.source is not None and torch.equal(made.source, there)
    assert apart(made.pictures[:1], there) < (1e-3 if scheme == "noise" else 0.05)
    assert apart(made.pictures[1:], there) > 1e-3


def test_a_generated_source_has_no_inversion_to_read(tiny: Any) -> None:
    for scheme in SCHEMES[1:]:
        with pytest.raises(ValueError, match=r"methods\.fec reads the inversion of its source"):
            edited(tiny, {"fec": {"scheme": scheme}}, "a cat", source=OWN)


def test_more_than_the_limit_is_refused(tiny: Any) -> None:
    options = {"scheme": "kv-reuse", "bank_limit": 0.01}
    with pytest.raises(ValueError, match=r"methods\.fec: the features of .* the limit is 0\.01"):
        edited(
            tiny, {"fec": options}, "a cat", source=OWN, trajectory=some_trajectory(tiny),
            inverted=True,
        )  # fmt: skip
    assert not any(hosted.ops for hosted in tiny.host.processors.values())
