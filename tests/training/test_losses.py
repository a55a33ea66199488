"""The task losses against a slow reference, and their independence of how the batch is spread over ranks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ase_dist.tasks import IGNORE, NYUD_TASKS, PASCAL_TASKS, Task
from ase_dist.training.loop.losses import label_counts, loss_weights, task_losses, weighted_sum

pytestmark = pytest.mark.single_gpu

TASKS = (*PASCAL_TASKS.values(), NYUD_TASKS["depth"])
SIZE = 12


def make_label(task: Task, images: int, g: torch.Generator, ignored: float = 0.3) -> Tensor:
    unknown = torch.rand(images, SIZE, SIZE, generator=g) < ignored
    if task.kind == "normals":
        normal = F.normalize(torch.randn(images, 3, SIZE, SIZE, generator=g), dim=1)
        return normal * ~unknown[:, None]
    if task.kind == "depth":
        return (torch.rand(images, 1, SIZE, SIZE, generator=g) * 5 + 0.5) * ~unknown[:, None]
    high = task.channels if task.kind == "classes" else 2
    label = torch.randint(0, high, (images, SIZE, SIZE), generator=g, dtype=torch.uint8)
    return label.masked_fill(unknown, IGNORE)


def make_batch(images: int, *, seed: int = 0, side: int = 5) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Logits at head resolution and labels whose share of ignored pixels differs from image to image."""
    g = torch.Generator().manual_seed(seed)
    logits = {task.name: torch.randn(images, task.channels, side, side, generator=g) for task in TASKS}
    labels = {task.name: torch.cat([make_label(task, 1, g, i / images) for i in range(images)]) for task in TASKS}
    return logits, labels


def ignore_all(label: Tensor) -> Tensor:
    return torch.zeros_like(label) if label.is_floating_point() else torch.full_like(label, IGNORE)


