"""Reading training samples: images a second on one core, from a folder of files and packed.

    python benchmarks/data.py [--data PASCAL_MT --tasks A,B] [--images 64] [--json out.json] [--plot out.png]

Without ``--data`` a folder in the layout of PASCAL_MT is generated: 500 x 375 pixels, labels as MATLAB structs of a
person with 24 parts. A sample is an image and its labels read, decoded, and warped to 224 x 224. What is measured is
the processor's time with all files in the system's memory, not the disk's; the sides take turns; medians are printed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from _timing import write_report
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from scipy.io import savemat

from ase_dist.data.dataset import RecordDataset
from ase_dist.data.decode import PART_IDS
from ase_dist.data.packed.dataset import PackedDataset
from ase_dist.data.packed.layout import Pictures
from ase_dist.data.packed.prepare import Request, prepare
from ase_dist.data.pascal_context import PascalContext
from ase_dist.data.transforms import Transform
from ase_dist.files import replacing
from ase_dist.tasks import Task, select_tasks

SIZE = 224
SHAPE = (375, 500)
PARTS = ("image", "labels", "augment")


@dataclass(frozen=True)
class Row:
    """One line of the table: milliseconds per image, in all and by part, and bytes per image on disk."""

    name: str
    total: float
    image: float
    labels: float
    augment: float
    kilobytes: float


def main() -> None:
    """Pack, time all three, print the table, write JSON and the plot when asked."""
    arguments = _parse()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        root = arguments.data or _generated(Path(scratch) / "PASCAL_MT", arguments.images)
        tasks = select_tasks("pascal_context", arguments.tasks and arguments.tasks.split(","))
        rows = _measure(_sides(root, tasks, arguments, Path(scratch)), arguments.repeats)
    _print(rows, arguments)
    write_report(arguments.json, arguments, milliseconds_per_image=[asdict(row) for row in rows])
    if arguments.plot:
        _draw(rows, arguments.plot)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder in PASCAL_MT layout; generated without it")
    parser.add_argument("--tasks", help="those that the folder has labels for, comma-separated (default: all five)")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--plot", type=Path, help="draw the time by part")
    return parser.parse_args()


# ---------------------------------------------------------------------------------------------------------------------
# The sides, each as (data set with every label, data set with the images only, kilobytes per image)

Side = tuple[RecordDataset, RecordDataset, float]


def _sides(root: Path, tasks: tuple[Task, ...], arguments: argparse.Namespace, scratch: Path) -> dict[str, Side]:
    limit = arguments.images
    folder = PascalContext(root, "train", tasks, limit=limit)
    files = {path for name in folder.names for path in (root / f"JPEGImages/{name}.jpg", *folder.label_paths(name))}
    sides: dict[str, Side] = {
        "folder of files": (
            folder,
            PascalContext(root, "train", (), limit=limit),
            sum(path.stat().st_size for path in files) / 1e3 / len(folder),
        )
    }
    names = tuple(task.name for task in tasks)
    for pictures, name in (("files", "packed, --pictures files"), ("pixels", "packed")):
        sides[name] = _packed(root, tasks, names, pictures, scratch / pictures, limit)
    return sides


def _packed(
    root: Path, tasks: tuple[Task, ...], names: tuple[str, ...], pictures: Pictures, out: Path, limit: int
) -> Side:
    place = prepare(Request("pascal_context", root, names, pictures, subset=True), out)
    whole, bare = (PackedDataset(place, "train", some, data="pascal_context", limit=limit) for some in (tasks, ()))
    everything = PackedDataset(place, "train", (), data="pascal_context")
    return whole, bare, sum(path.stat().st_size for path in place.glob("train-*")) / 1e3 / len(everything)


# ---------------------------------------------------------------------------------------------------------------------
# Timing


def _measure(sides: dict[str, Side], repeats: int) -> list[Row]:
    """Medians over repeats of the mean over images; every repeat times every side."""
    times: dict[str, list[tuple[float, ...]]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, (whole, bare, _) in sides.items():
            seconds = _pass(whole, bare)
            if repeat:  # the first brings the files into memory
                times[name].append(seconds)
    return [
        Row(name, *(statistics.median(column) for column in zip(*times[name], strict=True)), sides[name][2])
        for name in sides
    ]


def _pass(whole: RecordDataset, bare: RecordDataset) -> tuple[float, ...]:
    """Milliseconds per image: a sample, and of it the image's part, the labels' and the augmentation's."""
    transform = Transform(SIZE, tasks=whole.tasks, augmentation="astmt")
    count = len(whole)
    sample = _timed(lambda i: transform.train_sample(whole[i], seed=0, epoch=0), count)
    record = _timed(lambda i: whole[i], count)
    image = _timed(lambda i: bare[i], count)
    return sample, image, record - image, sample - record


def _timed(work: Callable[[int], object], count: int) -> float:
    start = time.process_time()
    for i in range(count):
        work(i)
    return 1e3 * (time.process_time() - start) / count


# ---------------------------------------------------------------------------------------------------------------------
# Output


