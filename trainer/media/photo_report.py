"""What was found in a folder of photos, in a sentence that every start prints."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress

from trainer.media.images import ImageError
from trainer.media.photo_captions import NAMES, Captions
from trainer.media.photo_listing import Listing

FOLDERS = 4  # whose repeats a sentence names


def found_in(captions: Captions, template: bool = False, times: int | None = 1) -> list[str]:
    """A sentence of counts, and one for what may be meant otherwise. template: whether photos
    without a caption get one from elsewhere; times: how often all photos are repeated,
    None where the data set takes each as often as the others."""
    listing = captions.listing
    kinds, several, lines = Counter[str](), 0, 0
    for photo in listing.photos:
        with suppress(ImageError):  # reading the photo reports it
            own = captions.of(photo)
            kinds[NAMES[own.kind] if own else "a template" if template else "none"] += 1
            several += own is not None and len(own.texts) > 1
            lines += own is not None and own.lines > len(own.texts)
    told = ", ".join(f"{count} from {name}" for name, count in kinds.items() if name != "none")
    parts = [
        f"{listing.folder}: {len(listing.photos)} photos",
        f"captions: {told or 'none'}" + (f" (photos with several: {several})" if several else ""),
        f"masks: {len(listing.masks) or 'none'}",
        *(() if times is None else _repeats(listing, times)),
    ]
    said = ["; ".join(parts)]
    if lines:
        said.append(
            f"{listing.folder}: caption files of several lines, each read as one caption: {lines}; "
            "data.caption_lines=true draws one of the lines at each use"
        )
    return said


def _repeats(listing: Listing, times: int) -> list[str]:
    """Empty where every photo counts once."""
    own = Counter[tuple[str, int]]()
    for photo in listing.photos:
        own[photo.relative_to(listing.folder).parent.as_posix(), listing.repeats(photo)] += 1
    total = times * sum(count * each for (_, each), count in own.items())
    if total == len(listing.photos):
        return []
    shown = [f"{name} {times * each} times" for name, each in own if each > 1]
    more = [f"{len(shown) - FOLDERS} folders more"] if len(shown) > FOLDERS else []
    where = ", ".join([*shown[:FOLDERS], *more])
    return [f"with repeats {total} an epoch" + (f" ({where})" if where else "")]
