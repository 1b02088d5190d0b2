"""What prompts are encoded to, kept by content: in memory, and, where there is a folder, in a
verified file for each prompt that several runs and ranks share. A file that is cut, altered, or in
another one's place is made anew."""

from __future__ import annotations

import hashlib
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trainer.common.atomic import written_atomically
from trainer.data.latent_cache import checksum

REMEMBERED = 2**29  # bytes in memory, of the prompts that were used last
SUM = "sum"  # the entry of a file's header that holds its checksum

Encoding = Mapping[str, Tensor]


class TextCache:
    """`cache[prompt]` is what `encode` makes of a prompt: tensors by name, on the CPU.

    folder: of the files, named after all else that they depend on, None for memory alone; encode: a
    prompt to tensors.
    """

    def __init__(self, folder: Path | None, encode: Callable[[str], Encoding]) -> None:
        self.folder, self.encode = folder, encode
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
            if self.folder is not None:
                self._write(self.folder, prompt, found)
        self._remember(prompt, found)
        return found

    def _remember(self, prompt: str, found: Encoding) -> None:
        if prompt not in self.remembered:
            self.bytes += _bytes(found)
        self.remembered[prompt] = found
        self.remembered.move_to_end(prompt)
        while self.bytes > REMEMBERED and len(self.remembered) > 1:
            self.bytes -= _bytes(self.remembered.popitem(last=False)[1])

    def _write(self, folder: Path, prompt: str, found: Encoding) -> None:
        path = _file(folder, prompt)
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_atomically(path) as part:
            own = {name: value.contiguous() for name, value in found.items()}
            save_file(own, part, {SUM: _sum(folder, prompt, found)})

    def _read(self, prompt: str) -> Encoding | None:
        """None where there is no file, or not the one that was written for this prompt."""
        if self.folder is None:
            return None
        try:
            with safe_open(_file(self.folder, prompt), "pt") as file:
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                same = (file.metadata() or {}).get(SUM) == _sum(self.folder, prompt, found)
        except (OSError, SafetensorError):
            return None
        return found if same else None


def _file(folder: Path, prompt: str) -> Path:
    name = hashlib.sha256(prompt.encode()).hexdigest()[:32]
    return folder / name[:2] / f"{name}.safetensors"


def _sum(folder: Path, prompt: str, found: Encoding) -> str:
    """A CRC-32 of the folder's name, the prompt, and every tensor."""
    total = zlib.crc32(f"{folder.name} {prompt}".encode())
    for name, value in sorted(found.items()):
        total = zlib.crc32(f"{name} {value.dtype} {tuple(value.shape)}".encode(), total)
        total = checksum(_raw(value), total)
    return f"{total:08x}"


def _raw(value: Tensor) -> np.ndarray:
    return value.contiguous().flatten().view(torch.uint8).numpy()


def _bytes(found: Encoding) -> int:
    return sum(value.numel() * value.element_size() for value in found.values())
