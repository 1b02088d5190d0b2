"""The corpus has every denoiser of the pinned diffusers, and each of them runs."""

from __future__ import annotations

import pytest
import torch
from attention.denoiser_corpus import (
    CASES,
    NO_DENOISERS,
    expected,
    influences,
    make,
    outputs,
    values,
)


def test_the_corpus_has_every_denoiser_of_diffusers() -> None:
    assert sorted(CASES) == expected()


def test_what_is_no_denoiser_is_still_in_diffusers() -> None:
    import diffusers

    assert not [name for name in NO_DENOISERS if not hasattr(diffusers, name)]


@pytest.mark.sampled(12)
@pytest.mark.parametrize("name", sorted(CASES))
def test_the_stock_forward_runs_and_repeats_itself(name: str) -> None:
    found = outputs(make(CASES[name]), CASES[name])
    again = outputs(make(CASES[name]), CASES[name])
    assert found
    for one, other in zip(found, again, strict=True):
        assert torch.equal(one, other)
        assert one.isfinite().all()
        assert 0.1 < one.std() < 10


@pytest.mark.sampled(6)
@pytest.mark.parametrize("name", sorted(CASES))
def test_every_attention_layer_changes_the_output(name: str) -> None:
    case = CASES[name]
    found = influences(make(case), case)
    idle = {each for each in found if case.idle is not None and case.idle in each}
    assert len(found) - len(idle) > 1
    assert {each for each, changed in found.items() if changed == 0} == idle
    assert min(changed for each, changed in found.items() if each not in idle) > 1e-3


def test_a_layer_without_influence_is_seen() -> None:
    case = CASES["PixArtTransformer2DModel"]
    model = make(case)
    *_, name = values(model)
    torch.nn.init.zeros_(model.get_submodule(name).get_parameter("weight"))
    assert influences(model, case)[name] == 0
