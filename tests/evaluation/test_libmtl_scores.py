"""The scores of balancing papers as LibMTL counts them, written out slowly from its definitions; its Delta_p."""

import numpy as np
import pytest
import torch

from ase_dist.evaluation.comparison import Reference, compare
from ase_dist.evaluation.delta_m import delta_p
from ase_dist.evaluation.metrics import build_metric
from ase_dist.tasks import DATA_SETS, LIBMTL_SCORES

pytestmark = pytest.mark.single_gpu
NYU = DATA_SETS["nyuv2_13"].tasks
CITY = DATA_SETS["cityscapes"].tasks


def scored(task, pairs):
    metric = build_metric(task)
    for prediction, label in pairs:
        metric.update(prediction, label)
    return metric.result()


@pytest.mark.parametrize("task", [NYU["semseg"], CITY["semseg"]], ids=["13", "7"])
def test_miou_and_pixel_accuracy(task):
    rng = np.random.default_rng(0)
    labels = [rng.integers(0, task.channels + 1, (6, 9 + i)) for i in range(3)]
    labels = [np.where(label == task.channels, 255, label) for label in labels]
    predictions = [
        np.where(rng.random(label.shape) < 0.6, label % 255, rng.integers(0, task.channels, label.shape))
        for label in labels
    ]
    table = np.zeros((task.channels, task.channels))
    for label, prediction in zip(labels, predictions, strict=True):
        for true, found in zip(label.ravel(), prediction.ravel(), strict=True):
            if true != 255:
                table[true, found] += 1
    union = table.sum(0) + table.sum(1) - np.diag(table)
    result = scored(
        task,
        [
            (torch.from_numpy(p.astype(np.uint8)), torch.from_numpy(y.astype(np.uint8)))
            for p, y in zip(predictions, labels, strict=True)
        ],
    )
    assert result["miou"] == pytest.approx(100 * np.mean(np.diag(table) / union))
    assert result["accuracy"] == pytest.approx(100 * np.trace(table) / table.sum())


@pytest.mark.parametrize("task", [NYU["depth"], CITY["depth"]], ids=["depth", "disparity"])
def test_depth_errors_are_means_over_all_valid_pixels(task):
    """The mean of each image's errors weighted by its valid pixels, as LibMTL has it, is the mean over all pixels."""
    rng = np.random.default_rng(1)
    labels = [rng.uniform(0.1, 5, (1, 5, 4 + 3 * i)).astype(np.float32) for i in range(3)]
    for i, label in enumerate(labels):
        label[:, : i + 1] = 0
    predictions = [(label + rng.normal(0, 0.3, label.shape)).astype(np.float32) for label in labels]
    errors, relative, counts = [], [], []
    for prediction, label in zip(predictions, labels, strict=True):
        valid = label != 0
        difference = np.abs(prediction.astype(float) - label)[valid]
        errors.append(difference.mean())
        relative.append((difference / label[valid]).mean())
        counts.append(valid.sum())
    pairs = [(torch.from_numpy(p), torch.from_numpy(y)) for p, y in zip(predictions, labels, strict=True)]
    result = scored(task, pairs)
    assert result["abs_err"] == pytest.approx(np.average(errors, weights=counts), rel=1e-6)
    assert result["rel"] == pytest.approx(np.average(relative, weights=counts), rel=1e-6)
    assert abs(np.mean(errors) - result["abs_err"]) > 1e-4  # which a mean over images is not


def test_normals():
    rng = np.random.default_rng(2)
    true = rng.normal(size=(3, 40, 30))
    true /= np.linalg.norm(true, axis=0)
    found = true + rng.normal(0, 0.25, true.shape)
    true[:, :5] = 0
    unit = found / np.linalg.norm(found, axis=0)
    angle = np.degrees(np.arccos(np.clip((unit * true).sum(0), -1, 1)))[5:].ravel()
    result = scored(NYU["normals"], [(torch.from_numpy(found).float(), torch.from_numpy(true).float())])
    assert result["mean"] == pytest.approx(angle.mean(), rel=1e-5)
    assert result["median"] == pytest.approx(np.median(angle), abs=0.02)
    for limit in ("11.25", "22.5", "30"):
        assert result[f"within_{limit}"] == pytest.approx(100 * (angle < float(limit)).mean(), abs=0.1)


# ---------------------------------------------------------------------------------------------------------------------
# Delta_p


def as_libmtl_writes_it(base, new, is_higher_better):
    """The formula of its documentation: (-1)^w (B - N) / B with w = 1 where higher is better."""
    tasks = []
    for task in base:
        gains = []
        for key in base[task]:
            sign = (-1) ** int(is_higher_better[task][key])
            gains.append(sign * (base[task][key] - new[task][key]) / base[task][key])
        tasks.append(sum(gains) / len(gains))
    return 100 * sum(tasks) / len(tasks)


def test_the_example_of_its_documentation():
    base, new = {"A": {"x": 96.0, "y": 98.0}, "B": {"z": 0.2}}, {"A": {"x": 93.0, "y": 99.0}, "B": {"z": 0.5}}
    higher = {"A": {"x": True, "y": False}, "B": {"z": True}}
    value = delta_p(new, base, higher_is_better=higher)
    by_hand = 100 * (((93 - 96) / 96 - (99 - 98) / 98) / 2 + (0.5 - 0.2) / 0.2) / 2
    assert value == pytest.approx(by_hand) and value == pytest.approx(as_libmtl_writes_it(base, new, higher))


def random_scores(seed):
    rng = np.random.default_rng(seed)
    return {name: {key: rng.uniform(1, 90) for key in LIBMTL_SCORES[task.kind]} for name, task in NYU.items()}


def test_a_comparison_may_be_by_delta_p():
    ours, theirs = random_scores(0), random_scores(1)
    found = compare(tuple(NYU.values()), ours, Reference("x", "", theirs), delta="delta_p")
    higher = {
        "semseg": {"miou": True, "accuracy": True},
        "depth": {"abs_err": False, "rel": False},
        "normals": {"mean": False, "median": False, "within_11.25": True, "within_22.5": True, "within_30": True},
    }
    assert found.delta == "delta_p" and found.value == pytest.approx(as_libmtl_writes_it(theirs, ours, higher))
    assert [(gain.task.name, gain.key) for gain in found.gains] == [
        (task, key) for task, keys in higher.items() for key in keys
    ]
    by_metric = {(gain.task.name, gain.key): gain.percent for gain in found.gains}
    assert by_metric["depth", "rel"] == pytest.approx(100 * (1 - ours["depth"]["rel"] / theirs["depth"]["rel"]))
    plain = compare(tuple(NYU.values()), ours, Reference("x", "", theirs))
    assert plain.delta == "delta_m" and len(plain.gains) == 3 and plain.value != pytest.approx(found.value)


def test_a_metric_that_the_reference_lacks_is_named():
    theirs = random_scores(1)
    del theirs["normals"]["median"]
    with pytest.raises(ValueError, match=r"normals.*median angle.*Delta_m"):
        compare(tuple(NYU.values()), random_scores(0), Reference("x", "", theirs), delta="delta_p")


def test_other_kinds_have_the_score_that_stands_for_them():
    edge = DATA_SETS["nyud"].tasks["edge"]
    found = compare([edge], {"edge": {"bce": 0.04}}, Reference("x", "", {"edge": {"bce": 0.05}}), delta="delta_p")
    assert found.value == pytest.approx(20)
