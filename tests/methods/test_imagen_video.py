"""Imagen Video: attention on coarse grids, convolutions on fine ones, which images pass by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.methods.apply import apply_methods
from trainer.methods.feature.imagen_video import ImagenVideo
from trainer.ops.temporal.layers import TemporalAttention, TemporalConv


@pytest.mark.parametrize(("start", "attention"), [(1, 7), (2, 4), (3, 0)])
def test_coarse_grids_attend_and_fine_ones_convolve(start: int, attention: int, tiny: Any) -> None:
    plan = apply_methods(tiny, {"imagen_video": ImagenVideo(heads=2, attention_from=start)})
    kinds = [
        type(m) for m in tiny.unet.modules() if isinstance(m, TemporalAttention | TemporalConv)
    ]
    assert kinds.count(TemporalAttention) == attention
    assert kinds.count(TemporalConv) == 7 - attention
    inside = [site for site in tiny.sites if site.name in plan.edits["imagen_video"].sites]
    assert len(inside) == attention
    assert all(site.divisor is not None and site.divisor >= start for site in inside)
    assert sum(name.endswith("relative_vectors.keys") for name in plan.names) == attention


def test_a_convolution_sees_as_many_frames_as_asked(tiny: Any) -> None:
    apply_methods(tiny, {"imagen_video": ImagenVideo(heads=2, attention_from=3, kernel=5)})
    convs = [m.conv for m in tiny.unet.modules() if isinstance(m, TemporalConv)]
    assert {conv.kernel_size for conv in convs} == {(5,)}


def test_a_transformer_has_one_grid(dit: Any) -> None:
    plan = apply_methods(dit, {"imagen_video": ImagenVideo(heads=2)})
    assert len(plan.edits["imagen_video"].sites) == 2
    assert not any(isinstance(m, TemporalConv) for m in dit.transformer.modules())


def test_an_image_passes_the_convolutions_by(
    tiny: Any, predict: Callable[[Any], Tensor], randomise: Callable[..., None]
) -> None:
    base = predict(tiny).detach()
    plan = apply_methods(tiny, {"imagen_video": ImagenVideo(heads=2, attention_from=3)})
    randomise(tiny, plan, 0.3)
    assert torch.equal(predict(tiny), base)
    for parameter in tiny.unet.parameters():
        assert torch.isfinite(parameter).all()


def test_an_image_attends_to_itself(
    tiny: Any, predict: Callable[[Any], Tensor], randomise: Callable[..., None]
) -> None:
    base = predict(tiny).detach()
    plan = apply_methods(tiny, {"imagen_video": ImagenVideo(heads=2, attention_from=1)})
    randomise(tiny, plan, 0.3)
    assert not torch.allclose(predict(tiny), base, atol=1e-3)
