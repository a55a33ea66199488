"""Boundary F: time and agreement of ``ase_dist.evaluation.boundary`` and of pyEdgeEval, on the same images.

    python benchmarks/boundary.py [--images 16] [--annotators 1] [--data PASCAL_MT] [--json out.json]

Without ``--data`` the label maps are generated; with it they are read from ``pascal-context/trainval/*.mat``. Ground
truths are the thinned borders of the label maps; predictions are the borders of a warped map, blurred, with noise.
pyEdgeEval is timed where it is installed (``pip install pyEdgeEval``, which compiles the published matcher).
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from _timing import write_report
from numpy.typing import NDArray
from scipy import ndimage
from scipy.io import loadmat
from skimage.morphology import thin

from ase_dist.evaluation.boundary import evaluate_boundaries, threshold_values

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
LAPLACIAN = np.array([[0, 1, 0], [1, -4, 1], [0, 1, 0]])


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    seconds: float
    ods_f: float
    ois_f: float


def main() -> None:
    """Time both on one core and on all, print the table, write JSON when asked."""
    arguments = _parse()
    samples = [_sample(labels, arguments.annotators, seed=i) for i, labels in enumerate(_label_maps(arguments))]
    cores = os.cpu_count() or 1
    rows = [
        _timed("ours, 1 core", lambda: _ours(samples, arguments, workers=1)),
        _timed(f"ours, {cores} cores", lambda: _ours(samples, arguments, workers=cores)),
    ]
    if importlib.util.find_spec("pyEdgeEval"):
        rows.append(_timed("pyEdgeEval, 1 core", lambda: _theirs(samples, arguments, processes=1)))
        rows.append(_timed(f"pyEdgeEval, {cores} cores", lambda: _theirs(samples, arguments, processes=cores)))
    _print(rows, arguments)
    write_report(arguments.json, arguments, rows=[vars(row) for row in rows])


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--annotators", type=int, default=1)
    parser.add_argument("--thresholds", type=int, default=99)
    parser.add_argument("--nms", action="store_true")
    parser.add_argument("--data", type=Path, help="a folder in PASCAL_MT layout; generated label maps without it")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    return parser.parse_args()


# ---------------------------------------------------------------------------------------------------------------------
# Images


def _label_maps(arguments: argparse.Namespace) -> list[NDArray[np.int64]]:
    if arguments.data is None:
        return [_generated_labels(np.random.default_rng(seed)) for seed in range(arguments.images)]
    files = sorted((arguments.data / "pascal-context" / "trainval").glob("*.mat"))[: arguments.images]
    return [loadmat(str(file))["LabelMap"].astype(np.int64) for file in files]


def _generated_labels(rng: np.random.Generator, *, height: int = 240, width: int = 320) -> NDArray[np.int64]:
    """Regions nearest to random points: a map of 40 labels with straight borders, which the caller may warp."""
    points = rng.uniform((0, 0), (height, width), size=(40, 2))
    pixels = np.stack(np.indices((height, width)), axis=-1)[:, :, None]
    nearest: NDArray[np.int64] = ((pixels - points) ** 2).sum(axis=-1).argmin(axis=-1)
    return nearest


def _sample(labels: NDArray[np.int64], annotators: int, *, seed: int) -> tuple[Array, list[Mask]]:
    """A prediction and its ground truths; further annotators draw slightly other borders."""
    rng = np.random.default_rng(seed)
    truths = [_borders(labels)] + [_borders(_warp(labels, rng, pixels=1.5)) for _ in range(annotators - 1)]
    blurred = ndimage.gaussian_filter(_borders(_warp(labels, rng, pixels=1.5)).astype(float), 1.5)
    prediction = blurred / max(blurred.max(), 1e-9) + 0.15 * _noise(rng, labels.shape, scale=1.5)
    return np.clip(prediction, 0, 1), truths


def _borders(labels: NDArray[np.int64]) -> Mask:
    borders: Mask = thin(ndimage.correlate(labels.astype(float), LAPLACIAN, mode="nearest") != 0)
    return borders


def _warp(labels: NDArray[np.int64], rng: np.random.Generator, *, pixels: float) -> NDArray[np.int64]:
    grid = np.indices(labels.shape, dtype=float)
    grid += pixels * np.stack([_noise(rng, labels.shape, scale=12) for _ in range(2)])
    warped: NDArray[np.int64] = ndimage.map_coordinates(labels, grid, order=0, mode="nearest")
    return warped


def _noise(rng: np.random.Generator, shape: tuple[int, ...], *, scale: float) -> Array:
    smooth = ndimage.gaussian_filter(rng.standard_normal(shape), scale)
    normed: Array = smooth / smooth.std()
    return normed


# ---------------------------------------------------------------------------------------------------------------------
# The two implementations


def _ours(
    samples: list[tuple[Array, list[Mask]]], arguments: argparse.Namespace, *, workers: int
) -> tuple[float, float]:
    predictions, truths = zip(*samples, strict=True)
    scores = evaluate_boundaries(
        predictions, truths, thresholds=arguments.thresholds, nms=arguments.nms, workers=workers
    )
    return scores.ods_f, scores.ois_f


def _theirs(
    samples: list[tuple[Array, list[Mask]]], arguments: argparse.Namespace, *, processes: int
) -> tuple[float, float]:
    """Their counts per image and their summary; images over a pool of processes exactly as their evaluators do it."""
    from pyEdgeEval.common.metrics import compute_rec_prec_f1, interpolated_max_scores

    jobs = [(threshold_values(arguments.thresholds), *sample, arguments.nms) for sample in samples]
    if processes == 1:
        counts = np.array([_their_counts(job) for job in jobs])
    else:
        with multiprocessing.Pool(processes) as pool:
            counts = np.array(list(pool.imap(_their_counts, jobs)))
    recall, precision, _ = compute_rec_prec_f1(*counts.sum(axis=0))
    best = [image[:, np.argmax(compute_rec_prec_f1(*image)[2])] for image in counts]
    ods = interpolated_max_scores(jobs[0][0], recall, precision)[3]
    return float(ods), float(compute_rec_prec_f1(*np.sum(best, axis=0))[2])


def _their_counts(job: tuple[Array, Array, list[Mask], bool]) -> tuple[Array, ...]:
    from pyEdgeEval.common.binary_label import evaluate_boundaries_threshold_multiple_gts

    thresholds, prediction, truths, nms = job
    counts: tuple[Array, ...] = evaluate_boundaries_threshold_multiple_gts(
        thresholds, prediction, truths, apply_thinning=True, apply_nms=nms
    )
    return counts


# ---------------------------------------------------------------------------------------------------------------------
# Output


def _timed(name: str, run: Callable[[], tuple[float, float]]) -> Row:
    start = time.perf_counter()
    ods_f, ois_f = run()
    return Row(name, time.perf_counter() - start, ods_f, ois_f)


def _print(rows: list[Row], arguments: argparse.Namespace) -> None:
    source = "real" if arguments.data else "generated"
    print(
        f"{arguments.images} {source} images, {arguments.annotators} annotator(s), {arguments.thresholds} thresholds\n"
        f"{'':22}{'seconds':>9}{'ms/image':>10}{'odsF':>9}{'oisF':>9}{'times faster':>14}"
    )
    for i, row in enumerate(rows):
        ratio = f"{rows[i + 2].seconds / row.seconds:14.1f}" if i + 2 < len(rows) else " " * 14
        per_image = 1e3 * row.seconds / arguments.images
        print(f"{row.name:22}{row.seconds:9.2f}{per_image:10.1f}{row.ods_f:9.4f}{row.ois_f:9.4f}{ratio}")
    if len(rows) == 2:
        print("pyEdgeEval is not installed: nothing to compare with")


if __name__ == "__main__":
    main()
