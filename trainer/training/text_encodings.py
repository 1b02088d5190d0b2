"""The text of training batches, encoded by text encoders that do not train: each prompt alone, by
content, so that every caption of a sample, shuffled tags and the empty one of caption dropout have
their own. What is encoded is kept in files, all of it where the prompts of a run can be known
before its first step, else as much as `room_of_files`; and in memory as far as it has room.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch
import transformers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from trainer.backbones.backbone import Backbone
from trainer.backbones.module_digests import code, exact_contents, settings
from trainer.backbones.resting import awake
from trainer.common.long_work import long_work
from trainer.common.version import name_and_version
from trainer.data.loader import Planned
from trainer.data.text_cache import TextCache
from trainer.training.coming_prompts import UnknownPromptsError, coming, room_of_files
from trainer.training.tasks.denoise import Denoise


class TextEncodings:
    """An encoder of text as a `Family` has it, for a backbone whose text encoders do not train.

    folder: of the files, None for none. Each prompt is encoded by itself with files and without, so
    that a run is the same to the last bit wherever its encodings come from.
    """

    def __init__(self, backbone: Backbone, folder: Path | None) -> None:
        self.backbone, self.folder, self.room = backbone, folder, math.inf

    def __call__(self, backbone: Backbone, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Fields of the `Condition` of b prompts, as the backbone's own encoder gives them; prompts
        of fewer tokens than others are filled up with zeros, as their mask says."""
        with torch.no_grad():
            found = self._kept(list(dict.fromkeys(prompts)))
            device = backbone.device
            return {
                name: _joined([found[prompt][name].to(device) for prompt in prompts])
                for name in found[prompts[0]]
            }

    @cached_property
    def cache(self) -> TextCache:
        folder = None if self.folder is None else self.folder / "text" / self._key()
        return TextCache(folder, self._one, self.room)

    def limit_files(self, room: int) -> None:
        """Only so many bytes are written from here on; further prompts are kept in memory alone,
        the last ones."""
        self.room = room
        self.__dict__.pop("cache", None)

    def prepare(self, prompts: Iterable[str]) -> None:
        """Encodes those that are not in the cache."""
        cache = self.cache
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
        # those that are new move the text encoders to the device once
        missing = any(prompt not in cache for prompt in prompts)
        with awake(self.backbone, self.backbone.text_encoders if missing else ()):
            return {prompt: cache[prompt] for prompt in prompts}

    def _one(self, prompt: str) -> dict[str, Tensor]:
        return self.backbone.encode_prompts([prompt]).tensors()

    def _key(self) -> str:
        """Of all that an encoding depends on beside the prompt."""
        backbone = self.backbone
        encoders = backbone.text_encoders.values()
        parts = [(exact_contents(encoder), settings(encoder)) for encoder in encoders]
        words = [sorted(each.get_vocab().items()) for each in backbone.tokenizers.values()]
        facts = (
            backbone.family, backbone.max_tokens, sorted(backbone.prompt_lengths.items()),
            sorted(backbone.options.items(), key=str), backbone.computes_in, backbone.device.type,
            torch.get_num_threads(), torch.__version__, transformers.__version__,
            name_and_version(), code(),
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

    steps: the numbers of the batches that are still to come. say: receives a line, with the reason,
    where the prompts are not known before.
    """
    texts = task.texts
    if not isinstance(texts, TextEncodings) or texts.folder is None:
        return False
    try:
        found = coming(task, batches, steps)
    except UnknownPromptsError as why:
        say(
            f"run.cache_text: {why}; prompts are encoded when they come, and the text encoders "
            "stay on the device"
        )
        texts.limit_files(room_of_files())
        return False
    texts.prepare(found)
    return True


def _joined(rows: Sequence[Tensor]) -> Tensor:
    """Rows (1, n, ...) to (b, n, ...), where n differs as long as the longest, 0 behind."""
    if len({row.shape for row in rows}) == 1:
        return torch.cat(list(rows))
    return pad_sequence([row[0] for row in rows], batch_first=True)
