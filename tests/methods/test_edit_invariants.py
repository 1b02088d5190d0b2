"""What every method that edits a source owes: the source's own prompt gives the source, whose rows
never change; an edit differs from both the source and its prompt alone; and nothing of it stays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from edit_checks import apart, edited, latents
from flow_folders import make_flow_folder, sd3_pipeline

SOURCE, PROMPT = "a fox on a red background", "a cat on a blue background"
EVERY = {"sites": "all"}
# options of each method under which the small random models of tests show its effect
METHODS: dict[str, dict[str, Any]] = {
    "masactrl": {"sites": "self", "steps": (0.0, 1.0)},
    "masactrl union": {"sites": "self", "share": "union"},
    "masactrl auto": {"sites": "self", "share": "mask-auto"},
    "pnp": {"sites": "self", "features": "up & /1"},
    "object_shape_variations": {"keep_steps": (0.0, 0.5), "mix_steps": (0.0, 0.6)},
    "object_shape_variations words": {
        "keep_words": ["background"],
        "keep_threshold": 0.02,
        "mix_steps": (0.0, 0.6),
        "background_at": None,
    },
    "ditctrl": {"sites": "self", "steps": (0.0, 1.0)},
    "fec": {"steps": (0.0, 0.5)},
    "infusion": {"sites": "self", "features": "up & /1", "threshold": 0.9},
}
# equal to the source only where both are told alike and nothing is taken of another place
NOT_THE_SOURCE = {"masactrl auto"}


@pytest.fixture(params=["unet", "dit"])
def model(request: pytest.FixtureRequest, tiny: Any, dit: Any) -> Any:
    return tiny if request.param == "unet" else dit


def methods_for(name: str, model: Any) -> dict[str, dict[str, Any]]:
    own = dict(METHODS[name])
    if model.denoiser_name != "unet" and "features" in own:
        own |= {"feature_steps": None}
        del own["features"]
    return {name.split()[0]: own}


@pytest.mark.parametrize("name", METHODS)
def test_an_edit_keeps_its_source(name: str, model: Any) -> None:
    plain, alone = latents(model, [SOURCE]), latents(model, [PROMPT])
    methods = methods_for(name, model)
    both, source = edited(model, methods, SOURCE, PROMPT, source=SOURCE)
    for rows in source:
        torch.testing.assert_close(rows[None], plain, rtol=0, atol=1e-3)
    if name not in NOT_THE_SOURCE:
        torch.testing.assert_close(both[:1], plain, rtol=0, atol=1e-3)
    assert apart(both[1:], plain) > 1e-3 and apart(both[1:], alone) > 1e-4
    assert not any(hosted.ops for hosted in model.host.processors.values())
    torch.testing.assert_close(latents(model, [PROMPT]), alone, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def joint_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_flow_folder(tmp_path_factory.mktemp("sd3") / "tiny", sd3_pipeline, t5=False)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("masactrl", {"steps": (0.0, 1.0)}),
        ("pnp", {"steps": (0.0, 1.0), "feature_steps": None}),
        ("fec", {}),
    ],
    ids=str,
)
def test_joint_attention_is_edited_by_its_spans(
    name: str, options: dict[str, Any], joint_folder: Path, open_folder: Callable[[Path], Any]
) -> None:
    model = open_folder(joint_folder)
    plain, alone = latents(model, [SOURCE]), latents(model, [PROMPT])
    methods = {name: {"sites": "joint", **options}}
    both, source = edited(model, methods, SOURCE, PROMPT, source=SOURCE)
    torch.testing.assert_close(source[:1], plain, rtol=0, atol=1e-3)
    torch.testing.assert_close(both[:1], plain, rtol=0, atol=1e-3)
    assert apart(both[1:], plain) > 1e-5 and apart(both[1:], alone) > 1e-6
    if name == "masactrl":
        with pytest.raises(ValueError, match=r"edits self attention, and .* is joint"):
            edited(model, {name: {"sites": "joint", "share": "union"}}, PROMPT, source=SOURCE)
