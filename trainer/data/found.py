"""What was found in data that only opening tells about, in a sentence that every start prints."""

from __future__ import annotations

from trainer.data.source import Dataset, Ordered, Source
from trainer.data.tars.manifest import CAPTION, MASK
from trainer.data.tars.reader import Tars


def found_when_opened(source: Source, train: Dataset) -> list[str]:
    """Empty where the names of files have told it already."""
    if source.found():
        return []
    said = f"data: {len(train)} training samples"
    if isinstance(train, Tars):
        texts = sum(CAPTION in entry.members for _, entry in train.rows)
        kinds = {f".{CAPTION}": texts, ".json": len(train.rows) - texts}
        told = ", ".join(f"{count} from {name}" for name, count in kinds.items() if count)
        masks = sum(MASK in entry.members for _, entry in train.rows)
        said += f"; captions: {told}; masks: {masks or 'none'}"
    if isinstance(train, Ordered):
        said += (
            f" in {train.shards} shards, an epoch; pictures and captions are read when they come"
        )
    return [said]
