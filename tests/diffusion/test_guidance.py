"""Guidance over named outputs, against numbers."""

from __future__ import annotations

import pytest
import torch

from trainer.diffusion.guidance import classifier_free, temporal


def test_classifier_free_guidance_goes_on_past_cond() -> None:
    outputs = {"target/uncond": torch.tensor([1.0, 0.0]), "target/cond": torch.tensor([3.0, -1.0])}
    assert classifier_free(outputs, 5.0).tolist() == [11.0, -5.0]
    assert classifier_free(outputs, 0.0).tolist() == [1.0, 0.0]
    assert classifier_free({"target/cond": outputs["target/cond"]}, 5.0).tolist() == [3.0, -1.0]


def test_conditions_beside_the_text_have_a_scale_of_their_own() -> None:
    """uncond + given_scale (given - uncond) + scale (cond - given), with numbers 2, 5 and 11."""
    values = {"uncond": 2.0, "given": 5.0, "cond": 11.0}
    outputs = {f"target/{name}": torch.tensor(value) for name, value in values.items()}
    assert float(classifier_free(outputs, 4.0, given_scale=7.0)) == 2 + 7 * 3 + 4 * 6
    assert float(classifier_free(outputs, 4.0, given_scale=4.0)) == 2 + 4 * 9


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0])
def test_temporal_guidance_is_the_papers_sum(scale: float) -> None:
    """image + scale (uncond - image) + guidance (cond - uncond), with numbers 2, 7 and 11."""
    image, uncond, cond = (torch.tensor(value) for value in (2.0, 7.0, 11.0))
    guided = classifier_free({"target/uncond": uncond, "target/cond": cond}, 4.0)
    assert float(temporal(guided, uncond, image, scale)) == 2 + scale * 5 + 4 * 4
