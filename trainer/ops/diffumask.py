"""DiffuMask: masks of words from the attention maps of a picture as it is made.

    M = (1 / L) sum_l resize(mean_steps,heads A_l) / max,   mask = M > threshold

Wu et al., ICCV 2023, arXiv 2303.11681, section 3.2, equation 2: of cross-attention at all grids up
to a limit, each scaled to 1, resized and averaged. The paper finds the threshold of each picture
with a segmentation network of affinities and refines its masks with a dense CRF; here it is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.attention.op import Op
from trainer.ops.editing.installed import edited_sites
from trainer.ops.editing.word_reader import TARGET, WordReader
from trainer.ops.editing.word_tools import places_of_word

if TYPE_CHECKING:
    from trainer.attention.hooks import Sampler
    from trainer.attention.read_prompt import ReadPrompt
    from trainer.attention.sites import Site


@dataclass(frozen=True)
class WordMasks:
    """words: a mask each; threshold: of the average map; tokens: of the largest grid read."""

    owner: str
    words: Sequence[str]
    threshold: float = 0.5
    tokens: int = 64 * 64


class MaskMaker:
    """Reads the maps of words; `masks` and `shown` have what the last sampling gave."""

    def __init__(self, told: WordMasks) -> None:
        self.told = told
        self.readers: dict[str, WordReader] = {}
        self.maps: dict[str, Tensor] = {}

    def begin(self, sampler: Sampler) -> Mapping[Op, Sequence[Site]]:
        found: dict[Op, Sequence[Site]] = {}
        read = [sampler.read(prompt) for prompt in sampler.prompts]
        self.maps = {}
        for number, word in enumerate(self.told.words):
            columns = torch.zeros(len(read), read[0].length)
            for row, prompt in enumerate(read):
                columns[row, self._places(prompt, word)] = 1
            reader = WordReader(self.told.owner, {TARGET: columns}, self.told.tokens)
            reader.name = f"{self.told.owner}_words_{number}"
            found[reader] = edited_sites(sampler, "cross", kinds=("cross",), op=reader)
            self.readers[word] = reader
        return found

    def _places(self, prompt: ReadPrompt, word: str) -> list[int]:
        try:
            return places_of_word(prompt, word)
        except ValueError as error:
            raise ValueError(f"{error}; mask_words says which of them get a mask") from None

    def end(self) -> None:
        for word, reader in self.readers.items():
            if reader.maps[TARGET].sums:
                self.maps[word] = average_map(list(reader.maps[TARGET].sums.values()))
        self.readers = {}

    def shown(self) -> dict[str, Tensor]:
        """The average map of each word (rows, h, w) of 0 to 1, and its mask."""
        masks = {
            f"mask of {word}": (maps > self.told.threshold).float()
            for word, maps in self.maps.items()
        }
        return {f"map of {word}": maps for word, maps in self.maps.items()} | masks


def average_map(sums: Sequence[Tensor]) -> Tensor:
    """Maps (rows, h, w) of several grids, each scaled to a largest value of 1 in every row, as one
    at the finest of them."""
    size = max((maps.shape[-2:] for maps in sums), key=lambda own: own[0] * own[1])
    scaled = [maps / maps.amax((-2, -1), keepdim=True).clamp_min(1e-12) for maps in sums]
    large = [
        F.interpolate(maps[:, None], size=(size[0], size[1]), mode="bicubic").clamp(0, 1)
        for maps in scaled
    ]
    return torch.stack(large).mean(0)[:, 0]
