"""Options under which every method trains something on the tiny backbones."""

from __future__ import annotations

from typing import Any

import pytest

# one row a method: options under which it trains something on the tiny backbone
EXAMPLES: dict[str, dict[str, Any]] = {
    "agent_attention": {"side": 2},
    "aid": {"steps": (0.0, 1.0)},
    "animatediff": {"heads": 2},
    "at_edm": {"ratio": 0.25},
    "c_lora": {"rank": 2, "task": 1},
    "cascade": {"time": 2},
    "coda_prompt": {"pool": 5, "length": 4, "task": 1, "num_tasks": 2},
    "controls": {"sites": "up | block & self", "projections": ["q", "v"], "rank": 2},
    "ditfastattn": {"pattern": ("full", "half")},
    "diffumask": {"mask_words": ["background"]},
    "ditctrl": {"source": "a fox on a red background", "sites": "self", "steps": (0.0, 1.0)},
    "domain_adapter": {"sites": "cross & up | block & self", "rank": 2},
    "dora": {"sites": "cross", "projections": ["k", "v"], "rank": 2},
    "fam_diffusion": {"sites": "self", "factor": 2},
    "ediff_i": {"boxes": {"a": [0, 0, 0.5, 1]}},
    "fec": {"source": "a <v1> on a blue background"},
    "flash": {},
    "flashmask": {"size": 0.25},
    "frame_interpolation": {"between": 1},
    "full": {},
    "gated_linear": {"rank": 2, "scans": 2, "convolution": 3},
    "gaussctrl": {"references": 1, "own": 0.5},
    "gen1": {"heads": 2, "structure": 1},
    "imagen_video": {"heads": 2},
    "inflora": {"rank": 2, "task": 1, "num_tasks": 2},
    "infusion": {"source": "a fox on a red background", "feature_steps": None, "fuse": False},
    "linear_attention": {"sites": "self", "distill": 1.0},
    "ip_adapter": {"form": "resampler", "heads": 1, "depth": 1, "inner": 16, "count": 2},
    "lora": {
        "sites": "cross | self & mid | self & block",
        "rank": 2,
        "text_encoder": ["v"],
        "dropout": 0.1,
    },
    "longlora": {"rank": 2},
    "magicvideo": {"heads": 2},
    "make_a_video": {"heads": 2},
    "new_token": {"tokens": ["<v1>"], "init": "fox"},
    "masactrl": {"source": "a <v1> on a blue background", "share": "union"},
    "nf4": {"min_size": 1024},
    "object_shape_variations": {"source": "a fox on a red background", "mix_steps": (0.0, 1.0)},
    "p2p": {"source": "a <v1> on a blue background", "self_steps": (0.0, 0.5)},
    "peft_adapter": {"type": "loha", "options": {"r": 2}, "sites": "self & down | self & block"},
    "pix2video": {"weight": 1},
    "pva": {"count": 3, "depth": 1, "heads": 1, "inner": 16},
    "selective": {"sites": "cross", "projections": ["k", "v"], "detach_first_token": True},
    "pnp": {"source": "a <v1> on a blue background", "feature_steps": None, "steps": (0.0, 1.0)},
    "sla": {"sites": "self & /1 | self & block", "block": 4, "critical": 0.25},
    "shape_guided": {"source": "a fox on a red background", "inside": ["background"]},
    "soft": {"ratio": 2},
    "text2video_zero": {"motion": [0.25, 0], "alone": 0.5, "until": 0.5},
    "tf_icon": {"source": "a fox on a red background", "steps": (0.0, 1.0)},
    "tiled": {"rows": 16, "columns": 24},
    "tlora": {"rank": 4, "layers": ["*ff.net.2"]},
    "toma": {"tile": 4},
    "tome": {"ratio": 0.5},
    "tread": {"last": 0},
    "tune_a_video": {},
    "vdm": {"heads": 2},
    "videop2p": {},
    "word_embedding": {"tokens": ["fox", "red"]},
}
# methods that train nothing by themselves, or nothing that shows where no clip is given, with one
# that trains beside them
COMPANIONS: dict[str, str] = {
    "at_edm": "lora",
    "aid": "lora",
    "cascade": "lora",
    "diffumask": "lora",
    "ditctrl": "lora",
    "fam_diffusion": "lora",
    "fec": "lora",
    "ditfastattn": "lora",
    "ediff_i": "lora",
    "flash": "lora",
    "flashmask": "lora",
    "frame_interpolation": "lora",
    "gaussctrl": "lora",
    "infusion": "lora",
    "linear_attention": "lora",
    "masactrl": "lora",
    "nf4": "lora",
    "object_shape_variations": "lora",
    "p2p": "lora",
    "pix2video": "lora",
    "pnp": "lora",
    "shape_guided": "lora",
    "text2video_zero": "lora",
    "tf_icon": "lora",
    "tiled": "lora",
    "toma": "lora",
    "tome": "lora",
    "tread": "lora",
}

# methods that need transformer blocks which follow each other
IN_STACKS: set[str] = {"at_edm", "tread"}


def tree_of(*names: str) -> dict[str, Any]:
    for name in names:
        if name not in EXAMPLES:
            pytest.fail(
                f"{name} has no example options: add a row for it to EXAMPLES in {__file__}"
            )
    needed = [COMPANIONS[names[0]]] if all(name in COMPANIONS for name in names) else []
    return {name: EXAMPLES[name] for name in (*names, *needed)}
