"""FAM diffusion's two modulations against plain expressions, its native pass, and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from edit_checks import apart, call_at, drawn, latents, site_of

from trainer.attention.bank import FeatureBank
from trainer.config.load import methods_of
from trainer.diffusion.sampling_settings import Sampling
from trainer.methods.apply import apply_methods
from trainer.ops.fam_diffusion import Enlargement, Modulation, enlarged_maps, mixed_frequencies

LARGE = Sampling(steps=4, guidance=3.0, size=(32, 32))
OWN = "a fox on a red background"


def test_low_frequencies_are_mixed_and_high_ones_stay() -> None:
    x, other = drawn(1, 2, 8, 6), drawn(1, 2, 8, 6, seed=1)
    found = torch.fft.fft2(mixed_frequencies(x, other, 0.5, own=0.25))
    own, wanted = torch.fft.fft2(x), torch.fft.fft2(other)
    for i in range(8):
        for j in range(6):
            low = min(i, 8 - i) / 8 < 0.25 and min(j, 6 - j) / 6 < 0.25
            value = 0.25 * own + 0.75 * wanted if low else own
            torch.testing.assert_close(found[..., i, j], value[..., i, j], rtol=0, atol=1e-4)
    torch.testing.assert_close(mixed_frequencies(x, x, 0.5, own=0.1), x)
    assert apart(mixed_frequencies(x, other, 0.0, own=0.1), x) < 1e-5


def test_enlarged_maps_are_bilinear_in_queries_and_keys() -> None:
    maps = drawn(1, 2, 6, 6).softmax(-1)
    found = enlarged_maps(maps, (2, 3), (4, 6))
    torch.testing.assert_close(found.sum(-1), torch.ones(1, 2, 24))
    wanted = torch.nn.functional.interpolate(
        maps[0, 0].T.view(6, 1, 2, 3), scale_factor=2, mode="bilinear"
    ).view(6, 24)
    keys = torch.nn.functional.interpolate(
        wanted.T.reshape(24, 1, 2, 3), scale_factor=2, mode="bilinear"
    ).view(24, 24)
    torch.testing.assert_close(found[0, 0], keys / keys.sum(-1, keepdim=True))


def test_maps_are_drawn_to_those_of_the_native_picture(tiny: Any) -> None:
    op = Modulation(Enlargement("fam", "self", weight=0.25), FeatureBank())
    site, groups = site_of(tiny, divisor=2), ("target/cond",)
    native, large = drawn(1, 2, 4, 4).softmax(-1), drawn(1, 2, 16, 16, seed=1).softmax(-1)
    op.native = True
    small = call_at(site, groups=groups)
    small.ctx = small.ctx.__class__(**{**vars(small.ctx), "latent_size": (4, 4)})
    assert torch.equal(op.probs(native, small), native)
    op.native = False
    found = op.probs(large, call_at(site, groups=groups))
    wanted = 0.75 * large + 0.25 * enlarged_maps(native, (2, 2), (4, 4))
    torch.testing.assert_close(found, wanted)
    assert torch.equal(op.probs(large, call_at(site, 1, groups=groups)), large)


def test_a_large_picture_follows_the_native_one(tiny: Any, dit: Any) -> None:
    for model in (tiny, dit):
        plain = latents(model, [OWN], how=LARGE)
        found = []
        for options in ({}, {"weight": 0}, {"low_pass": 0}):
            apply_methods(
                model, methods_of({"fam_diffusion": {"sites": "self", **options}}), trains=False
            )
            found.append(latents(model, [OWN], how=LARGE))
            model.sampling_hooks.clear()
        assert found[0].shape == plain.shape
        for one, other in ((0, 1), (0, 2), (1, 2)):
            assert apart(found[one], found[other]) > 1e-4
        assert not any(hosted.ops for hosted in model.host.processors.values())


def test_the_native_picture_may_have_odd_latents(tiny: Any) -> None:
    """9x9, which the network halves to 5x5, beside 18x18 and 9x9."""
    apply_methods(tiny, methods_of({"fam_diffusion": {"sites": "self & /2"}}), trains=False)
    found = latents(tiny, [OWN], how=Sampling(1, 3.0, size=(72, 72)))
    assert found.shape[-2:] == (18, 18) and bool(found.isfinite().all())


def test_a_size_that_is_no_multiple_is_refused(tiny: Any) -> None:
    options = {"sites": "self", "factor": 3}
    apply_methods(tiny, methods_of({"fam_diffusion": options}), trains=False)
    with pytest.raises(ValueError, match=r"methods\.fam_diffusion: factor=3 does not divide the"):
        latents(tiny, [OWN], how=LARGE)
