#!/bin/bash
# CogVideoX's VAE gives 8 frames back for a clip of 5.
#
# Versions: diffusers 0.42.1, torch 2.13.0.
# What is done: a small AutoencoderKLCogVideoX, which keeps one of 4 frames and the first, encodes clips of 5, 9 and
# 17 frames and decodes what it encoded.
# What a reader would expect: as many frames as went in, as these are all a multiple of 4 and one more.
# What happens: of 5 frames come 8, of 9 come 9 and of 17 come 17. The decoder takes two latent frames at a time, and
# the first pair of an even number of latent frames is not begun with a single frame, so only clips of a multiple of
# 8 frames and one more keep their length. Nothing is raised.
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
from diffusers import AutoencoderKLCogVideoX

torch.manual_seed(0)
vae = AutoencoderKLCogVideoX(
    block_out_channels=(8, 8, 8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=2,
).eval()
print({name: version(name) for name in ("diffusers", "torch")})
found = {}
with torch.no_grad():
    for frames in (5, 9, 17):
        latents = vae.encode(torch.zeros(1, 3, frames, 16, 16)).latent_dist.mode()
        found[frames] = (latents.shape[2], vae.decode(latents).sample.shape[2])
print("frames: (latent frames, frames decoded)", found)
assert found[5] == (2, 8), "this has changed"
assert found[9] == (3, 9) and found[17] == (5, 17)
PY
