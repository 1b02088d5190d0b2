#!/bin/bash
# A copy.deepcopy of a CLIPTokenizer decodes otherwise than the tokenizer itself.
#
# Versions: transformers 5.23.0, tokenizers 0.23.3.
# What is done: a CLIPTokenizer is made of a small vocabulary in which "left</w>" is one token, and copied
# with copy.deepcopy. Both encode and decode the same word.
# What a reader would expect: the same ids and the same text.
# What happens: the ids are equal. The tokenizer decodes to "left", the copy to "left</w>": the function that
# takes the mark of a word's end away is put on the instance when it is made, and the copy is without it.
# Nothing is raised.
# Fails when this changes.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q transformers==5.23.0 tokenizers==0.23.3
cd "$place"
HF_HUB_OFFLINE=1 "$place/venv/bin/python" - <<'PY'
import copy
from importlib.metadata import version

from transformers import CLIPTokenizer

pieces = ["l", "e", "f", "t", "t</w>", "le", "lef", "left</w>", "<|startoftext|>", "<|endoftext|>"]
merges = [("l", "e"), ("le", "f"), ("lef", "t</w>")]
one = CLIPTokenizer(vocab={piece: number for number, piece in enumerate(pieces)}, merges=merges)
other = copy.deepcopy(one)
print({name: version(name) for name in ("transformers", "tokenizers")})
ids = [each("left", add_special_tokens=False).input_ids for each in (one, other)]
texts = [each.decode(each_ids).strip() for each, each_ids in zip((one, other), ids)]
print("ids", ids, "decoded", texts)
assert ids[0] == ids[1] == [7]
assert texts == ["left", "left</w>"], "this has changed"
PY
