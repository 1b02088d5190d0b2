"""What settings mean for a backbone whose network has the scale of guidance as an input."""

from __future__ import annotations

import pytest
import torch

from trainer.attention.condition import Condition
from trainer.diffusion.guidance import COND, UNCOND
from trainer.diffusion.sampling_settings import Sampling

TEXT = Condition(tokens=torch.zeros(2, 3, 4))


def test_guidance_is_classifier_free_where_it_is_no_input() -> None:
    found = Sampling(guidance=4.0).on(embeds=False)
    assert (found.cfg_scale, found.groups) == (4.0, (UNCOND, COND))
    assert found.told(TEXT) is TEXT


def test_guidance_is_an_input_where_the_network_has_one() -> None:
    found = Sampling(guidance=4.0).on(embeds=True)
    assert (found.cfg_scale, found.groups) == (1.0, (COND,))
    told = found.told(TEXT).guidance
    assert told is not None and told.tolist() == [4.0, 4.0]
    both = Sampling(guidance=4.0, true_guidance=2.5, negative="a cat").on(embeds=True)
    assert (both.cfg_scale, both.groups) == (2.5, (UNCOND, COND))


def test_what_nothing_would_read_is_refused() -> None:
    with pytest.raises(ValueError, match="true_guidance=2 is for backbones that have guidance as"):
        Sampling(true_guidance=2.0).on(embeds=False)
    with pytest.raises(ValueError, match=r"negative='a cat' would not be read.*true_guidance"):
        Sampling(negative="a cat").on(embeds=True)
    with pytest.raises(ValueError, match=r"negative='a cat' would not be read: guidance=1 does"):
        Sampling(guidance=1.0, negative="a cat").on(embeds=False)
