#!/bin/bash
# DiT gives a square back for latents that are not square.
#
# Versions: diffusers 0.42.1, torch 2.13.0.
# What is done: a small DiTTransformer2DModel of patches of 1 is run on latents of 4x16.
# What a reader would expect: an output of 4x16, or an error.
# What happens: an output of 8x8 with the same 64 tokens in it. The model takes the root of their number as height and
# width. Nothing is raised.
# Fails when this changes.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 accelerate numpy
cd "$place"
HF_HUB_OFFLINE=1 "$place/venv/bin/python" - <<'PY'
from importlib.metadata import version

import torch
from diffusers import DiTTransformer2DModel

torch.manual_seed(0)
model = DiTTransformer2DModel(
    num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=1, sample_size=16,
    patch_size=1, num_embeds_ada_norm=10, norm_num_groups=2,
).eval()
latents = torch.randn(1, 4, 4, 16)
with torch.no_grad():
    output = model(latents, timestep=torch.tensor([5]), class_labels=torch.tensor([3])).sample
print({name: version(name) for name in ("diffusers", "torch")})
print("latents", tuple(latents.shape), "output", tuple(output.shape))
assert tuple(output.shape) == (1, 4, 8, 8), "this has changed"
PY
