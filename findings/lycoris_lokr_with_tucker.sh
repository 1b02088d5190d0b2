#!/bin/bash
# LyCORIS does not read the LoKr of a convolution in Tucker's form that it has made itself.
#
# Versions: lycoris-lora 4.1.3, torch 2.13.0.
# What is done: a LokrModule of a 3x3 convolution of 64 channels is made with rank 2, factor 2 and use_tucker. Its
# state_dict, which is what is saved, is given to LokrModule.make_module_from_state_dict with another such
# convolution.
# What a reader would expect: a module with the same change of the weight.
# What happens: AttributeError, the new module has no lokr_w2_a. The reader takes the rank from the second side of
# lokr_w2_a, which in Tucker's form is the number of outputs, so it builds a full matrix in place of factors.
# Without use_tucker the same module is read.
# Fails when this changes.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q torch==2.13.0 lycoris-lora==4.1.3 numpy
cd "$place"
"$place/venv/bin/python" - <<'PY'
from importlib.metadata import version

import torch
from lycoris.modules.lokr import LokrModule
from torch import nn


def convolution() -> nn.Conv2d:
    return nn.Conv2d(64, 64, 3, padding=1)


def read_again(tucker: bool) -> str:
    made = LokrModule("layer", convolution(), 1.0, 2, 2, use_tucker=tucker, factor=2)
    state = made.state_dict()
    print({name: tuple(tensor.shape) for name, tensor in state.items()})
    tensors = [state.get(name) for name in LokrModule.weight_list]
    try:
        LokrModule.make_module_from_state_dict("layer", convolution(), *tensors)
    except AttributeError as error:
        return str(error)
    return "read"


print({name: version(name) for name in ("lycoris-lora", "torch")})
with torch.no_grad():
    plain, tucker = read_again(False), read_again(True)
print("without Tucker:", plain, "| with:", tucker)
assert plain == "read"
assert "lokr_w2_a" in tucker, "this has changed"
PY
