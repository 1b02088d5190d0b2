#!/bin/bash
# CLIP's pooled text ends at a new word, where the model's configuration has eos_token_id 2.
#
# Versions: transformers 5.23.0, torch 2.13.0.
# What is done: a small CLIPTextModelWithProjection with eos_token_id=2 (a value that transformers treats as that
# of older files) reads two prompts which begin alike, with a new word, and go on differently. The new word's id
# is above that of the end of text, as add_tokens gives it.
# What a reader would expect: two different pooled texts, as the prompts differ before the end of text.
# What happens: they are equal to the last bit. For eos_token_id 2 the model pools at the largest id of a prompt,
# which is the new word, and attention is causal, so nothing behind the word counts. With the tokenizer's own id
# in the configuration the pooled texts differ. Nothing is raised.
# Fails when this changes.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 numpy
cd "$place"
HF_HUB_OFFLINE=1 "$place/venv/bin/python" - <<'PY'
from importlib.metadata import version

import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

START, END, NEW = 10, 11, 12  # the new word comes after all that were there


def pooled(eos: int) -> torch.Tensor:
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=13, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=8, projection_dim=8, bos_token_id=START, eos_token_id=eos, pad_token_id=END,
    )
    model = CLIPTextModelWithProjection(config).eval()
    prompts = torch.tensor([[START, NEW, 3, 4, END, END], [START, NEW, 5, 6, END, END]])
    with torch.no_grad():
        return model(input_ids=prompts).text_embeds


print({name: version(name) for name in ("transformers", "torch")})
old, right = pooled(2), pooled(END)
print("equal with eos_token_id=2:", torch.equal(*old), " with the tokenizer's own:", torch.equal(*right))
assert torch.equal(*old), "this has changed"
assert not torch.equal(*right)
PY
