"""The kinds of tensors in adapter files, by the ends of their names as the tools spell them."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

MERGE = "merge it into a model with the tool that made it, and train on that with backbone=<folder>"
NAMED = r"(?:\.(?!weight$|bias$)\w+)?"  # the adapter's name in peft, as in lora_A.default.weight
FORMS = (
    "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "lokr_w1",
    "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
)  # fmt: skip
HALF = (
    rf"lora_{{0}}{NAMED}\.weight|lora_{{1}}{NAMED}(?:\.weight)?"
    r"|lora(?:_linear_layer)?\.{0}\.weight"
)
KINDS = {
    HALF.format("down", "A"): "down",
    HALF.format("up", "B"): "up",
    r"lora_mid\.weight": "mid",
    rf"lora_magnitude_vector{NAMED}(?:\.weight)?": "magnitude",
    r"dora_scale": "dora",
    r"alpha": "alpha",
    r"diff": "diff",
    r"diff_b": "diff_b",
} | {rf"{name}{NAMED}": name for name in FORMS}
KIND = re.compile("(.+?)\\.(?:" + "|".join(f"({pattern})" for pattern in KINDS) + ")")
# formerly, a denoiser's keys were like `attn1.processor.to_q_lora.down.weight`, and a text
# encoder's like `self_attn.to_q_lora.down.weight`
OLD = re.compile(r"(.+?\.)(?:(self_attn\.)|processor\.)?to_(q|k|v|out)_lora\.(down|up)\.weight")
BIAS = f"a trained bias beside the matrices, which no LoRA of this toolkit has; {MERGE}"
REFUSED = {
    r"lora_(?:A|B|up|down)(?:\.\w+)?\.bias|base_layer\.bias|bias": BIAS,
    r"magnitude": f"DoRA in ai-toolkit's own spelling, which no other tool reads; {MERGE}",
    r"[ab][12]\.weight|bm[12]\.weight": f"GLoRA, which changes W0 by products with W0; {MERGE}",
    r"w_norm|b_norm": "a trained norm of LyCORIS, which no low-rank method trains; train without "
    f"train_norm, or {MERGE}",
    r"on_input": f"(IA)^3, which scales inputs or outputs; {MERGE}",
    r"oft_(?:blocks|diag|[RS])(?:\.\w+)*": f"OFT or BOFT, which turn W0; {MERGE}",
    r"vera_\w+.*": f"VeRA, whose matrices are no part of the file; {MERGE}",
    r"lora_E.*|ranknum.*": f"AdaLoRA, which has three factors; {MERGE}",
    r"lora_embedding_[AB].*": f"LoRA of a table of embeddings, which no method trains; {MERGE}",
    r"modules_to_save.*|set_weight|base_layer\.weight": "a whole layer saved beside the adapter; "
    f"{MERGE}",
    r"scalar": "a trained factor of LyCORIS, which its own saving multiplies into the rest; "
    f"{MERGE}",
}
NEEDS = {
    "down": ("up",), "up": ("down",), "mid": ("down",), "magnitude": ("down",),
    "hada_w1_a": ("hada_w1_b", "hada_w2_a", "hada_w2_b"), "hada_t1": ("hada_t2", "hada_w1_a"),
    "hada_w1_b": ("hada_w1_a",), "hada_w2_a": ("hada_w1_a",), "hada_w2_b": ("hada_w1_a",),
    "hada_t2": ("hada_t1",), "lokr_w1_a": ("lokr_w1_b",), "lokr_w1_b": ("lokr_w1_a",),
    "lokr_w2_a": ("lokr_w2_b",), "lokr_w2_b": ("lokr_w2_a",), "lokr_t2": ("lokr_w2_a",),
}  # fmt: skip


def kinds_by_layer(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors of each layer by kind, under the layer's name in the file.

    Raises:
        ValueError: a tensor is of no kind that is read; the message says what it is.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, kind = _split(key)
        if kind in (layer := found.setdefault(name, {})):
            raise ValueError(f"the file holds {kind} of {name} twice, one of them as {key}")
        layer[kind] = value
    return found


def _split(key: str) -> tuple[str, str]:
    """The layer's name in a key, and the kind of its tensor."""
    if old := OLD.fullmatch(key):
        owner, text, role, half = old.groups()
        layer = f"{role}_proj" if text else "to_out.0" if role == "out" else f"to_{role}"
        return f"{owner}{text or ''}{layer}", half
    if match := KIND.fullmatch(key):
        kind = next(
            kind for kind, own in zip(KINDS.values(), match.groups()[1:], strict=True) if own
        )
        return _of_fused_parameter(match[1], kind)
    for pattern, what in REFUSED.items():
        if re.fullmatch(rf".+?\.(?:{pattern})", key):
            raise ValueError(f"the file holds {key}: {what}")
    raise ValueError(f"the file holds {key}, which belongs to no kind of adapter that is read")


def _of_fused_parameter(name: str, kind: str) -> tuple[str, str]:
    """The layer of a parameter that a tool names in the place of its layer: the fused matrix and
    bias of torch's own attention."""
    layer, _, own = name.rpartition("_")
    if not layer.endswith("in_proj") or own not in ("weight", "bias"):
        return name, kind
    if own == "weight":
        return layer, kind
    if kind != "diff":
        raise ValueError(f"the file holds {kind} of {name}: {BIAS}")
    return layer, "diff_b"


def check_complete(layers: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Checks that every layer has all tensors of its kind.

    Raises:
        ValueError: one has not, or has those of several kinds.
    """
    lacking = {name: pair for name, kinds in layers.items() if (pair := _lacking(kinds))}
    if lacking:
        name, (has, lacks) = next(iter(lacking.items()))
        raise ValueError(
            f"the file holds the {_called(has)} of {name} without its {_called(lacks)}; "
            f"{len(lacking)} of {len(layers)} layers are incomplete. The file was truncated or "
            "filtered; get the complete one"
        )
    for name, kinds in layers.items():
        own = {_family(kind) for kind in kinds} - {""}
        if len(own) > 1:
            raise ValueError(f"the file holds {' and '.join(sorted(own))} of {name}")


def _called(kind: str) -> str:
    return f"{kind} matrix" if kind in ("down", "up") else kind


def _lacking(kinds: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """A kind that a layer has, and one that it lacks for it."""
    for kind in kinds:
        for other in NEEDS.get(kind, ()):
            if other not in kinds:
                return kind, other
    for has, lacks in (("lokr_w1", "lokr_w2"), ("lokr_w2", "lokr_w1")):
        for own in (has, f"{has}_a"):
            if own in kinds and not {lacks, f"{lacks}_a"} & set(kinds):
                return own, lacks
    matrices = {kind for kind in kinds if _family(kind)}
    return None if matrices else (next(iter(kinds)), "matrices")


def _family(kind: str) -> str:
    """What a kind of tensor makes: low-rank matrices, a full delta, LoHa, LoKr; empty for what
    stands beside one of these."""
    if kind in ("diff", "diff_b"):
        return "a full delta"
    if kind in ("down", "up", "mid"):
        return "low-rank matrices"
    return {"hada": "LoHa", "lokr": "LoKr"}.get(kind[:4], "")
