"""What files of text encoders and tokenizers need so that all versions of their readers load them.

The names of a CLIP text encoder have the level `text_model`, which transformers 4 and ComfyUI need
and transformers 5 reads. The files of a tokenizer that transformers 4 asks for are beside
`tokenizer.json`. The config of a text encoder says float32 whatever its file holds: transformers
loads what the config says and diffusers loads float32, and a pipeline of two precisions does not
run.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from trainer.export.layer_names import old_clip_key

# of tokenizers, what transformers 4 reads beside tokenizer.json or in its place
OLDER_FILES = ("vocab.json", "merges.txt", "spiece.model", "tokenizer.model")


def for_older_readers(folder: Path, encoder: Any) -> None:
    """Gives a saved text encoder the names and the config that all versions of its readers load."""
    config = folder / "config.json"
    facts = json.loads(config.read_text(encoding="utf-8")) | {"dtype": "float32"}
    config.write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if not type(encoder).__name__.startswith("CLIPText"):
        return
    for path in folder.glob("*.safetensors"):
        renamed = {old_clip_key(key): value for key, value in load_file(path).items()}
        save_file(renamed, path, {"format": "pt"})


def complete_tokenizer(folder: Path, origin: Path) -> None:
    """Adds the older files of a tokenizer: those of the backbone, else what `tokenizer.json` says
    of byte pairs."""
    for name in OLDER_FILES:
        source = origin / folder.name / name
        if source.is_file() and not (folder / name).exists():
            shutil.copyfile(source, folder / name)
    fast = folder / "tokenizer.json"
    if not fast.is_file() or (folder / "vocab.json").exists():
        return
    model = json.loads(fast.read_text(encoding="utf-8"))["model"]
    if model.get("type") == "BPE" and not (folder / "tokenizer.model").exists():
        pairs = (" ".join(each) if isinstance(each, list) else each for each in model["merges"])
        vocab = json.dumps(model["vocab"], ensure_ascii=False)
        (folder / "vocab.json").write_text(vocab, encoding="utf-8")
        lines = "\n".join(("#version: 0.2", *pairs))
        (folder / "merges.txt").write_text(f"{lines}\n", encoding="utf-8")
