"""Plug-and-Play's attention against loops, its features, and its refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from edit_checks import (
    GROUPS,
    call_at,
    drawn,
    edited,
    joint_call,
    loop_attention,
    outputs,
    qkv,
    site_of,
    some_trajectory,
)

from trainer.ops.pnp import Injection, PlugAndPlay

OWN = "a fox on a red background"


def test_queries_and_keys_are_the_sources_and_values_its_own(tiny: Any) -> None:
    op, made = PlugAndPlay(Injection("pnp", "self", steps=(0.0, 0.5))), qkv(4, 16)
    for step in range(4):
        found = outputs(op, made, call_at(site_of(tiny), step))
        for n, group in enumerate(GROUPS):
            source = n - 1 if group.startswith("target") and step < 2 else n
            wanted = loop_attention(made[0][source], made[1][source], made[2][n])
            torch.testing.assert_close(found[group][0], wanted)


def test_at_a_joint_site_text_keeps_its_own(tiny: Any) -> None:
    op, made = PlugAndPlay(Injection("pnp", "joint", steps=(0.0, 1.0))), qkv(4, 16 + 3)
    found = outputs(op, made, joint_call(site_of(tiny), text=3, image=16))["target/cond"][0]
    q, k = (torch.cat([x[3][:, :3], x[2][:, 3:]], 1) for x in made[:2])
    torch.testing.assert_close(found, loop_attention(q, k, made[2][3]))


def test_features_are_the_sources_in_their_steps(tiny: Any) -> None:
    op, made = PlugAndPlay(Injection("pnp", "self", feature_steps=(0.25, 0.75))), drawn(4, 3, 2, 2)
    for step in range(4):
        found = op.features(made, None, call_at(site_of(tiny), step).ctx)  # type: ignore[arg-type]
        inside = step in (1, 2)
        assert torch.equal(found[1], made[0] if inside else made[1])
        assert torch.equal(found[3], made[2] if inside else made[3])
        assert torch.equal(found[[0, 2]], made[[0, 2]])


def test_a_source_that_was_inverted_is_its_trajectory(tiny: Any) -> None:
    """At every step: what is replayed last is the picture itself."""
    known = some_trajectory(tiny)
    _, source = edited(tiny, {"pnp": {"features": "up"}}, "a cat", source=OWN, trajectory=known)
    assert torch.equal(source, known[4])


def test_every_option_changes_the_edit(tiny: Any) -> None:
    def found(**options: Any) -> torch.Tensor:
        return edited(tiny, {"pnp": {"features": "up", **options}}, "a cat", source=OWN)[0]

    base = found()
    for options in (
        {"steps": None},
        {"feature_steps": None, "features": "name:up_blocks.1.resnets.1"},
        {"features": "mid"},
        {"sites": "self & depth>=0.9"},
        {"steps": (0.0, 1.0)},
    ):
        assert float((found(**options) - base).abs().max()) > 1e-5, options


def test_a_transformer_has_no_residual_features(dit: Any) -> None:
    with pytest.raises(ValueError, match=r"methods\.pnp: features: .*feature_steps=null leaves th"):
        edited(dit, {"pnp": {}}, "a cat", source=OWN)
    with pytest.raises(ValueError, match=r"pnp: feature_steps=\[0\.3,0\.4\] has none of 4"):
        edited(dit, {"pnp": {"feature_steps": (0.3, 0.4)}}, "a cat", source=OWN)
