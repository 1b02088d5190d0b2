"""Files that LyCORIS writes itself, and the same model merged by it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from foreign.case import Case, Made, disturb, live, made
from torch import nn

REAL = "LyCORIS"


def lycoris(
    algo: str, *, text: bool = False, preset: str = "full", **options: Any
) -> Callable[[Any, Path], Made]:
    """A network of LyCORIS on the U-Net, as sd-scripts makes it with `--network_module
    lycoris.kohya`."""

    def make(base: Any, folder: Path) -> Made:
        from lycoris import kohya

        logging.getLogger("LyCORIS").setLevel(logging.ERROR)
        torch.manual_seed(0)
        network = kohya.create_network(
            1.0, 4, 2.0, None, base.text_encoder, base.unet, algo=algo, preset=preset, **options
        )
        network.apply_to(base.text_encoder, base.unet, text, True)
        return trained(network, base, folder)

    return make


def wrapper(algo: str, **options: Any) -> Callable[[Any, Path], Made]:
    """A network by LyCORIS' own wrapper, whose keys begin with `lycoris_`."""

    def make(base: Any, folder: Path) -> Made:
        from lycoris import create_lycoris

        logging.getLogger("LyCORIS").setLevel(logging.ERROR)
        torch.manual_seed(0)
        network = create_lycoris(base.unet, 1.0, 4, 2.0, algo=algo, preset="attn-only", **options)
        network.apply_to()
        return trained(network, base, folder)

    return make


def trained(network: Any, base: Any, folder: Path) -> Made:
    """Saves a network after a little training. The weights to compare with are those that the
    layers have in the forward while it is applied: `merge_to` multiplies LoHa and LoKr by their
    strength twice."""
    disturb(network, mark="")
    path = folder / "lycoris.safetensors"
    network.save_weights(str(path), torch.float32, {})
    network.eval()
    acting = {id(lora.org_module[0]) for lora in network.loras}
    layers = [
        layer
        for part in (base.unet, base.text_encoder)
        for layer in part.modules()
        if id(layer) in acting and isinstance(layer, nn.Linear | nn.Conv2d)
    ]
    seen = [live(layer) for layer in layers]
    network.restore()
    for layer, (weight, bias) in zip(layers, seen, strict=True):
        layer.weight.data = weight
        if layer.bias is not None:
            layer.bias.data = bias
    return made(path, base)


INPUTS = r"dora_scale of .* DoRA over inputs"
LINEAR, CONVOLUTION, ALL = "unet-transformer-only", "unet-convblock-only", "attn-mlp"
CASES = [
    Case("LyCORIS", "LoCon of transformers", lycoris("locon", preset=LINEAR), REAL),
    Case(
        "LyCORIS",
        "LoCon of U-Net and text encoder, attn-mlp",
        lycoris("locon", text=True, preset=ALL),
        REAL,
    ),
    Case(
        "LyCORIS",
        "LoCon of convolutions, other rank",
        lycoris("locon", preset=CONVOLUTION, conv_dim=2, conv_alpha=1),
        REAL,
    ),
    Case(
        "LyCORIS",
        "LoCon, Tucker convolutions (lora_mid)",
        lycoris("locon", preset=CONVOLUTION, use_tucker=True),
        REAL,
    ),
    Case("LyCORIS", "LoCon, rs_lora", lycoris("locon", preset=ALL, rs_lora=True), REAL),
    Case("LyCORIS", "LoCon, use_scalar", lycoris("locon", preset=ALL, use_scalar=True), REAL),
    Case("LyCORIS", "LoCon by its wrapper (lycoris_)", wrapper("lora"), REAL),
    Case("LyCORIS", "LoHa of U-Net and text encoder", lycoris("loha", text=True, preset=ALL), REAL),
    Case(
        "LyCORIS",
        "LoHa of convolutions",
        lycoris("loha", preset=CONVOLUTION, conv_dim=2, conv_alpha=1),
        REAL,
    ),
    Case(
        "LyCORIS",
        "LoHa, Tucker convolutions",
        lycoris("loha", preset=CONVOLUTION, use_tucker=True),
        REAL,
    ),
    Case("LyCORIS", "LoHa by its wrapper", wrapper("loha"), REAL),
    Case("LyCORIS", "LoKr of U-Net and text encoder", lycoris("lokr", text=True, preset=ALL), REAL),
    Case("LyCORIS", "LoKr, factor 4", lycoris("lokr", preset=LINEAR, factor=4), REAL),
    Case(
        "LyCORIS",
        "LoKr of convolutions, factor 2, both factors decomposed, Tucker",
        lycoris("lokr", preset=CONVOLUTION, factor=2, decompose_both=True, use_tucker=True),
        REAL,
    ),
    Case("LyCORIS", "LoKr of convolutions", lycoris("lokr", preset=CONVOLUTION), REAL),
    Case("LyCORIS", "LoKr, full matrices", lycoris("lokr", preset=ALL, full_matrix=True), REAL),
    Case(
        "LyCORIS",
        "LoKr, unbalanced factors",
        lycoris("lokr", preset=ALL, unbalanced_factorization=True),
        REAL,
    ),
    Case("LyCORIS", "full matrices (.diff)", lycoris("full", preset=ALL), REAL),
    Case(
        "LyCORIS",
        "DoRA, norms of outputs (its default)",
        lycoris("locon", text=True, preset=ALL, dora_wd=True),
        REAL,
    ),
    Case(
        "LyCORIS",
        "DoRA of convolutions, norms of outputs",
        lycoris("locon", preset=CONVOLUTION, dora_wd=True),
        REAL,
    ),
    Case(
        "LyCORIS",
        "DoRA, norms of inputs",
        lycoris("locon", preset=ALL, dora_wd=True, wd_on_output=False),
        REAL,
        INPUTS,
    ),
    Case(
        "LyCORIS",
        "LoHa with DoRA",
        lycoris("loha", preset=ALL, dora_wd=True),
        REAL,
        "DoRA over loha",
    ),
    Case(
        "LyCORIS",
        "LoCon and trained norms",
        lycoris("locon", preset=ALL, train_norm=True),
        REAL,
        "a trained norm of LyCORIS",
    ),
    Case("LyCORIS", "GLoRA", lycoris("glora", preset=ALL), REAL, "GLoRA"),
    Case("LyCORIS", "(IA)^3", lycoris("ia3", preset=ALL), REAL, r"\(IA\)\^3"),
    Case("LyCORIS", "OFT", lycoris("diag-oft", preset=ALL), REAL, "OFT or BOFT"),
]
