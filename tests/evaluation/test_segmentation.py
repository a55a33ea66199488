"""mIoU against torchmetrics, and its two conventions: absent classes and ignored images."""

import pytest
import torch

from ase_dist.evaluation.metrics import build_metric
from ase_dist.tasks import IGNORE

from .conftest import TASK_OF_KIND, random_image

pytestmark = pytest.mark.single_gpu
TASK = TASK_OF_KIND["classes"]


def test_agrees_with_torchmetrics(device):
    from torchmetrics import classification

    settings = {"num_classes": TASK.channels, "ignore_index": IGNORE}
    jaccard = classification.MulticlassJaccardIndex(average="none", **settings)
    accuracy = classification.MulticlassAccuracy(average="micro", **settings)
    metric = build_metric(TASK)
    for seed in range(4):
        prediction, label = random_image(TASK, seed=seed)
        metric.update(prediction.to(device), label.to(device))
        for oracle in (jaccard, accuracy):
            oracle.update(prediction.long()[None], label.long()[None])
    result = metric.result()
    expected = [100 * float(value) for value in jaccard.compute()]
    assert [result[f"iou/{name}"] for name in TASK.class_names] == pytest.approx(expected, rel=1e-5)
    assert result["miou"] == pytest.approx(sum(expected) / TASK.channels, rel=1e-5)
    assert result["accuracy"] == pytest.approx(100 * float(accuracy.compute()), rel=1e-5)


def test_classes_that_nobody_shows_are_left_out_and_false_ones_count():
    metric = build_metric(TASK)
    label = torch.tensor([[0, 0, 1, 1]], dtype=torch.uint8)
    metric.update(torch.tensor([[0, 0, 1, 3]], dtype=torch.uint8), label)  # IoU: 1, 1/2, and 0 for class 3
    result = metric.result()
    assert result["miou"] == pytest.approx(50)
    assert {key for key in result if key.startswith("iou/")} == {"iou/background", "iou/head", "iou/upper arm"}


@pytest.mark.parametrize("bad", ["prediction", "label"])
def test_class_ids_out_of_range_are_named(bad, device):
    tensors = {name: torch.zeros(2, 2, dtype=torch.uint8, device=device) for name in ("prediction", "label")}
    tensors[bad][1, 1] = 9
    tensors["label"][0, 0] = IGNORE
    metric = build_metric(TASK)
    metric.update(**tensors)  # which waits for no device, so that the sum over all images is judged
    metric.update(torch.zeros_like(tensors["label"]), torch.zeros_like(tensors["label"]))
    with pytest.raises(ValueError, match=r"human_parts: got class ids up to 9, wanted 0\.\.6"):
        metric.result()
