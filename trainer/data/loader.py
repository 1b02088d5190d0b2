"""From a dataset and a step plan to the batches of one rank."""

from __future__ import annotations

import signal
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from trainer.common.exit_codes import CODES
from trainer.common.seeds import seed_of
from trainer.common.threads import return_to_all
from trainer.data.extra_inputs import extra_inputs
from trainer.data.latent_cache import Latents, frames_of, rows
from trainer.data.latent_store import LatentStore
from trainer.data.loss_mask import Masked
from trainer.data.plan import Cursor, Slot, StepPlan
from trainer.data.source import Dataset, HasContents, HoldsLatents, Sample
from trainer.media.images import in_range

SPARED = 30  # seconds for which a data worker continues after a SIGTERM


@dataclass
class Batch:
    """One rank's part of a global micro-batch.

    pixels (b * frames, 3, H, W) in [-1, 1], or moments (b * latent frames, 2c, h, w), never both:
    in fp32 after `to`, before it perhaps uint8 and fp16. The frames of a clip are adjacent; images
    are clips of one frame, and only some VAEs make fewer latent frames. masks (b, 1, h, w), of
    images only;
    weights (b,) of each sample in the loss; positions (b,) in the global micro-batch `step`, which
    seed the sample's noise; fps (b,) frames a second of each clip, None for images; u (b,) fixes
    the timesteps, as shares of their range. inputs: further inputs by name, each (b, ...): those of
    the samples, and those that were asked for and are known, see `extra_inputs.py`. counts: False
    for a batch of the validation that another rank counts. contents: what the latents of each
    sample are kept by, empty where they are not.
    """

    step: int
    positions: list[int]
    captions: list[str]
    keys: list[str]
    weights: Tensor
    pixels: Tensor | None = None
    moments: Tensor | None = None
    masks: Tensor | None = None
    u: list[float] | None = None
    frames: int = 1
    fps: list[float] | None = None
    inputs: dict[str, Tensor] = field(default_factory=dict)
    counts: bool = True
    contents: list[str] = field(default_factory=list)

    def to(self, device: torch.device) -> Batch:
        for name in ("weights", "pixels", "moments", "masks"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, value.to(device, non_blocking=True))
        if self.pixels is not None and self.pixels.dtype == torch.uint8:
            self.pixels = in_range(self.pixels)
        if self.moments is not None:
            self.moments = self.moments.float()
        self.inputs = {
            name: value.to(device, non_blocking=True) for name, value in self.inputs.items()
        }
        return self


class Planned(TorchDataset[Batch]):
    """Item k is this rank's part of global micro-batch k. reads: the names of further inputs that
    batches are to have, as of `extra_inputs`; store: latents by content, of data
    that has contents."""

    def __init__(
        self,
        dataset: Dataset,
        plan: StepPlan,
        moments: Latents | None,
        rank: int,
        world_size: int,
        *,
        reads: Collection[str] = (),
        store: LatentStore | None = None,
    ) -> None:
        self.dataset, self.plan, self.moments, self.store = dataset, plan, moments, store
        self.rank, self.world_size, self.reads = rank, world_size, reads

    def __getitem__(self, step: int) -> Batch:
        return collate(
            self.dataset,
            self.slots(step),
            step=step,
            seed=self.plan.seed,
            moments=self.moments,
            reads=self.reads,
            store=self.store,
        )

    def slots(self, step: int) -> list[Slot]:
        """This rank's part of a batch, whose samples are not read."""
        return self.plan.local(step, self.rank, self.world_size)

    def generator(self, slot: Slot, step: int) -> np.random.Generator:
        """What the sample of a slot draws its augmentation and its caption from."""
        return _generator(slot, step, self.plan.seed)


