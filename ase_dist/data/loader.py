"""The loaders of a run, built from its settings: what is read, by which rank, how far ahead."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch

from ase_dist.config import DataSettings, Settings
from ase_dist.data.batch import Batch, EvalBatch, collate, collate_eval
from ase_dist.data.dataset import RecordDataset, data_fingerprint
from ase_dist.data.mixed import Member, MixedDataset
from ase_dist.data.packed.dataset import PackedDataset
from ase_dist.data.packed.layout import is_packed
from ase_dist.data.prefetch import CPU, Draws, Prefetcher
from ase_dist.data.readers import reader_of
from ase_dist.data.sampler import EvalSampler, MixedSampler, ResumableSampler, TrainSampler
from ase_dist.data.transforms import Transform
from ase_dist.errors import RunError, UserError
from ase_dist.image_size import ImageSize
from ase_dist.seeding import derive_seed
from ase_dist.tasks import Task

__all__ = [
    "EvalLoader",
    "TrainLoader",
    "build_eval_loader",
    "build_train_loader",
    "data_fingerprint",
    "first_images",
    "open_dataset",
]

LOGGER = logging.getLogger("ase_dist")
Split = Literal["train", "val"]


class TrainLoader:
    """An endless iterator over Batch.

    Its state counts the batches that the loop has taken, not those prepared ahead. ``close`` ends the background
    thread or the loader processes.
    """

    def __init__(self, dataset: RecordDataset, sampler: TrainSampler[Any], prefetcher: Prefetcher[Batch]) -> None:
        self.dataset = dataset
        self._sampler = sampler
        self._prefetcher = prefetcher
        self._stream: Generator[Batch, None, None] | None = None

    @property
    def failure(self) -> UserError | RunError | None:
        """Why the loader processes are gone, where they are: the run is to save and end with it."""
        return self._prefetcher.failure

    @property
    def epoch(self) -> int:
        """The epoch that the next image belongs to."""
        return self._sampler.epoch

    @property
    def steps_per_epoch(self) -> int:
        """Batches that every rank takes in an epoch, rounded up."""
        return self._sampler.steps_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._stream is None:
            self._stream = iter(self._prefetcher)
        try:
            batch = next(self._stream)
        except Exception:
            self._stop_stream()  # a generator that has raised is over; another try reads the same batch again
            raise
        self._sampler.advance()
        return batch

    def state_dict(self) -> dict[str, Any]:
        """As TrainSampler's: equal on all ranks, and valid at any number of them."""
        return self._sampler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at ``state``; what was prepared ahead is thrown away. UserError as TrainSampler's."""
        self._stop_stream()
        self._sampler.load_state_dict(state)

    def close(self) -> None:
        """End the background thread or processes; the next batch would start them again at the same place."""
        self._stop_stream()
        self._prefetcher.close()

    def _stop_stream(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None


class EvalLoader:
    """One pass per iteration over this rank's share, with the same number of batches on every rank."""

    def __init__(
        self,
        dataset: RecordDataset,
        sampler: EvalSampler,
        prefetcher: Prefetcher[EvalBatch],
        *,
        empty: Callable[[], EvalBatch],
    ) -> None:
        self.dataset = dataset
        self._sampler = sampler
        self._prefetcher = prefetcher
        self._empty = empty

    def __len__(self) -> int:
        return len(self._sampler)

    @property
    def failure(self) -> UserError | RunError | None:
        """As TrainLoader's."""
        return self._prefetcher.failure

    def __iter__(self) -> Iterator[EvalBatch]:
        return iter(self._prefetcher)

    def until_error(self) -> Iterator[tuple[EvalBatch, Exception | None]]:
        """The batches, each with None; instead of one that cannot be read an empty one with the error, the last."""
        try:
            for batch in self._prefetcher:
                yield batch, None
        except Exception as error:
            yield self._empty(), error

    def close(self) -> None:
        """End the loader processes."""
        self._prefetcher.close()


def open_dataset(settings: Settings, tasks: tuple[Task, ...], *, split: Split) -> RecordDataset:
    """The data set that ``settings`` names, from a folder or packed; generated scenes are made first where need be.

    Raises UserError where files are missing (see FolderDataset and PackedDataset).
    """
    data = settings.data
    if data.sets:
        return _open_sets(data, tasks, split=split)
    return _open_one(data, tasks, split=split)


def _open_sets(data: DataSettings, tasks: tuple[Task, ...], *, split: Split) -> MixedDataset:
    """The data sets that are for ``split`` and have one of ``tasks``, as one."""
    wanted = {task.name for task in tasks}
    members = []
    for each, joined in zip(data.sets, data.joined_tasks(), strict=True):
        names = {own: task.name for own, task in joined.items() if task.name in wanted}
        if names and each.split in ("both", split):
            own_tasks = tuple(each.data_set.table[own] for own in names)
            members.append(Member(each.title, _open_one(data.of_set(each), own_tasks, split=split), names))
    if not members:
        raise UserError(f"data.sets: none of {data.name} is for {split} and has a label of {', '.join(sorted(wanted))}")
    return MixedDataset(split, tasks, members)


def _open_one(data: DataSettings, tasks: tuple[Task, ...], *, split: Split) -> RecordDataset:
    reader = reader_of(data.data_set)
    root = reader.place(data)
    limit = data.limit_train if split == "train" else data.limit_val
    if root is not None and is_packed(root):
        return PackedDataset(
            root,
            split,
            tasks,
            data=data.name,
            description=data.description,
            limit=limit,
            cache_in_memory=data.cache_in_memory,
            partial=data.partial,
        )
    return reader(
        root,
        split,
        tasks,
        limit=limit,
        cache_in_memory=data.cache_in_memory,
        partial=data.partial,
        offered=data.data_set.table.values(),
    )


def build_train_loader(
    settings: Settings, tasks: tuple[Task, ...], *, rank: int, world_size: int, device: torch.device = CPU
) -> TrainLoader:
    """The training batches of one rank, for its ``device`` (``Prefetcher``); ``world_size`` ranks share the data."""
    dataset = open_dataset(settings, tasks, split="train")
    place = {"batch_size": settings.train.batch_size, "rank": rank, "world_size": world_size, "seed": settings.seed}
    sampler: TrainSampler[Any] = ResumableSampler(len(dataset), **place)
    if isinstance(dataset, MixedDataset):
        by_title = {each.title: each.weight for each in settings.data.sets}
        weights = [weight for title in dataset.lengths if (weight := by_title[title]) is not None]
        sampler = MixedSampler(dataset.lengths, weights or None, **place)
    transform = Transform(settings.data.size, tasks=tasks, augmentation=settings.data.augmentation)
    if rank == 0 and any(task.kind == "normals" for task in tasks) and not transform.augmentation.zooms_normals:
        LOGGER.info(
            "data.augmentation=%s leaves normals as they are where it zooms, as its published protocol does; with "
            "eigen they agree with depth",
            settings.data.augmentation,
        )
    if rank == 0:
        _warn_of_swapped_sides(dataset, settings.data.size)
    fetch = _TrainFetch(dataset, transform, seed=settings.seed)
    prefetcher = Prefetcher(fetch, plan=sampler.upcoming, workers=settings.data.workers, device=device)
    return TrainLoader(dataset, sampler, prefetcher)


def _warn_of_swapped_sides(dataset: RecordDataset, size: ImageSize) -> None:
    """One sentence where ``data.size`` is higher than wide and the first images are wider than high, or the reverse."""
    if size.is_square:
        return
    shapes = [dataset[index].image.shape[:2] for index in range(min(3, len(dataset)))]
    if shapes and all((height - width) * (size.height - size.width) < 0 for height, width in shapes):
        LOGGER.warning(
            "data.size: got %d high and %d wide, but the first images are %d high and %d wide, so all are squeezed; "
            "height comes first: perhaps data.size=%s is meant",
            *size,
            *shapes[0],
            ImageSize(size.width, size.height),
        )


def build_eval_loader(
    settings: Settings,
    tasks: tuple[Task, ...],
    *,
    rank: int,
    world_size: int,
    split: Split = "val",
    device: torch.device = CPU,
) -> EvalLoader:
    """The evaluation batches of one rank: each image on exactly one rank, batches of the same number on all."""
    dataset = open_dataset(settings, tasks, split=split)
    return _eval_loader(dataset, settings, range(len(dataset)), rank=rank, world_size=world_size, device=device)


def first_images(loader: TrainLoader, settings: Settings, *, limit: int, rank: int, world_size: int) -> EvalLoader:
    """One pass over the first ``limit`` training images of every task that have a label of it, for the CPU.

    What it decodes is kept for ``loader``.
    """
    dataset = loader.dataset
    chosen: set[int] = set()
    for task in dataset.tasks:
        labelled = (i for i in range(len(dataset)) if dataset.has_label(i, task.name))
        chosen.update(itertools.islice(labelled, limit))
    images = sorted(chosen)
    return _eval_loader(loader.dataset, settings, images, rank=rank, world_size=world_size, device=CPU)


def _eval_loader(
    dataset: RecordDataset,
    settings: Settings,
    images: Sequence[int],
    *,
    rank: int,
    world_size: int,
    device: torch.device,
) -> EvalLoader:
    batch_size = settings.eval.batch_size or settings.train.batch_size
    sampler = EvalSampler(len(images), batch_size=batch_size, rank=rank, world_size=world_size)
    fetch = _EvalFetch(dataset, Transform(settings.data.size, tasks=dataset.tasks, augmentation="none"), images)
    prefetcher = Prefetcher(fetch, plan=sampler.__iter__, workers=settings.data.workers, device=device)
    return EvalLoader(dataset, sampler, prefetcher, empty=lambda: fetch([]))


class _TrainFetch:
    """Draws to a Batch; sent to the loader processes, so it holds no open file and no thread."""

    def __init__(self, dataset: RecordDataset, transform: Transform, *, seed: int) -> None:
        self._dataset = dataset
        self._transform = transform
        self._seed = seed

    def __call__(self, draws: Draws) -> Batch:
        samples = []
        for draw in draws:
            record, title = self._dataset[draw.image], self._dataset.set_of(draw.image)
            seed = derive_seed(self._seed, "set", title) if title else self._seed  # an image has its set's augmentation
            sample = self._transform.train_sample(record, seed=seed, epoch=draw.epoch)
            samples.append(replace(sample, index=draw.image))
        return collate(samples, [task.name for task in self._dataset.tasks])


class _EvalFetch:
    """Draws of places in ``images``, which are indices of ``dataset``, to an EvalBatch."""

    def __init__(self, dataset: RecordDataset, transform: Transform, images: Sequence[int]) -> None:
        self._dataset = dataset
        self._transform = transform
        self._images = images

    def __call__(self, draws: Draws) -> EvalBatch:
        images = [self._images[draw.image] for draw in draws]
        samples = [replace(self._transform.eval_sample(self._dataset[image]), index=image) for image in images]
        return collate_eval(samples, [task.name for task in self._dataset.tasks], size=self._transform.size)
