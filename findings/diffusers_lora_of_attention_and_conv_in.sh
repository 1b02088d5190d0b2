#!/bin/bash
# A LoRA over attention and the input convolution loses its attention layers in diffusers.
#
# Versions: diffusers 0.42.1, peft 0.21.2, transformers 5.x, torch 2.13.0, as pinned below.
# What is done: LoRA layers on `to_q` (8 layers) and `conv_in` of a small U-Net are written as diffusers'
# training examples do, by `convert_state_dict_to_diffusers` and `save_lora_weights`, and read into the
# same U-Net by `lora_state_dict` and `load_lora_into_unet`.
# What a reader would expect: 9 layers are there.
# What happens: the converter renames the attention layers alone (`lora.down`, `lora.up`) and leaves the
# convolution `lora_A`, `lora_B`. The loader looks at the first key of the file, takes it for peft's
# spelling, and passes over the 8 attention layers. Nothing is raised. With `conv1` in place of `conv_in`
# the first key belongs to attention, and all 16 layers are read.
# Fails when this changes.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q -c "$here/constraints.txt" torch diffusers peft transformers safetensors
cd "$place"
OMP_NUM_THREADS=1 "$place/venv/bin/python" - <<'PY'
import tempfile
from importlib.metadata import version

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict


def small():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 64),
        layers_per_block=1, cross_attention_dim=32, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def layers(unet):
    return {name for name, _ in unet.named_modules() if name.endswith("lora_A")}


print({name: version(name) for name in ("torch", "diffusers", "peft", "transformers")})
found = {}
for targets in (["to_q", "conv_in"], ["to_q", "conv1"]):
    unet, fresh = small(), small()
    unet.add_adapter(LoraConfig(r=2, target_modules=targets))
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    with tempfile.TemporaryDirectory() as folder:
        StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=state)
        read, alphas = StableDiffusionPipeline.lora_state_dict(folder)
    StableDiffusionPipeline.load_lora_into_unet(read, network_alphas=alphas, unet=fresh)
    kept = layers(fresh)
    found[targets[1]] = (len(layers(unet)), len(kept), sum("to_q" in name for name in kept))
    print(targets, "layers written, read, of these attention:", found[targets[1]])
assert found == {"conv_in": (9, 1, 0), "conv1": (16, 16, 8)}, "this has changed"
PY
