"""What can be said exactly about the weight level: 4-bit storage, peft beside us, counts of public
networks, exports read back."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _networks import SD15, SDXL, Network, pixart, sana, unet
from _steps import Step
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from trainer.backbones import four_bits
from trainer.config.load import load_recipe, methods_of
from trainer.export.export import export
from trainer.export.find_format import find_format, format_names
from trainer.export.job import Job
from trainer.export.probe import Probe, difference
from trainer.methods.apply import apply_methods
from trainer.methods.weight.nf4 import Nf4
from trainer.ops.adapters import nf4

SHOWN = re.compile(r"largest difference ([0-9.e+-]+|inf)")
WRONG = re.compile(r"the output differs by ([0-9.e+-]+|inf) from the model's")
DIT: dict[str, dict[str, Any]] = {
    "lora": {"lora": {"sites": "all", "rank": 2, "alpha": 3, "layers": ["*ff*"]}},
    "dora": {"dora": {"sites": "all", "rank": 2, "alpha": 3}},
    "custom_diffusion": {"selective": {"sites": "cross", "projections": ["k", "v"]}},
}


def storage(words: list[str]) -> dict[str, float]:
    """Trains QLoRA for three steps. Bits a value of the 4-bit layers by the memory they hold,
    without and with the tables of codes; whether gradients were finite and the base stayed (1 or
    0)."""
    step = Step(words)
    frozen = {
        name: value for name, value in _state(step.backbone).items() if name not in step.plan.stored
    }
    before = {name: value.clone() for name, value in frozen.items()}
    finite = True
    for _ in range(3):
        step()
        finite &= all(p.grad is not None and bool(p.grad.isfinite().all()) for p in step.trained)
    layers = [layer for layer in step.backbone.modules() if four_bits.is_packed(layer)]
    same = all(torch.equal(value, before[name]) for name, value in frozen.items())
    return {
        **{f"tiny_{key}": value for key, value in _bits(Counter(layers)).items()},
        **{f"sd15_{key}": value for key, value in _bits(_sd15_linears()).items()},
        "gradients_finite": float(finite),
        "base_unchanged": float(same),
    }


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, buffers, and what 4-bit parameters are scaled with, by name."""
    found = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, value in list(found.items()):
        found |= {f"{name}.{number}": part for number, part in enumerate(four_bits.scales(value))}
    return {name: value.detach() for name, value in found.items()}


def _sd15_linears() -> Counter[nn.Module]:
    """One 4-bit layer of each size that Nf4 packs in Stable Diffusion 1.5, and how many there
    are."""
    chosen = Nf4().chosen(unet(SD15).denoiser)
    sizes = Counter((layer.in_features, layer.out_features) for layer in chosen.values())
    return Counter(
        {
            four_bits.pack(nn.Linear(*size, bias=False), torch.float32): count
            for size, count in sizes.items()
        }
    )


def _bits(layers: Counter[Any]) -> dict[str, float]:
    values = sum(count * four_bits.numel(layer.weight) for layer, count in layers.items())
    bits = sum(
        count * four_bits.numel(layer.weight) * nf4.bits_per_value(layer)
        for layer, count in layers.items()
    )
    state: Any = next(iter(layers)).weight.quant_state
    tables = 8 * sum(code.untyped_storage().nbytes() for code in (state.code, state.state2.code))
    return {
        "linear_values": values,
        "bits": bits / values,
        "bits_with_tables": (bits + tables) / values,
    }


