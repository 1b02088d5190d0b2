#!/bin/bash
# A schedule-free run that validates is not the run that does not: `eval()` and `train()` change bits.
#
# Versions: schedulefree 1.4.1, torch 2.13.0, as pinned below.
# What is done: AdamWScheduleFree trains 256 weights for 20 steps, with `eval()` and `train()` after each
# step, as its page asks for around a validation, and without.
# What a reader would expect: looking at the average changes nothing; the two runs have the same weights.
# What happens: the optimiser keeps one set of weights and turns it into the other by interpolation, x from
# y by a weight of 1 - 1/beta and back by 1 - beta, each rounded. The runs differ in the last bits from the
# first validation on, and so do checkpoints made in `eval()` from a run that was never stopped. A copy of
# the weights, put back after `train()`, makes them the same again, which is tried too.
# Fails when this changes.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q -c "$here/constraints.txt" torch numpy schedulefree
cd "$place"
OMP_NUM_THREADS=1 "$place/venv/bin/python" - <<'PY'
from importlib.metadata import version

import torch
from schedulefree import AdamWScheduleFree


def trained(look):
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(256))
    target = torch.randn(256)
    optimizer = AdamWScheduleFree([weight], lr=1e-2)
    optimizer.train()
    for _ in range(20):
        optimizer.zero_grad()
        (weight - target).pow(4).mean().backward()
        optimizer.step()
        if look:
            before = weight.detach().clone()
            optimizer.eval()
            optimizer.train()
            if look == "put back":
                weight.data.copy_(before)
    return weight.detach()


print({name: version(name) for name in ("torch", "schedulefree")})
plain = trained(None)
for look in ("looked", "put back"):
    found = trained(look)
    print(look, "same bits:", torch.equal(found, plain), "largest difference:",
          float((found - plain).abs().max()))
    assert torch.equal(found, plain) == (look == "put back"), "this has changed"
PY
