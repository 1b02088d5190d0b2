"""The facts of a sampled picture."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.diffusion.made_of import made_of
from trainer.diffusion.sampling_settings import Sampling


@pytest.mark.parametrize(
    ("guidance", "negative", "told"),
    [(3.0, "blurred", "blurred"), (3.0, "", None), (1.0, "", None)],
)
def test_an_empty_negative_prompt_is_not_told(
    guidance: float, negative: str, told: str | None, tiny: Any
) -> None:
    facts = made_of(tiny, Sampling(4, guidance, negative), prompt="a fox", seed=3)
    assert facts.get("negative") == told and ("negative" in facts) == (told is not None)
    assert (facts["prompt"], facts["seed"], facts["steps"]) == ("a fox", 3, 4)
    assert facts["guidance"] == guidance and facts["size"] == "32x32"
    assert not {"frames", "fps", "temporal_guidance", "true_guidance"} & facts.keys()