def _print(rows: list[Row], arguments: argparse.Namespace) -> None:
    source = f"images of {arguments.data.name}" if arguments.data else f"generated images of {SHAPE[1]} x {SHAPE[0]}"
    print(
        f"{arguments.images} {source} to {SIZE} x {SIZE}, 1 core, medians of {arguments.repeats}\n"
        f"{'':26}{'images/s':>10}{'ms':>8}{'image':>8}{'labels':>8}{'augment':>9}{'kB/image':>10}{'times faster':>14}"
    )
    for row in rows:
        parts = f"{row.image:8.2f}{row.labels:8.2f}{row.augment:9.2f}"
        ratio = rows[0].total / row.total
        print(f"{row.name:26}{1e3 / row.total:10.0f}{row.total:8.2f}{parts}{row.kilobytes:10.0f}{ratio:14.1f}")


def _draw(rows: list[Row], path: Path) -> None:
    figure = Figure(figsize=(7, 2.2), layout="constrained")
    axes = figure.subplots()
    left = np.zeros(len(rows))
    for part in PARTS:
        widths = np.array([getattr(row, part) for row in rows])
        axes.barh([row.name for row in rows], widths, left=left, label=part)
        left += widths
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds per image on one core")
    axes.legend(frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix.removeprefix(".") or "png", dpi=150)


# ---------------------------------------------------------------------------------------------------------------------
# Images


def _generated(root: Path, count: int) -> Path:
    """A folder in PASCAL_MT layout: photographs' sizes and detail, label maps with wavy borders."""
    folders = ("JPEGImages", "semseg/VOC12", "human_parts", "sal_distill", "normals_distill", "pascal-context/trainval")
    for folder in (*folders, "ImageSets/Context"):
        (root / folder).mkdir(parents=True)
    names = [f"2008_{i:06d}" for i in range(count + 1)]
    for i, name in enumerate(names):
        _write_image(root, name, np.random.default_rng(i))
    for split, some in (("train", names[:-1]), ("val", names[-1:])):
        (root / f"ImageSets/Context/{split}.txt").write_text("\n".join(some) + "\n")
    return root


def _write_image(root: Path, name: str, rng: np.random.Generator) -> None:
    regions = _regions(rng, 25)
    ids = rng.integers(1, 460, 25)[regions]
    colors = rng.uniform(30, 220, (25, 3))[regions] + 12 * rng.standard_normal((*SHAPE, 1))
    _save(colors + 40 * _smooth(rng, 2, 3), root / f"JPEGImages/{name}.jpg", quality=90)
    _save(ids % 21, root / f"semseg/VOC12/{name}.png")
    _save(255 * (regions < 6) * np.clip(_smooth(rng, 10, 1)[..., 0] + 1, 0, 1), root / f"sal_distill/{name}.png")
    normals = _smooth(rng, 25, 3) + 0.7 * rng.standard_normal((25, 3))[regions]
    _save(127.5 * (1 + normals / np.linalg.norm(normals, axis=-1, keepdims=True)), root / f"normals_distill/{name}.png")
    savemat(root / f"pascal-context/trainval/{name}.mat", {"LabelMap": ids.astype(np.uint16)}, do_compression=True)
    savemat(root / f"human_parts/{name}.mat", {"anno": _person(name, _regions(rng, 60))}, do_compression=True)


def _person(name: str, regions: NDArray[np.int64]) -> NDArray[np.void]:
    """The struct of PASCAL-Part with one person of 24 parts."""
    parts = _struct(part_name=list(PART_IDS), mask=[(regions == i).astype(np.uint8) for i in range(len(PART_IDS))])
    mask = (regions < len(PART_IDS)).astype(np.uint8)
    objects = _struct(**{"class": ["person"], "class_ind": [15], "mask": [mask], "parts": [parts]})
    return _struct(imname=[name], objects=[objects])


def _struct(**fields: list[object]) -> NDArray[np.void]:
    rows = list(zip(*fields.values(), strict=True))
    array = np.empty((1, len(rows)), dtype=[(field, object) for field in fields])
    for i, row in enumerate(rows):
        array[0, i] = row
    return array


def _regions(rng: np.random.Generator, count: int) -> NDArray[np.int64]:
    """[H, W] of 0..count - 1: which of ``count`` points is nearest, seen through a wave."""
    points = rng.uniform((0, 0), SHAPE, size=(count, 2))
    pixels = np.stack(np.indices(SHAPE), axis=-1) + 6 * _smooth(rng, 6, 2)
    nearest: NDArray[np.int64] = np.stack([((pixels - point) ** 2).sum(-1) for point in points]).argmin(0)
    return nearest


def _smooth(rng: np.random.Generator, scale: float, channels: int) -> NDArray[np.float64]:
    """Noise [H, W, channels] of deviation 1, smooth over ``scale`` pixels."""
    noise = ndimage.gaussian_filter(rng.standard_normal((*SHAPE, channels)), (scale, scale, 0))
    normed: NDArray[np.float64] = noise / noise.std()
    return normed


def _save(values: NDArray[np.float64], path: Path, **options: int) -> None:
    Image.fromarray(np.clip(values, 0, 255).astype(np.uint8)).save(path, **options)


if __name__ == "__main__":
    main()