def peft_difference(words: list[str]) -> dict[str, float]:
    """The largest differences, in output and in gradients, between the recipe's LoRA and peft's own
    model with the same tensors."""
    from trainer.backbones import load_backbone

    chosen = load_recipe(words)
    own = load_backbone(chosen.backbone, chosen.backbone_name).eval().requires_grad_(False)
    other = copy.deepcopy(own)
    options = chosen.methods["lora"].model_dump()
    rank = options["rank"]
    plan = apply_methods(own, {"lora": chosen.methods["lora"]})
    config = LoraConfig(
        r=rank,
        lora_alpha=options["alpha"] or rank,
        target_modules=["to_q", "to_k", "to_v", "to_out.0"],
    )
    other.unet = get_peft_model(other.unet, config)
    theirs = {
        name.replace("base_model.model.", "").replace(".default.", ".lora."): value
        for name, value in other.named_parameters()
        if value.requires_grad
    }
    ours = {name: value for name, value in own.named_parameters() if name in plan.names}
    assert theirs.keys() == ours.keys()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in ours.items():
            value.copy_(0.1 * torch.randn(value.shape, generator=generator))
            theirs[name].copy_(value)
    outputs = []
    for model in (own, other):
        x_t = torch.randn(
            2, own.latent_channels, 16, 16, generator=torch.Generator().manual_seed(1)
        )
        condition = model.encode_prompts(["a fox on a red background", ""])
        output = model.predict(x_t, torch.tensor([100, 800]), condition)
        output.square().mean().backward()
        outputs.append(output.detach())
    gradients = [difference(ours[name].grad, theirs[name].grad) for name in ours]  # type: ignore[arg-type]
    return {"output": difference(*outputs), "gradients": max(gradients)}


def counts() -> dict[str, int]:
    """Parameters of Stable Diffusion 1.5's and SDXL's U-Nets, and of their cross-attention's K and
    V, as `methods.selective` picks them."""
    found = {}
    for name, sizes in (("sd15", SD15), ("sdxl", SDXL)):
        network = unet(sizes)
        found[f"{name}_unet"] = sum(value.numel() for value in network.parameters())
        plan = apply_methods(network, methods_of({"selective": {}}))
        found[f"{name}_cross_kv"] = plan.trained
    return found


def exported(adapter: Path, out: Path) -> dict[str, float | str]:
    """Every format of an adapter: the largest difference of any of its readers' models, or why the
    format cannot carry it."""
    folder = out / adapter.parent.name
    return {
        name: _largest(partial(_export, name, adapter, folder / name)) for name in format_names()
    }


def _export(format_name: str, adapter: Path, out: Path) -> list[float]:
    out.parent.mkdir(parents=True, exist_ok=True)
    said: list[str] = []
    export(adapter, out, format_name, say=said.append)
    return [float(number) for line in said for number in SHOWN.findall(line)]


def exported_transformers(out: Path) -> dict[str, dict[str, float | str]]:
    """The same of transformers with disturbed adapters, by network and method; a single network has
    no complete pipeline to merge into."""
    found = {}
    for network in (pixart, sana):
        for name, tree in DIT.items():
            title = f"{network.__name__} {name}"
            found[title] = {
                format_name: _largest(
                    partial(
                        _read_back, format_name, network, tree=tree,
                        folder=out / f"{title}-{format_name}",
                    )
                )
                for format_name in format_names()
                if format_name != "merged"
            }  # fmt: skip
    return found


@torch.no_grad()
def _read_back(
    format_name: str, network: Callable[[], Network], *, tree: dict[str, Any], folder: Path
) -> list[float]:
    adapted = network()
    plan = apply_methods(adapted, methods_of(tree))  # type: ignore[arg-type]
    own, generator = dict(adapted.named_parameters()), torch.Generator().manual_seed(1)
    for name in plan.names:  # as if trained
        own[name] += 0.01 * torch.randn(own[name].shape, generator=generator)
    job = Job(adapted, network, stored=plan.stored, title="title")
    found_format = find_format(format_name)
    folder.mkdir(parents=True)
    probe = Probe(adapted, ())
    wanted = probe(adapted)
    found_format.write(job, folder, torch.float32)
    models = [load(folder, job.make_base()) for load in found_format.readers.values()]
    return [difference(probe(model), wanted) for model in models if model is not None]


def _largest(write: Callable[[], list[float]]) -> float | str:
    """The largest difference; or the refusal, as text. A file that is read back wrongly is not
    refused beforehand: its difference counts."""
    try:
        return max(write())
    except ValueError as error:
        text = str(error)
        if wrong := WRONG.search(text):
            return float(wrong[1])
        return float("inf") if "does not read the file" in text else text.split("; ")[0]
