"""The text of training batches, encoded by text encoders that do not train: each prompt alone and
once, by content, so that every caption of a sample, shuffled tags and the empty one of caption
dropout have their own.

A prompt is encoded alone with the cache and without, so that losses are the same to the last bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
import transformers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from trainer.backbones.backbone import Backbone
from trainer.backbones.module_digests import exact_contents
from trainer.backbones.resting import awake
from trainer.common.long_work import long_work
from trainer.common.version import name_and_version
from trainer.data.loader import Planned
from trainer.data.mixed import Mixed
from trainer.data.tars.reader import Tars
from trainer.data.text_cache import TextCache
from trainer.training.tasks.denoise import Denoise, kept_captions

MOST_BYTES = 16 * 10**9  # of the encodings of a run
MOST_CAPTIONS = 200_000  # of all steps, that are looked at before the first


class TextEncodings:
    """An encoder of text as a `Family` has it, for a backbone whose text encoders do not train.

    folder: of the cache, None for none. apart: whether each prompt is encoded by itself; False
    where a run has too many to keep, and a batch is encoded at once.
    """

    def __init__(self, backbone: Backbone, folder: Path | None) -> None:
        self.backbone, self.folder, self.apart = backbone, folder, True
        self._cache: TextCache | None = None

    def __call__(self, backbone: Backbone, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Fields of the `Condition` of b prompts, as the backbone's own encoder gives them; prompts
        of fewer tokens than others are filled up with zeros, as their mask says."""
        with torch.no_grad():
            if not self.apart:
                return self._encoded(prompts)
            unlike = dict.fromkeys(prompts)
            found = self._kept(list(unlike))
            device = backbone.device
            return {
                name: _joined([found[prompt][name].to(device) for prompt in prompts])
                for name in found[prompts[0]]
            }

    @property
    def cache(self) -> TextCache | None:
        if self._cache is None and self.folder is not None:
            self._cache = TextCache(self.folder / "text" / self._key(), self._one)
        return self._cache

    def prepare(self, prompts: Iterable[str]) -> None:
        """Encodes those that are not in the cache."""
        cache = self.cache
        assert cache is not None, "there is a cache to prepare"
        wanted = sorted(set(prompts))
        missing = [prompt for prompt in wanted if prompt not in cache]
        if not missing:
            return
        with (
            torch.no_grad(),
            awake(self.backbone, self.backbone.text_encoders),
            long_work("prompts", len(wanted), len(wanted) - len(missing)) as advance,
        ):
            for prompt in missing:
                _ = cache[prompt]
                advance(1)

    def _kept(self, prompts: Sequence[str]) -> Mapping[str, Mapping[str, Tensor]]:
        cache = self.cache
        if cache is None:
            return {prompt: self._one(prompt) for prompt in prompts}
        # those that are new move the text encoders to the device once
        missing = any(prompt not in cache for prompt in prompts)
        with awake(self.backbone, self.backbone.text_encoders if missing else ()):
            return {prompt: cache[prompt] for prompt in prompts}

    def _one(self, prompt: str) -> dict[str, Tensor]:
        return self._encoded([prompt])

    def _encoded(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        return self.backbone.encode_prompts(prompts).tensors()

    def _key(self) -> str:
        """Of all that an encoding depends on beside the prompt."""
        backbone = self.backbone
        parts = [exact_contents(encoder) for encoder in backbone.text_encoders.values()]
        words = [sorted(each.get_vocab().items()) for each in backbone.tokenizers.values()]
        facts = (
            backbone.family, backbone.max_tokens, sorted(backbone.prompt_lengths.items()),
            sorted(backbone.options.items(), key=str), backbone.computes_in, backbone.device.type,
            torch.get_num_threads(), torch.__version__, transformers.__version__,
            name_and_version(),
        )  # fmt: skip
        digest = hashlib.sha256(repr((parts, words, facts)).encode())
        return digest.hexdigest()[:24]


def text_encodings(backbone: Backbone, folder: Path | None) -> TextEncodings | None:
    """How a backbone encodes the text of batches; None where it has no text encoder, or one of
    which something trains."""
    encoders = backbone.text_encoders.values()
    if not encoders or any(own.requires_grad for each in encoders for own in each.parameters()):
        return None
    return TextEncodings(backbone, folder)


def encode_all(
    task: Denoise, batches: Planned, steps: Sequence[int], *, say: Callable[[str], None]
) -> bool:
    """Encodes every prompt of a run before it trains; returns whether all of them are in the cache,
    so that the text encoders are not needed for it.

    steps: the numbers of the batches that are still to come. say: receives a line where the prompts
    are not kept.
    """
    texts = task.texts
    if not isinstance(texts, TextEncodings) or texts.cache is None:
        return False
    found = coming(task, batches, steps)
    most = MOST_BYTES // _bytes(task.backbone)
    if found is None or len(found) > most:
        say(
            "run.cache_text: the captions are in shards, or more than can be kept; every batch is "
            "encoded anew, and the text encoders stay on the device"
        )
        texts.apart = False
        return False
    texts.prepare(found)
    return True


def coming(task: Denoise, batches: Planned, steps: Sequence[int]) -> set[str] | None:
    """The prompts of these steps, after caption dropout; None where they are too many to look at,
    or where reading a caption means reading a shard."""
    data = batches.dataset
    parts = data.parts if isinstance(data, Mixed) else (data,)
    if any(isinstance(part, Tars) for part in parts):
        return None
    found: set[str] = set()
    seen = 0
    for step in steps:
        places, captions = batches.captions(step)
        seeds = [(task.seed, "train", step, place) for place in places]
        found.update(kept_captions(captions, seeds, task.caption_dropout))
        seen += len(captions)
        if seen > MOST_CAPTIONS:
            return None
    return found


def _joined(rows: Sequence[Tensor]) -> Tensor:
    """Rows (1, n, ...) to (b, n, ...), where n differs as long as the longest, 0 behind."""
    if len({row.shape for row in rows}) == 1:
        return torch.cat(list(rows))
    return pad_sequence([row[0] for row in rows], batch_first=True)


def _bytes(backbone: Backbone) -> int:
    """Of the encoding of a prompt, at most."""
    shapes = backbone.text_shapes.values()
    return 4 * sum(int(torch.Size(shape).numel()) for shape in shapes)
