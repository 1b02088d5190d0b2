"""What prompts are encoded to, kept by content: in memory, and, where there is a folder, in a
verified file for each prompt that several runs and ranks share. A file that is cut, altered, or in
another one's place is made anew."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from trainer.data.kept_tensors import read_tensors, write_tensors

REMEMBERED = 2**29  # bytes in memory, of the prompts that were used last

Encoding = Mapping[str, Tensor]


class TextCache:
    """`cache[prompt]` is what `encode` makes of a prompt: tensors by name, on the CPU.

    folder: of the files, named after all else that they depend on, None for memory alone; encode: a
    prompt to tensors; room: bytes that may be written, after which memory alone is used.
    """

    def __init__(
        self, folder: Path | None, encode: Callable[[str], Encoding], room: float = math.inf
    ) -> None:
        self.folder, self.encode, self.room = folder, encode, room
        self.remembered: OrderedDict[str, Encoding] = OrderedDict()
        self.bytes = 0

    def __contains__(self, prompt: str) -> bool:
        """Whether it needs no encoding."""
        if prompt in self.remembered:
            return True
        found = self._read(prompt)
        if found is not None:
            self._remember(prompt, found)
        return found is not None

    def __getitem__(self, prompt: str) -> Encoding:
        found = self.remembered.get(prompt) or self._read(prompt)
        if found is None:
            found = {name: value.detach().cpu() for name, value in self.encode(prompt).items()}
            self.room -= _bytes(found)
            if self.folder is not None and self.room >= 0:
                write_tensors(self.folder, prompt, found)
        self._remember(prompt, found)
        return found

    def _remember(self, prompt: str, found: Encoding) -> None:
        if prompt not in self.remembered:
            self.bytes += _bytes(found)
        self.remembered[prompt] = found
        self.remembered.move_to_end(prompt)
        while self.bytes > REMEMBERED and len(self.remembered) > 1:
            self.bytes -= _bytes(self.remembered.popitem(last=False)[1])

    def _read(self, prompt: str) -> Encoding | None:
        return None if self.folder is None else read_tensors(self.folder, prompt)


def _bytes(found: Encoding) -> int:
    return sum(value.numel() * value.element_size() for value in found.values())
