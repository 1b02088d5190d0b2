#!/bin/bash
# Chroma's padding is attended to in diffusers, more weakly than text, though it is masked.
#
# Versions: diffusers 0.42.1, torch 2.13.0.
# What is done: a small ChromaTransformer2DModel is run with the mask that ChromaPipeline makes of a prompt's mask of
# floats, as its encode_prompt gives, where three of eight text tokens are padding. Then these three are replaced.
# What a reader would expect: the same output, as masked tokens are not attended to.
# What happens: the output differs. The mask of 0 and 1 stays a float, and torch adds a float mask to the scores, so a
# masked token is e times less likely than another, and not impossible. With the same mask as booleans the image's
# output is the same. Nothing is raised.
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
from diffusers import ChromaPipeline, ChromaTransformer2DModel

TEXT, IMAGE = 8, 16
torch.manual_seed(0)
model = ChromaTransformer2DModel(
    patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
    joint_attention_dim=32, axes_dims_rope=[4, 4, 8], approximator_hidden_dim=32, approximator_layers=1,
    approximator_num_channels=16,
).eval()
for parameter in model.parameters():
    torch.nn.init.normal_(parameter, std=0.2)
image, text = torch.randn(1, IMAGE, 4), torch.randn(1, TEXT, 32)
other = text.clone()
other[:, 5:] = torch.randn(1, TEXT - 5, 32)
prompt_mask = torch.tensor([[1.0] * 5 + [0.0] * 3])
mask = ChromaPipeline._prepare_attention_mask(None, 1, IMAGE, torch.float32, prompt_mask)


def change(mask: torch.Tensor) -> float:
    outputs = [
        model(
            hidden_states=image, encoder_hidden_states=each, timestep=torch.tensor([0.5]),
            img_ids=torch.zeros(IMAGE, 3), txt_ids=torch.zeros(TEXT, 3), attention_mask=mask,
        ).sample
        for each in (text, other)
    ]
    return float((outputs[0] - outputs[1]).abs().max())


with torch.no_grad():
    stock, masked = change(mask), change(mask.bool())
print({name: version(name) for name in ("diffusers", "torch")}, "mask of the pipeline:", mask.dtype)
print(f"largest change by the padding: {stock:.4f} with its mask, {masked:.4f} with booleans")
assert mask.dtype == torch.float32 and stock > 1e-3, "this has changed"
assert masked < 1e-5
PY
