"""The boundary metric streams what ``evaluate_boundaries`` counts at once, and adds it to the cross-entropy."""

import math
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from ase_dist.evaluation.boundary import evaluate_boundaries
from ase_dist.evaluation.metrics import EdgeOds, build_metric
from ase_dist.evaluation.ods import SCORES, BoundaryMetric
from ase_dist.files import wait_until
from ase_dist.tasks import IGNORE

from .conftest import TASK_OF_KIND, generated_samples

pytestmark = pytest.mark.single_gpu
EDGES = TASK_OF_KIND["edges"]


def images(count):
    """(prediction, label) of generated images, as the evaluation has them."""
    predictions, truths = generated_samples(count)
    return [
        (torch.from_numpy(p).float(), torch.from_numpy(t[0].astype(np.uint8)))
        for p, t in zip(predictions, truths, strict=True)
    ]


def scored(pairs, device, **options):
    metric = build_metric(EDGES, edge_ods=EdgeOds(**options))
    for prediction, label in pairs:
        metric.update(prediction.to(device), label.to(device))
    metric.finish()
    return metric


@pytest.mark.parametrize("nms", [False, True])
def test_equals_evaluate_boundaries(nms, device):
    pairs = images(3)
    found = scored(pairs, device, nms=nms, workers=0).result()
    expected = evaluate_boundaries([p.numpy() for p, _ in pairs], [[y.numpy() == 1] for _, y in pairs], nms=nms)
    for name in SCORES:
        assert found[name] == pytest.approx(getattr(expected, name) * (1 if name == "ods_threshold" else 100))
    plain = build_metric(EDGES)
    for prediction, label in pairs:
        plain.update(prediction.to(device), label.to(device))
    assert {name: found[name] for name in ("bce", "edge_share")} == plain.result()


@pytest.mark.parametrize("tolerance", [0.0075, 0.011])
def test_the_tolerance_is_the_tasks(tolerance):
    pairs = images(2)
    metric = build_metric(replace(EDGES, tolerance=tolerance), edge_ods=EdgeOds(workers=0))
    for prediction, label in pairs:
        metric.update(prediction, label)
    metric.finish()
    maps = [p.numpy() for p, _ in pairs], [[y.numpy() == 1] for _, y in pairs]
    expected, lenient = (evaluate_boundaries(*maps, max_dist=share, workers=0) for share in (tolerance, 0.05))
    assert metric.result()["ods_f"] == pytest.approx(100 * expected.ods_f)
    assert lenient.ods_f > expected.ods_f + 0.01  # so it matters on these images


def test_processes_and_ranks_change_no_bit(device):
    pairs = images(5)
    whole = scored(pairs, device, workers=0).totals[3:]
    assert torch.equal(scored(pairs, device, workers=2).totals[3:], whole)
    parts = [scored(part, device, workers=0).totals[3:] for part in (pairs[3:], pairs[1:3], pairs[:1])]
    assert torch.equal(parts[0] + parts[1] + parts[2], whole)


def test_ignored_pixels_are_neither_true_nor_predicted(device):
    (prediction, label), (other, _) = images(2)
    ignored = torch.zeros_like(label, dtype=torch.bool)
    ignored[:, 60:] = True
    hidden = torch.where(ignored, 0, prediction), torch.where(ignored, 0, label)
    marked = (prediction, torch.where(ignored, IGNORE, label))
    assert torch.equal(scored([marked], device, workers=0).totals[3:], scored([hidden], device, workers=0).totals[3:])
    nowhere = (other, torch.full_like(label, IGNORE))
    assert torch.equal(scored([marked, nowhere], device, workers=0).totals[3:],
                       scored([marked], device, workers=0).totals[3:])  # fmt: skip


def test_nothing_counted_is_no_score(device):
    prediction, label = images(1)[0]
    metric = scored([(prediction, torch.full_like(label, IGNORE))], device, workers=0)
    assert all(math.isnan(metric.result()[name]) for name in SCORES)


def test_a_killed_process_loses_no_count(caplog):
    """What waits is counted here, and so is the rest: an evaluation is not lost to the system's want of memory."""
    pairs = images(7)
    expected = scored(pairs, torch.device("cpu"), workers=0).totals
    metric = build_metric(EDGES, edge_ods=EdgeOds(workers=2))
    for i, (prediction, label) in enumerate(pairs):
        metric.update(prediction, label)
        if i == 2:
            pool, deadline = metric._counter.pool, time.monotonic() + 60
            while len(pool.processes) < 2 and time.monotonic() < deadline:
                time.sleep(0.01)
            for process in pool.processes:
                process.kill()
    metric.finish()
    assert torch.equal(metric.totals, expected)
    assert [record.message for record in caplog.records] == [
        "a worker process ended early (exit code -9), perhaps because memory ran out; counting boundaries goes on in "
        "this one, more slowly"
    ]


def test_closing_ends_the_processes_without_their_counts():
    metric = build_metric(EDGES, edge_ods=EdgeOds(workers=2))
    for prediction, label in images(3):
        metric.update(prediction, label)
    pool = metric._counter.pool
    assert wait_until(lambda: any(process.poll() is None for process in pool.processes), patience=60)
    processes = list(pool.processes)
    metric.close()
    assert all(process.poll() is not None for process in processes)
    assert not metric.totals[3:].any()


def test_only_edges_are_scored_so():
    assert isinstance(build_metric(EDGES, edge_ods=EdgeOds()), BoundaryMetric)
    for kind in ("classes", "mask", "normals", "depth"):
        task = TASK_OF_KIND[kind]
        assert type(build_metric(task, edge_ods=EdgeOds())) is type(build_metric(task))