class Fixed(TorchDataset[Batch]):
    """Held-out samples in order, each with the same noise in every pass.

    batch_size: images in a batch; of clips, as many as have that many frames, at least one. The
    samples of a batch are of one group. reads: as of `Planned`.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        moments: Latents | None,
        *,
        reads: Collection[str] = (),
    ) -> None:
        assert len(set(dataset.frames)) == 1, "held-out samples have one number of frames"
        self.dataset, self.moments, self.reads = dataset, moments, reads
        most = max(1, batch_size // dataset.frames[0])
        self.batches = [
            range(start, min(start + most, group.stop))
            for group in dataset.groups
            for start in range(group.start, group.stop, most)
        ]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> Batch:
        slots = [Slot(i, i, 1.0) for i in self.batches[number]]
        return collate(self.dataset, slots, step=0, seed=0, moments=self.moments, reads=self.reads)


@dataclass(frozen=True)
class Unread:
    """In the place of a batch that could not be read."""

    error: Exception


class Tried(TorchDataset[Batch | Unread]):
    """The batches of `Fixed`; one that cannot be read is `Unread`, for a validation whose failure
    does not end the run."""

    def __init__(self, batches: Fixed) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> Batch | Unread:
        try:
            return self.batches[number]
        except Exception as error:
            return Unread(error)


class RankShare(TorchDataset[Batch | Unread]):
    """One rank's batches of the validation: every `world_size`-th of all. Each rank has as many,
    as they wait for each other: where one is missing, a batch of another rank's that does not
    count."""

    def __init__(
        self, batches: Sequence[Batch | Unread] | Tried, rank: int, world_size: int
    ) -> None:
        self.batches, self.rank, self.world_size = batches, rank, world_size

    def __len__(self) -> int:
        return -(-len(self.batches) // self.world_size)

    def __getitem__(self, number: int) -> Batch | Unread:
        place = number * self.world_size + self.rank
        found = self.batches[place % len(self.batches)]
        if isinstance(found, Batch):
            found.counts = place < len(self.batches)
        return found


def collate(
    dataset: Dataset,
    slots: Sequence[Slot],
    *,
    step: int,
    seed: int,
    moments: Latents | None,
    reads: Collection[str] = (),
    store: LatentStore | None = None,
) -> Batch:
    """Reads the slots of one micro-batch; augmentation is seeded by (seed, step, place). moments:
    the cached latents of the data set, instead of its pictures; reads, store: as of `Planned`."""
    pairs = [(slot, _generator(slot, step, seed)) for slot in slots]
    batch = Batch(
        step=step,
        positions=[slot.place for slot in slots],
        captions=[],
        keys=[],
        weights=torch.tensor([slot.weight for slot in slots], dtype=torch.float32),
    )
    first = rows(dataset, slots[0].index % len(dataset))
    batch.frames = first.stop - first.start
    if batch.frames > 1:
        batch.fps = [dataset.rates[slot.index] for slot in slots]
    if store is not None and isinstance(dataset, HasContents):
        batch.contents = [dataset.content(slot.index) for slot in slots]
    stored = None if store is None else store.all(batch.contents)
    batch.moments = _moments(dataset, slots, moments, stored=stored)
    if batch.moments is not None:
        batch.captions = [dataset.caption(slot.index, rng) for slot, rng in pairs]
        batch.keys = [dataset.key(slot.index) for slot in slots]
        if isinstance(dataset, Masked):
            batch.masks = _stacked([dataset.loss_mask(slot.index) for slot in slots])
        samples = None
    else:
        samples = [dataset.sample(slot.index, rng) for slot, rng in pairs]
        _fill(batch, samples)
    missing = [name for name in reads if name not in batch.inputs]
    batch.inputs |= extra_inputs(dataset, [slot.index for slot in slots], missing, samples=samples)
    return batch


def _generator(slot: Slot, step: int, seed: int) -> np.random.Generator:
    return np.random.default_rng(seed_of(seed, "augment", step, slot.place))


def _moments(
    dataset: Dataset, slots: Sequence[Slot], moments: Latents | None, *, stored: Tensor | None
) -> Tensor | None:
    """What is there already of a batch's latents; None where pictures are to be read."""
    if moments is not None:
        return _cached(dataset, slots, moments)
    if isinstance(dataset, HoldsLatents):
        held = [dataset.moments(slot.index) for slot in slots]
        found = [each for each in held if each is not None]
        if found and len(found) < len(held):
            raise ValueError(
                "shards of latents and of pictures are in one batch; train on one kind, or make "
                "latents of all by `data build recipe=... out=...`"
            )
        if found:
            return torch.cat(found)
    return stored


def _cached(dataset: Dataset, slots: Sequence[Slot], moments: Latents) -> Tensor:
    """The moments of the slots' samples from the cache, in fp32."""
    shrinks = moments.shrinks if isinstance(moments, Latents) else 1
    spans = [rows(dataset, slot.index, shrinks) for slot in slots]
    return torch.from_numpy(np.concatenate([moments[span] for span in spans])).float()


def _fill(batch: Batch, samples: Sequence[Sample]) -> None:
    """Puts the samples' pictures, captions, masks and extra inputs into the batch."""
    batch.pixels = _together([sample.image for sample in samples])
    batch.captions = [sample.caption for sample in samples]
    batch.keys = [sample.key for sample in samples]
    batch.masks = _stacked([sample.mask for sample in samples])
    first = samples[0]
    for sample in samples[1:]:
        if sample.inputs.keys() != first.inputs.keys():
            raise ValueError(
                f"{first.key} has the extra inputs {sorted(first.inputs) or 'none'} and "
                f"{sample.key} {sorted(sample.inputs) or 'none'}; give every sample the same"
            )
    batch.inputs = {
        name: torch.stack([sample.inputs[name] for sample in samples]) for name in first.inputs
    }


def _together(images: Sequence[Tensor]) -> Tensor:
    """Images and clips one behind another (b * frames, 3, H, W). Of bytes the channels stay
    adjacent, as they are in a picture: to bring them apart here would take as long as to decode."""
    if images[0].dtype != torch.uint8:
        return torch.cat([frames_of(image) for image in images])
    _, height, width = images[0].shape
    found = torch.empty((len(images), height, width, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    for place, image in enumerate(images):
        found[place] = image
    return found


def _stacked(masks: Sequence[Tensor | None]) -> Tensor | None:
    """The masks of a batch (b, 1, h, w), all ones for samples without one; None without any."""
    found = [mask for mask in masks if mask is not None]
    if not found:
        return None
    return torch.stack([torch.ones_like(found[0]) if mask is None else mask for mask in masks])


class Batches(DataLoader[Any]):
    """Data workers ignore the signals that end the whole job, also while they start: the trainer
    acts on the signal, and needs its batches until then."""

    def __iter__(self) -> Any:
        if not self.num_workers or not hasattr(signal, "pthread_sigmask"):  # as on Windows
            return super().__iter__()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, CODES)  # a new process inherits it
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _calm(worker: int) -> None:
    """A data worker ignores SIGINT and SIGUSR1, and ends `SPARED` seconds after a SIGTERM."""
    return_to_all()
    for number in CODES:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):  # on Windows a worker is ended without a signal
        signal.signal(signal.SIGTERM, _end_later)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, CODES)


def _end_later(number: int, frame: FrameType | None) -> None:
    signal.alarm(SPARED)


def loader(items: TorchDataset[Batch], total: int, start: int, workers: int) -> Batches:
    """Micro-batches `start` to `total - 1` in order; the number of workers changes nothing in
    them."""
    return Batches(
        items,
        batch_size=None,
        sampler=Cursor(total, start),
        num_workers=workers,
        persistent_workers=False,
        multiprocessing_context="spawn" if workers else None,
        worker_init_fn=_calm,
    )
