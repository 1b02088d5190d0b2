"""Adds the words of the wider world to the tokenizer, the text encoder and the judge.

    python data/tiny/add_words.py --start-from data/tiny --out wide

Every word of `sprites.WIDE` becomes one token, after all that exist, so the states of old captions
stay what they were to the last bit. The judge finds the vectors of the new words: they alone are
trained (as in textual inversion, arXiv 2208.01618) until its text embedding of "a <word>" is near
its embeddings of scenes of that sprite. So sprites that look alike start alike. The text encoder
takes over the same vectors.
"""

from __future__ import annotations

import argparse
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from trainer.data.world.scenes import article, draw_scene
from trainer.data.world.sprites import ALL, WIDE

SEED = 53
LENGTH = 32


def grown(folder: Path, words: tuple[str, ...]) -> CLIPTokenizer:
    """The tokenizer of a folder with every word as one token: pieces and merges are appended, so
    no old word is read in another way."""
    written = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    vocab: dict[str, int] = dict(written["vocab"])
    merges = [tuple(pair.split()) if isinstance(pair, str) else tuple(pair)
              for pair in written["merges"]]  # fmt: skip
    rank = {pair: number for number, pair in enumerate(merges)}
    for word in words:
        pieces = split(word, rank)
        while len(pieces) > 1:
            pair = (pieces[0], pieces[1])
            rank[pair] = len(merges)
            merges.append(pair)
            vocab.setdefault("".join(pair), len(vocab))
            pieces = split(word, rank)
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=LENGTH)


def split(word: str, rank: dict[tuple[str, str], int]) -> list[str]:
    """The pieces of a word by byte-pair merges, the one of lowest rank first."""
    pieces = [*word[:-1], f"{word[-1]}</w>"]
    while True:
        pairs = [pair for pair in pairwise(pieces) if pair in rank]
        if not pairs:
            return pieces
        best = min(pairs, key=rank.__getitem__)
        joined: list[str] = []
        for piece in pieces:
            if joined and (joined[-1], piece) == best:
                joined[-1] += piece
            else:
                joined.append(piece)
        pieces = joined


@torch.no_grad()
def looks(judge: CLIPModel, each: int) -> torch.Tensor:
    """Unit embeddings (words, each, d) of scenes of every sprite, by the image encoder."""
    found = []
    for word in WIDE:
        scenes = [draw_scene(SEED, i, (word,), count=1) for i in range(each)]
        images = torch.from_numpy(np.stack([scene.image for scene in scenes])).permute(0, 3, 1, 2)
        pooled = judge.vision_model(pixel_values=images.float() / 127.5 - 1).pooler_output
        found.append(F.normalize(judge.visual_projection(pooled), dim=-1))
    return torch.stack(found)


def learn_vectors(
    judge: CLIPModel, tokenizer: CLIPTokenizer, new: list[int], *, steps: int, each: int
) -> None:
    """Trains the vectors of the new tokens, in place, until the text encoder tells every sprite
    from the rest; all else stays."""
    table = judge.text_model.embeddings.token_embedding.weight
    old = table.detach()[[tokenizer.convert_tokens_to_ids(f"{word}</w>") for word in ALL]]
    judge.requires_grad_(False)
    table.data[new] = old.mean(0) + torch.randn(len(new), old.shape[1]) * old.std(0)
    table.requires_grad_(True)
    held = torch.ones(len(table), 1)
    held[new] = 0
    seen = looks(judge, each)
    ids = tokenizer(
        [article(word) for word in WIDE], padding="max_length", max_length=LENGTH,
        return_tensors="pt",
    ).input_ids  # fmt: skip
    optimizer = torch.optim.Adam([table], lr=1e-2)  # a row without gradient stays
    labels = torch.arange(len(WIDE))
    for step in range(steps):
        pooled = judge.text_model(input_ids=ids).pooler_output
        named = F.normalize(judge.text_projection(pooled), dim=-1)
        logits = judge.logit_scale.exp() * seen[:, step % each] @ named.T
        loss = F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)
        optimizer.zero_grad()
        loss.backward()
        table.grad.masked_fill_(held.bool(), 0.0)
        optimizer.step()
        if step % 20 == 0 or step == steps - 1:
            right = (logits.argmax(1) == labels).float().mean()
            print(f"step {step} loss {loss.item():.3f}, named right {right:.3f}", flush=True)
    judge.requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--start-from", type=Path, default=Path(__file__).parent)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--each", type=int, default=8, help="scenes of every sprite")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.manual_seed(SEED)
    source = options.start_from
    before = CLIPTokenizer.from_pretrained(source / "tokenizer")
    tokenizer = grown(source / "tokenizer", WIDE)
    judge = CLIPModel.from_pretrained(source / "clip", dtype=torch.float32).eval()
    encoder = CLIPTextModel.from_pretrained(source / "text_encoder", dtype=torch.float32).eval()
    captions = [draw_scene(SEED, i, ALL).caption for i in range(50)]
    states = [encoder(**before(text, return_tensors="pt"))[0] for text in captions]
    for model in (judge.text_model, encoder):
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    new = list(range(len(before), len(tokenizer)))
    learn_vectors(judge, tokenizer, new, steps=options.steps, each=options.each)
    learned = judge.text_model.embeddings.token_embedding.weight.data
    encoder.get_input_embeddings().weight.data[new] = learned[new]
    for text, state in zip(captions, states, strict=True):
        again = encoder(**tokenizer(text, return_tensors="pt"))[0]
        assert torch.equal(again, state), f"{text!r} is read in another way"
    judge.config.text_config.vocab_size = len(tokenizer)
    for model, part in ((judge, "clip"), (encoder, "text_encoder")):
        model.half().save_pretrained(options.out / part, safe_serialization=True)
    for part in ("clip", "tokenizer"):
        tokenizer.save_pretrained(options.out / part)
    for name in ("patches.json", "preprocessor_config.json"):
        (options.out / "clip" / name).write_bytes((source / "clip" / name).read_bytes())


if __name__ == "__main__":
    main()
