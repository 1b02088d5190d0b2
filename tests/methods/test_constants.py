"""Defaults: what papers and their released code fix, each with its source, and what this project
has chosen itself and stored adapters rely on."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from trainer.attention.projections import ALL_ROLES
from trainer.config.load import methods_of
from trainer.methods.apply import find_method
from trainer.ops.agent_attention import MergedAgents
from trainer.runs import merge_texts

# method, what its paper names, where
PAPERS: list[tuple[str, dict[str, Any], str]] = [
    ("agent_attention", {"side": 7}, "49 pooled agents: Agent Attention, arXiv 2312.08874"),
    (
        "agent_attention",
        {"cell": 4, "ratio": 0.95, "share": 0.4, "query_power": 0.3, "shortcut": 0.075},
        "AgentSD: agent_ratio, the first 20 of 50 steps, k_scale2 and k_shortcut of its code",
    ),
    ("animatediff", {"max_frames": 32, "mid": True}, "version 2, arXiv 2307.04725's code"),
    ("c_lora", {"rank": 16, "sites": "cross", "projections": ("k", "v")}, "arXiv 2304.06027"),
    (
        "soft",
        {"ratio": 8, "iterations": 20, "shortcut": 3},
        "arXiv 2110.11945: 8, 4, 2, 1 over its four grids, 20 iterations, and its code",
    ),
    (
        "coda_prompt",
        {"pool": 100, "length": 8, "ortho": 0.1},
        "arXiv 2211.13218: 100 components of length 8, lambda 0.1",
    ),
    (
        "frame_interpolation",
        {"between": 4},
        "Make-A-Video, arXiv 2209.14792: 16 frames become 76",
    ),
    ("gated_linear", {"rank": 16, "tau": 16.0}, "GLA, arXiv 2312.06635, section 4.4"),
    (
        "inflora",
        {"rank": 10, "energy": (0.95, 1.0), "sites": "cross", "projections": ("k", "v")},
        "arXiv 2404.00228: r = 10, eps from 0.95, on keys and values",
    ),
    ("lora", {"alpha": None, "dropout": 0.0, "rslora": False}, "arXiv 2106.09685, equation 3"),
    (
        "longlora",
        {"rank": 8, "alpha": 16.0, "group": 0.25, "whole": ("norms", "embeddings")},
        "arXiv 2309.12307: groups of a quarter of the tokens; rank and alpha of its code",
    ),
    (
        "longlora",
        {"sites": "self", "projections": ALL_ROLES},
        "arXiv 2309.12307, section 3.3",
    ),
    ("magicvideo", {"renormalise": False}, "arXiv 2211.11018: the mask follows the softmax"),
    (
        "pix2video",
        {"weight": 100.0, "share": 0.5, "sites": "self & up | self & block"},
        "arXiv 2303.12688's code: weight 100 in the first 25 of 50 steps, in the decoder",
    ),
    (
        "selective",
        {"sites": None, "projections": ("k", "v")},  # null is cross-attention where there is any
        "Custom Diffusion, arXiv 2212.04488, section 3.2",
    ),
    (
        "text2video_zero",
        {"motion": (12 / 512, 12 / 512), "alone": 0.04, "until": 0.1, "sites": "self"},
        "arXiv 2303.13439's code: 12 of 512 pixels, steps 2 and 5 of 50",
    ),
    ("tune_a_video", {"sites": "self"}, "arXiv 2212.11565, section 3.2"),
    (
        "p2p",
        {
            "cross_steps": (0.0, 0.8), "self_steps": (0.0, 0.4), "self_tokens": 256,
            "threshold": 0.3, "blend_from": 0.2, "blend_tokens": 256, "null_text": 10,
        },
        "arXiv 2208.01626's and 2211.09794's code",
    ),
    ("videop2p", {"sites": "self"}, "arXiv 2303.04761, section 3.1"),
    (
        "masactrl",
        {"share": "mutual", "steps": (0.08, 1.0), "threshold": 0.1, "mask_tokens": 256},
        "arXiv 2304.08465's code: step 4 of 50, masks of 16x16 maps above 0.1",
    ),
    (
        "pnp",
        {"steps": (0.0, 0.5), "feature_steps": (0.0, 0.8)},
        "arXiv 2211.12572's code: tau_A 0.5, tau_f 0.8",
    ),
    (
        "object_shape_variations",
        {
            "mix_steps": (0.14, 0.34), "keep_steps": (0.0, 0.8), "keep_tokens": 1024,
            "keep_threshold": 0.05, "background_at": 0.7, "segments": 5, "segment_threshold": 0.3,
        },
        "arXiv 2303.11306's code: steps 7 to 17, to 40 and at 35 of 50",
    ),
    ("shape_guided", {"schedule": "exp"}, "arXiv 2212.00210's code: .95 ** (50 t)"),
    (
        "tf_icon",
        {"steps": (0.0, 0.4), "background_until": 0.8, "exceptional": True},
        "arXiv 2307.12493: tau_A 0.4, tau_B 0.8",
    ),
    ("aid", {"steps": (0.0, 0.5), "fused": True}, "arXiv 2403.17924's code: warm-up 0.5"),
    ("gaussctrl", {"own": 0.6, "references": 4}, "arXiv 2403.08733's code"),
    ("fam_diffusion", {"weight": 0.5, "low_pass": 0.5}, "code of others, see the method's op"),
    ("ditctrl", {"steps": (0.04, 0.5), "threshold": 0.3}, "arXiv 2412.18597's code: steps 2 to 25"),
    (
        "videop2p",
        {
            "cross_steps": (0.0, 0.2), "self_steps": (0.0, 0.5), "self_tokens": 1024,
            "threshold": 0.3, "blend_from": 0.2, "null_text": 10,
        },
        "arXiv 2303.04761's code",
    ),
    (
        "vdm",
        {"images": "self", "relative": "vectors"},
        "arXiv 2204.03458, section 3: an image attends to itself; Shaw et al.'s positions",
    ),
]  # fmt: skip
# an adapter names the options of its recipe alone: with other defaults it would no longer load
SHAPES: dict[str, dict[str, Any]] = {
    "animatediff": {"heads": 8},
    "coda_prompt": {"num_tasks": 5, "task": 0},
    "gated_linear": {"scans": 1, "convolution": 0},
    "gen1": {"heads": 8, "kernel": 3, "max_frames": 32, "structure": 7},
    "imagen_video": {"heads": 8, "kernel": 3, "attention_from": 2, "reach": 32},
    "linear_attention": {"features": "relu", "num_features": 64, "seed": 0, "shortcut": 0},
    "lora": {"rank": 4, "sites": "all", "projections": ALL_ROLES},
    "magicvideo": {"heads": 8, "max_frames": 32, "fps": 8.0},
    "make_a_video": {"heads": 8, "kernel": 3, "max_frames": 32, "fps": 8.0},
    "new_token": {"tokens": ("<v1>",), "init": None, "task": None},
    "nf4": {"min_size": 4096, "compute": "fp32"},
    "vdm": {"heads": 8, "reach": 32},
}


@pytest.mark.parametrize("name", SHAPES)
def test_what_stored_adapters_rely_on_stays(name: str) -> None:
    method = methods_of({name: {}})[name]
    assert {field: getattr(method, field) for field in SHAPES[name]} == SHAPES[name]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [pytest.param(name, wanted, id=f"{name}-{source}") for name, wanted, source in PAPERS],
)
def test_a_default_is_the_papers(name: str, wanted: dict[str, Any]) -> None:
    method = methods_of({name: {}})[name]
    assert {field: getattr(method, field) for field in wanted} == wanted


def test_the_op_of_agent_sd_has_the_same_defaults_as_its_method() -> None:
    own = inspect.signature(MergedAgents).parameters
    fields = find_method("agent_attention").model_fields
    assert {name: option.default for name, option in own.items()} == {
        name: fields[name].default for name in own
    }


def test_agent_sd_merges_as_its_code_does() -> None:
    """LeapLabTHU/Agent-Attention: ratio .4 and cells of 4 in the first 40 % of the steps, of 2 in
    the rest; agents of ratio .95; s^.3 and .075 v."""
    op = MergedAgents()
    assert (op.merge, op.cell, op.later_cell, op.share) == (0.4, 4, 2, 0.4)
    assert (op.ratio, op.query_power, op.shortcut) == (0.95, 0.3, 0.075)


def test_a_merge_keeps_two_prompts_a_concept_and_200_captions() -> None:
    """Custom Diffusion, arXiv 2212.04488, section 3.2, and its `composenW.py`: the word with its
    class word, alone and in a photo; 200 captions regularise."""
    assert merge_texts.concept_prompts("<new1> cat") == ["<new1> cat", "a photo of <new1> cat"]
    assert merge_texts.NUM_CAPTIONS == 200