def reference(task: Task, logits_BChw: Tensor, label: Tensor) -> float:
    """The loss of a whole batch, pixel by pixel in Python."""
    logits = F.interpolate(logits_BChw.double(), size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    terms: list[float] = []
    positives = int((label == 1).sum())
    negatives = int((label == 0).sum())
    share = negatives / max(positives + negatives, 1)
    for b in range(label.shape[0]):
        for y in range(SIZE):
            for x in range(SIZE):
                z = logits[b, :, y, x].tolist()
                if task.kind in {"normals", "depth"}:
                    target = label[b, :, y, x].tolist()
                    if any(target):
                        length = math.sqrt(sum(v * v for v in z)) if task.kind == "normals" else 1.0
                        terms += [abs(v / length - t) for v, t in zip(z, target, strict=True)]
                    continue
                target = int(label[b, y, x])
                if target == IGNORE:
                    continue
                if task.kind == "classes":
                    terms.append(math.log(sum(math.exp(v) for v in z)) - z[target])
                    continue
                probability = 1 / (1 + math.exp(-z[0]))
                weight = 0.95 if task.kind == "edges" else share
                terms.append(
                    -weight * math.log(probability) if target == 1 else -(1 - weight) * math.log(1 - probability)
                )
    return sum(terms) / len(terms) if terms else 0.0


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_loss_equals_the_pixel_by_pixel_reference(task: Task) -> None:
    logits, labels = make_batch(3)
    got = task_losses(logits, labels, (task,), label_counts(labels, (task,)))[task.name]
    assert got.dtype == torch.float32 and got.shape == ()
    assert got.item() == pytest.approx(reference(task, logits[task.name], labels[task.name]), rel=1e-5)


def test_counts_are_those_of_the_labels() -> None:
    _, labels = make_batch(3)
    counts = label_counts(labels, TASKS)
    assert counts.dtype == torch.float32 and counts.shape == (len(TASKS), 2)
    for task, (first, second) in zip(TASKS, counts.tolist(), strict=True):
        label = labels[task.name]
        if task.kind == "mask":
            assert (first, second) == ((label == 1).sum(), (label == 0).sum())
        else:
            valid = (label != 0).any(1) if label.is_floating_point() else label != IGNORE
            assert (first, second) == (valid.sum(), 0)


def averaged(logits: dict[str, Tensor], labels: dict[str, Tensor], parts: list[slice]) -> tuple[dict, dict]:
    """Losses and gradients as data parallelism averages them over ranks that hold ``parts`` of the batch."""
    counts = torch.stack([label_counts({n: v[p] for n, v in labels.items()}, TASKS) for p in parts]).mean(0)
    losses = {task.name: 0.0 for task in TASKS}
    gradients = {name: torch.zeros_like(value) for name, value in logits.items()}
    for part in parts:
        leaves = {name: value[part].clone().requires_grad_() for name, value in logits.items()}
        local = task_losses(leaves, {n: v[part] for n, v in labels.items()}, TASKS, counts)
        weighted_sum(local, TASKS, {}).backward()
        for name, leaf in leaves.items():
            losses[name] += local[name].item() / len(parts)
            gradients[name][part] += leaf.grad / len(parts)
    return losses, gradients


@pytest.mark.parametrize("parts", [[(0, 2), (2, 4)], [(0, 1), (1, 2), (2, 3), (3, 4)], [(0, 3), (3, 4)]])
@pytest.mark.parametrize("starved", [False, True], ids=["all ranks have pixels", "a rank has none"])
def test_the_mean_over_ranks_is_one_process_with_the_whole_batch(parts: list[tuple[int, int]], starved: bool) -> None:
    logits, labels = make_batch(4, seed=1)
    if starved:
        labels = {name: torch.cat([label[:-1], ignore_all(label[-1:])]) for name, label in labels.items()}
    one_losses, one_gradients = averaged(logits, labels, [slice(0, 4)])
    losses, gradients = averaged(logits, labels, [slice(*part) for part in parts])
    assert losses == pytest.approx(one_losses, rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, one_gradients[name], rtol=1e-4, atol=1e-7)
        assert gradient.abs().sum() > 0


def test_a_single_valid_pixel_among_four_ranks_counts_in_full() -> None:
    """The mean count is then a quarter, which must divide as it is."""
    logits, labels = make_batch(4, seed=2)
    for name, label in labels.items():
        labels[name] = ignore_all(label)
        labels[name][1, ..., 4, 6] = 1
    one_losses, _ = averaged(logits, labels, [slice(0, 4)])
    losses, _ = averaged(logits, labels, [slice(i, i + 1) for i in range(4)])
    assert losses == pytest.approx(one_losses, rel=1e-5)
    assert all(loss > 0 for name, loss in losses.items() if name != "saliency")  # no negatives: its weight is 0


def test_no_valid_pixel_anywhere_gives_zero_and_a_zero_gradient() -> None:
    logits, labels = make_batch(2)
    labels = {name: ignore_all(label) for name, label in labels.items()}
    leaves = {name: value.requires_grad_() for name, value in logits.items()}
    losses = task_losses(leaves, labels, TASKS, label_counts(labels, TASKS))
    weighted_sum(losses, TASKS, {}).backward()
    assert all(loss.item() == 0 for loss in losses.values())
    assert all(leaf.grad is not None and not leaf.grad.any() for leaf in leaves.values())


def test_ignored_pixels_have_no_gradient_at_full_resolution() -> None:
    logits, labels = make_batch(2, side=SIZE)
    leaves = {name: value.requires_grad_() for name, value in logits.items()}
    weighted_sum(task_losses(leaves, labels, TASKS, label_counts(labels, TASKS)), TASKS, {}).backward()
    for task in TASKS:
        label, gradient = labels[task.name], leaves[task.name].grad
        ignored = (label == 0).all(1) if label.is_floating_point() else label == IGNORE
        assert gradient is not None and ignored.any()
        touched = (gradient != 0).any(1)
        assert not (touched & ignored).any()
        assert touched[~ignored].all()


def test_gradients_are_those_of_finite_differences() -> None:
    """Along the gradient: (L(z + hd) - L(z - hd)) / 2h = g . d, in the float32 that the losses use."""
    logits, labels = make_batch(2, seed=3)
    counts = label_counts(labels, TASKS)
    for task in TASKS:
        leaf = logits[task.name].requires_grad_()

        def loss(value: Tensor, task: Task = task) -> Tensor:
            return task_losses({task.name: value}, labels, (task,), counts[[TASKS.index(task)]])[task.name]

        loss(leaf).backward()
        assert leaf.grad is not None
        step = leaf.grad * (3e-3 / leaf.grad.norm())
        slope = (loss(leaf.detach() + step) - loss(leaf.detach() - step)) / 2
        torch.testing.assert_close((leaf.grad * step).sum(), slope, rtol=2e-2, atol=0.0)


def test_a_zero_normal_has_a_bounded_gradient() -> None:
    task = PASCAL_TASKS["normals"]
    label = {"normals": torch.tensor([0.0, 0.0, 1.0]).view(1, 3, 1, 1).expand(1, 3, 4, 4)}
    zero = torch.zeros(1, 3, 4, 4, requires_grad=True)
    loss = task_losses({"normals": zero}, label, (task,), label_counts(label, (task,)))["normals"]
    loss.backward()
    assert zero.grad is not None and torch.isfinite(zero.grad).all() and zero.grad.abs().max() <= 1e4


def test_half_precision_logits_are_summed_in_float32() -> None:
    logits, labels = make_batch(2)
    counts = label_counts(labels, TASKS)
    halved = {name: value.bfloat16() for name, value in logits.items()}
    want = task_losses({name: value.float() for name, value in halved.items()}, labels, TASKS, counts)
    got = task_losses(halved, labels, TASKS, counts)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_a_non_finite_logit_shows_in_its_own_task_only() -> None:
    logits, labels = make_batch(2)
    logits["normals"][0] = float("nan")
    losses = task_losses(logits, labels, TASKS, label_counts(labels, TASKS))
    assert {name for name, loss in losses.items() if not loss.isfinite()} == {"normals"}


def test_nothing_depends_on_the_data_s_values() -> None:
    """On the meta device a boolean-mask index, an .item() or a branch on a value fails: on CUDA each would wait."""
    logits, labels = ({name: value.to("meta") for name, value in part.items()} for part in make_batch(2))
    losses = task_losses(logits, labels, TASKS, label_counts(labels, TASKS))
    assert weighted_sum(losses, TASKS, {}).shape == ()


def test_weights_come_from_the_table_unless_overridden() -> None:
    losses = {task.name: torch.tensor(float(i + 1)) for i, task in enumerate(TASKS)}
    want = sum((7.0 if t.name == "edge" else t.loss_weight) * (i + 1) for i, t in enumerate(TASKS))
    assert weighted_sum(losses, TASKS, {"edge": 7.0}).item() == pytest.approx(want)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [({"edges": 1.0}, "did you mean 'edge'"), ({"edge": -1.0}, "got -1.0"), ({"edge": float("nan")}, "got nan")],
)
def test_wrong_weights_are_refused(overrides: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        loss_weights(TASKS, overrides)
