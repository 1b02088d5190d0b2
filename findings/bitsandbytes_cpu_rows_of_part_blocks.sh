#!/bin/bash
# On a CPU, bitsandbytes unpacks 4-bit matrices with wrong scales where a row is no whole number of blocks.
#
# Versions: bitsandbytes 0.50.2, torch 2.13.0.
# What is done: matrices of 16 rows and of 32, 48, 64, 96 and 128 columns are packed as NF4 in blocks of 64 and unpacked
# again on the CPU. The same codes and the same scales are also unpacked by hand, 64 values of the flattened matrix for
# each scale, which is how they were packed.
# What a reader would expect: both give the same matrix, for any shape.
# What happens: they are the same where the columns are a multiple of 64. Otherwise the library's matrix differs by
# about the size of the values, although as many scales are stored as there are blocks. Nothing is raised.
# Fails when this changes.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q torch==2.13.0 bitsandbytes==0.50.2 numpy
cd "$place"
HF_HUB_OFFLINE=1 "$place/venv/bin/python" - <<'PY'
from importlib.metadata import version

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

BLOCK = 64
torch.manual_seed(0)
print({name: version(name) for name in ("bitsandbytes", "torch")})
found = {}
for columns in (32, 48, 64, 96, 128):
    weight = torch.randn(16, columns)
    packed, state = quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
    codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).flatten().long()
    scales = state.absmax.repeat_interleave(BLOCK)[: weight.numel()]
    by_hand = (state.code[codes] * scales).view_as(weight)
    own = dequantize_4bit(packed, state)
    found[columns] = float((own - by_hand).abs().max())
    error = float((by_hand - weight).abs().max()), float((own - weight).abs().max())
    print(f"{columns} columns, {state.absmax.numel()} scales: apart {found[columns]:.3f}; from the weight by hand "
          f"{error[0]:.3f}, by the library {error[1]:.3f}")
assert all(found[columns] < 1e-6 for columns in (64, 128)), "this has changed"
assert all(found[columns] > 0.1 for columns in (32, 48, 96)), "this has changed"
PY
