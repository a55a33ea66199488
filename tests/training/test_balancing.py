"""The weights of every method of balancing: against TorchJD, or a paper's formula written out, on the same numbers."""

import json
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from ase_dist.data.batch import Batch
from ase_dist.models import build_model
from ase_dist.models.names import trained_entries
from ase_dist.read_config import load_settings
from ase_dist.registries import BALANCINGS
from ase_dist.tasks import PASCAL_TASKS
from ase_dist.training.balancing import balancer as balancers
from ase_dist.training.balancing import method as methods
from ase_dist.training.balancing.balancer import Balancer, StoredBalancing
from ase_dist.training.balancing.gramian import Measurement
from ase_dist.training.balancing.method import Seen, drawing_from
from ase_dist.training.loop.losses import label_counts, task_losses
from ase_dist.training.loop.trainer import Trainer
from tests.training.tiny_runs import TINY, checkpoint, metric_lines, said, same_bits, saved_meta, tiny_run
from tests.waits import HostWaits

pytestmark = pytest.mark.single_gpu
CPU = torch.device("cpu")
T = 4
with_ecos = pytest.mark.skipif(find_spec("ecos") is None, reason="has no wheels for Python 3.13 and later")
NASH = pytest.param("nash_mtl", marks=with_ecos)
SCALE_FREE = ("mgda", "pcgrad", "cagrad", "imtl_g", "aligned_mtl", "upgrad")
FROM_GRADIENTS = (*SCALE_FREE, NASH)
SHORT = ("train.max_steps=4", "checkpoint.every=2", "data.limit_val=1")


def made(name, *, count=T, lr=0.1, **args):
    kind = BALANCINGS[name]
    return kind(count, args=kind.Args(**args), lr=lr, device=CPU)


def seen(losses=None, gramian=None, *, present=None, seed=3):
    present = torch.ones(T, dtype=torch.bool) if present is None else torch.tensor(present)
    return Seen(losses, present, gramian, seed)


def jacobian(seed, rows=T, columns=9):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch_losses(seed):
    return torch.rand(T, generator=torch.Generator().manual_seed(seed)) * 3 + 0.1


def learn(method, seen, after=None, *, ends=False):
    method.learn(seen, after, window_ends=ends)


# ---------------------------------------------------------------------------------------------------------------------
# From the Gram matrix


def by_torchjd(name, rows, seed):
    from torchjd import aggregation

    weighting = {
        "mgda": aggregation.MGDAWeighting,
        "pcgrad": aggregation.PCGradWeighting,
        "cagrad": lambda: aggregation.CAGradWeighting(c=0.4),
        "imtl_g": aggregation.IMTLGWeighting,
        "aligned_mtl": aggregation.AlignedMTLWeighting,
        "upgrad": aggregation.UPGradWeighting,
    }
    if name == "nash_mtl":
        return aggregation.NashMTL(len(rows)).weighting(rows)
    with drawing_from(seed):
        return weighting[name]()(rows @ rows.T)


@pytest.mark.parametrize("name", FROM_GRADIENTS)
def test_the_weights_of_a_gram_matrix_are_torchjds(name):
    for seed in range(3):
        rows = jacobian(seed)
        got = made(name).weights(seen(gramian=rows @ rows.T, seed=seed))
        wanted = by_torchjd(name, rows, seed)
        torch.testing.assert_close(got.double(), wanted.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", SCALE_FREE)
def test_small_gradients_have_the_weights_of_large_ones(name):
    """TorchJD alone takes a Gram matrix with a trace below 1e-4 for zero, and CAGrad then stops the training."""
    rows = jacobian(5)
    large, small = (made(name).weights(seen(gramian=rows @ rows.T * scale)) for scale in (1.0, 1e-9))
    torch.testing.assert_close(small, large, rtol=1e-4, atol=1e-5)
    assert large.abs().sum() > 0


@with_ecos
def test_nash_mtl_solves_the_bargaining_game_and_begins_at_its_last_solution():
    """G alpha = 1 / alpha (arXiv 2202.01017, Claim 3.1), which TorchJD's convex problems approach."""
    from torchjd.aggregation import NashMTL

    ours, theirs = made("nash_mtl", max_norm=0.0), NashMTL(T, max_norm=0.0).weighting
    for seed in range(3):
        rows = jacobian(seed)
        gramian = rows @ rows.T
        got = ours.weights(seen(gramian=gramian)).double()
        torch.testing.assert_close(got, theirs(rows), rtol=1e-6, atol=1e-6)
        products = got * (gramian @ got)
        torch.testing.assert_close(products, torch.ones_like(products), rtol=2e-2, atol=0)


@pytest.mark.parametrize("name", FROM_GRADIENTS)
def test_a_task_without_labels_is_left_out_of_the_matrix(name):
    rows = jacobian(1)
    rows[2] = 0
    present = [True, True, False, True]
    got = made(name).weights(seen(gramian=rows @ rows.T, present=present))
    wanted = by_torchjd(name, rows[torch.tensor(present)], 3)
    assert got[2] == 0
    torch.testing.assert_close(got[torch.tensor(present)].double(), wanted.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("gramian", [torch.zeros(T, T), torch.full((T, T), torch.nan)], ids=["zero", "nan"])
def test_a_matrix_without_an_answer_gives_none(gramian):
    assert made("cagrad").weights(seen(gramian=gramian)).isnan().all()


def test_a_solver_that_fails_says_why():
    method = made("upgrad")
    with mock.patch("torchjd.aggregation.UPGradWeighting", side_effect=ValueError("no such point")):
        assert method.weights(seen(gramian=torch.eye(T))).isnan().all()
    assert "no such point" in method.problem
    assert method.weights(seen(gramian=torch.eye(T))).isfinite().all() and not method.problem


def test_gradnorm_is_its_paper_written_out():
    """Algorithm 1 of arXiv 1711.02257, its derivative by autograd, its step by torch's Adam."""
    ours, weights = made("gradnorm", lr=0.05, alpha=0.7), torch.nn.Parameter(torch.ones(T))
    optimizer, initial = torch.optim.Adam([weights], lr=0.05), None
    for step in range(6):
        rows, now = jacobian(step).float(), batch_losses(step)
        sight = seen(now, rows @ rows.T)
        torch.testing.assert_close(ours.weights(sight), weights.detach(), rtol=1e-6, atol=1e-6)
        learn(ours, sight)
        initial = now if initial is None else initial
        norms = torch.stack([(weights[i] * rows[i]).norm() for i in range(T)])
        rates = now / initial / (now / initial).mean()
        target = (norms.mean() * rates**0.7).detach()
        optimizer.zero_grad()
        (norms - target).abs().sum().backward()
        optimizer.step()
        with torch.no_grad():
            weights.mul_(T / weights.sum())


# ---------------------------------------------------------------------------------------------------------------------
# From losses


@pytest.mark.parametrize(("name", "theirs"), [("uncertainty", "UW"), ("imtl_l", "IMTLL")])
def test_learned_scales_are_torchjds_under_torchs_adam(name, theirs):
    ours, scalarizer = made(name), getattr(import_module("torchjd.scalarization"), theirs)(T)
    optimizer = torch.optim.Adam(scalarizer.parameters(), lr=0.1)
    for step in range(5):
        now = batch_losses(step)
        torch.testing.assert_close(ours.weights(seen()), methods.slopes(scalarizer, now).detach(), rtol=1e-6, atol=1e-6)
        learn(ours, seen(now))
        optimizer.zero_grad()
        scalarizer(now).backward()
        optimizer.step()


def test_uncertainty_and_imtl_l_are_their_papers_equations():
    s = torch.tensor([0.3, -0.2, 1.0, 0.0])
    for name, wanted in (("uncertainty", 0.5 * (-s).exp()), ("imtl_l", s.exp())):
        method = made(name)
        method.state["log_scale"] = s
        torch.testing.assert_close(method.weights(seen()), wanted, rtol=1e-6, atol=1e-6)


def test_dynamic_average_is_torchjds_over_epochs():
    from torchjd.scalarization import DWA

    ours, theirs = made("dwa", temperature=1.5), DWA(temperature=1.5)
    for epoch in range(4):
        for step in range(3):
            now = batch_losses(10 * epoch + step)
            wanted = methods.slopes(theirs, now)
            torch.testing.assert_close(ours.weights(seen()), wanted, rtol=1e-6, atol=1e-6)
            learn(ours, seen(now), ends=step == 2)
        theirs.step()
    assert wanted.std() > 0.01, "else the test could not fail"


def test_geometric_mean_is_torchjds():
    from torchjd.scalarization import GeometricMean

    now = batch_losses(0)
    torch.testing.assert_close(
        made("gls").weights(seen(now)), methods.slopes(GeometricMean(), now), rtol=1e-6, atol=1e-6
    )


def test_random_weights_are_a_softmax_of_normal_numbers_by_step():
    one, again, other = (made("rlw").weights(seen(seed=seed)) for seed in (7, 7, 8))
    drawn = torch.randn(T, generator=torch.Generator().manual_seed(7)).softmax(dim=0)
    torch.testing.assert_close(one, drawn, rtol=1e-6, atol=1e-6)
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_famo_is_torchjds():
    from torchjd.scalarization import FAMO

    ours, theirs = made("famo", lr=0.025), FAMO(T)
    for step in range(6):
        before, after = batch_losses(step), batch_losses(step + 100)
        wanted = methods.slopes(theirs, before)
        torch.testing.assert_close(ours.weights(seen(before)), wanted, rtol=1e-6, atol=1e-6)
        learn(ours, seen(before), after)
        theirs.update(after)


@pytest.mark.parametrize("name", ["uncertainty", "dwa", "gls", "imtl_l", "rlw", "famo", "gradnorm"])
def test_a_task_without_labels_moves_nothing_and_spoils_nothing(name):
    """Its loss is 0 and its gradient too; the others have the weights of a run without it."""
    three, method = made(name, count=3), made(name)
    keep = torch.tensor([True, True, False, True])
    for step in range(6):
        rows, now = jacobian(step).float(), batch_losses(step)
        rows[2], now[2] = 0, 0
        sight = seen(now, rows @ rows.T, present=keep.tolist())
        part = Seen(now[keep], torch.ones(3, dtype=torch.bool), rows[keep] @ rows[keep].T, 3)
        got, wanted = method.weights(sight), three.weights(part)
        if name == "rlw":
            wanted = torch.randn(T, generator=torch.Generator().manual_seed(3))[keep].softmax(dim=0)
        assert got.isfinite().all()
        torch.testing.assert_close(got[keep], wanted, rtol=1e-5, atol=1e-6)
        learn(method, sight, after=now * torch.tensor([0.9, 0.8, 0.7, 0.95]), ends=step % 2 == 1)
        learn(three, part, after=now[keep] * torch.tensor([0.9, 0.8, 0.95]), ends=step % 2 == 1)
    started = made(name).state
    assert all(value[2] == started.get(key, torch.zeros(T))[2] for key, value in method.state.items())
    if name not in ("gls", "rlw"):
        assert not torch.allclose(wanted, three.weights(part)) or wanted.std() > 1e-3, "else the test could not fail"


def test_gradnorm_keeps_the_weights_of_tasks_that_are_absent_now_and_then():
    """Those with labels take its paper's step and share what the absent ones leave of the sum, which is t."""
    method = made("gradnorm", lr=0.05)
    present = [[True] * 4, [True, True, False, True], [False, True, True, False], [True] * 4]
    for step, there in enumerate(map(torch.tensor, present)):
        rows, now = jacobian(step).float(), batch_losses(step)
        rows[~there], now[~there] = 0, 0
        before = method.state["weight"].clone()
        learn(method, seen(now, rows @ rows.T, present=there.tolist()))
        after = method.state["weight"]
        assert torch.equal(after[~there], before[~there]) and not torch.equal(after[there], before[there])
        torch.testing.assert_close(after.sum(), torch.tensor(float(T)), rtol=1e-6, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# The Gram matrix


@pytest.fixture(scope="module")
def batches():
    generator = torch.Generator().manual_seed(0)
    names = ("semseg", "saliency", "edge", "normals")
    found = []
    for _ in range(2):
        labels = {
            "semseg": torch.randint(0, 21, (2, 32, 32), generator=generator).to(torch.uint8),
            "saliency": torch.randint(0, 2, (2, 32, 32), generator=generator).to(torch.uint8),
            "edge": torch.randint(0, 2, (2, 32, 32), generator=generator).to(torch.uint8),
            "normals": torch.nn.functional.normalize(torch.randn(2, 3, 32, 32, generator=generator), dim=1),
        }
        images = torch.randn(2, 3, 32, 32, generator=generator, dtype=torch.float64)
        found.append(Batch(images=images, labels=labels, names=["a", "b"], indices=torch.arange(2)))
    return [PASCAL_TASKS[name] for name in names], found


def built(tasks, *overrides):
    settings = load_settings(None, [*TINY, f"tasks=[{','.join(task.name for task in tasks)}]", *overrides])
    model = build_model(settings, tuple(tasks), expert_layer="plain").double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


@pytest.mark.parametrize("mode", ["none", "recompute"])
def test_the_gram_matrix_is_that_of_one_backward_pass_a_task(batches, mode):
    tasks, micro = batches
    model = built(tasks, f"model.checkpoint_activations={mode}")
    counts = torch.stack([label_counts(batch.labels, tasks) for batch in micro]).mean(dim=0)
    scales = {task.name: float(i + 1) for i, task in enumerate(tasks)}
    state = torch.get_rng_state()
    gramian, losses = Measurement(model, tasks, scales, on="parameters")(micro, counts)
    assert torch.equal(torch.get_rng_state(), state) and all(p.grad is None for p in model.parameters())

    plain = built(tasks)
    own = ("router", "heads.", "task_embedding")
    shared = [p for name, p in plain.named_parameters() if p.requires_grad and not any(part in name for part in own)]
    rows, values = [], []
    for task in tasks:
        plain.zero_grad()
        total = 0.0
        for batch in micro:
            by_task = task_losses(plain(batch.images).predictions, batch.labels, tasks, counts)
            loss = by_task[task.name] * scales[task.name] / len(micro)
            loss.backward()
            total += float(loss.detach())
        rows.append(torch.cat([p.grad.flatten() for p in shared]))
        values.append(total)
    slow = torch.stack(rows) @ torch.stack(rows).T
    torch.testing.assert_close(gramian, slow, rtol=1e-5, atol=1e-8)  # losses are float32
    torch.testing.assert_close(losses, torch.tensor(values, dtype=torch.float64), rtol=1e-6, atol=0)
    count = sum(entry.tensor.numel() for entry in trained_entries(plain))
    assert 0 < len(rows[0]) < count, "heads, routers and the task embedding are no one's shared weights"


@pytest.mark.parametrize("head", ["linear", "hrnet"])
def test_the_gram_matrix_of_the_representation(batches, head):
    """That of the gradients on what the heads get, images of all micro-steps one after another, level by level."""
    tasks, micro = batches
    model = built(tasks, f"model.head={head}")
    counts = torch.stack([label_counts(batch.labels, tasks) for batch in micro]).mean(dim=0)
    scales = {task.name: 1.0 for task in tasks}
    gramian, _ = Measurement(model, tasks, scales, on="representation")(micro, counts)
    rows = [[] for _ in tasks]
    for batch in micro:
        with torch.no_grad():
            levels, _ = model._features(batch.images, list(range(len(tasks))))
        for i, task in enumerate(tasks):
            leaves = [level[i].clone().requires_grad_() for level in levels]
            prediction = {task.name: model.heads[task.name](leaves if head == "hrnet" else leaves[0])}
            (task_losses(prediction, batch.labels, [task], counts[i : i + 1])[task.name] / len(micro)).backward()
            rows[i] += [leaf.grad.flatten() for leaf in leaves]
    stacked = torch.stack([torch.cat(row) for row in rows])
    torch.testing.assert_close(gramian, stacked @ stacked.T, rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("sharing", ["shared", "mtan", "cross_stitch"])
def test_what_tasks_share_of_a_resnet(batches, sharing):
    tasks, micro = batches
    small = "model.backbone_args={channels: [8, 8, 8, 8]}"
    model = built(tasks, "model.backbone=resnet18", small, f"model.sharing={sharing}",
                  "model.tune=full", "model.moe.enabled=false", "model.lora_rank=0",
                  "model.task_embedding=false")  # fmt: skip
    counts = label_counts(micro[0].labels, tasks)
    measure = Measurement(model, tasks, {task.name: 1.0 for task in tasks}, on="parameters")
    measure(micro[:1], counts)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    shared = [names[id(parameter)] for parameter in measure._shared]
    assert shared and not any(name.startswith("heads.") for name in shared)


# ---------------------------------------------------------------------------------------------------------------------
# Its state


@pytest.mark.parametrize("on", ["parameters", "representation"])
def test_every_method_goes_on_from_its_stored_state_bit_for_bit(batches, on):
    """Six steps at once, and four with a new object that reads what a checkpoint holds after two, through JSON."""
    tasks, micro = batches
    model = built(tasks)
    counts = [label_counts(batch.labels, tasks) for batch in micro]
    names = [name for name in BALANCINGS if name != "fixed" and all(map(find_spec, BALANCINGS[name].modules))]
    assert len(names) >= 12

    def take(balancer, steps):
        rows = []
        for step in steps:
            batch, count = micro[step % 2], counts[step % 2]
            balancer.begin_step(step, [batch], count, beat=lambda doing: None)
            by_task = task_losses(model(batch.images).predictions, batch.labels, tasks, count)
            balancer.weighted_sum(by_task)
            rows.append(balancer.weights_t.tolist())
            before = [p.detach().clone() for p in model.heads.parameters()]
            with torch.no_grad():  # the losses after the step are others than before
                for number, p in enumerate(model.heads.parameters()):
                    p.mul_(1 - 0.01 * (number % 5 + step))
            balancer.end_step(step, [{name: loss.detach() for name, loss in by_task.items()}], epoch_ends=step % 2 == 0)
            with torch.no_grad():
                for p, value in zip(model.heads.parameters(), before, strict=True):
                    p.copy_(value)
        return rows

    for name in names:
        overrides = [f"tasks=[{', '.join(task.name for task in tasks)}]", f"train.balancing.method={name}"]
        if name == "dwa":
            overrides.append("train.balancing.args={window: 1}")
        settings = load_settings(None, [*overrides, f"train.balancing.on={on}"])
        whole, first, second = (Balancer(settings, tasks, model, CPU) for _ in range(3))
        rows = take(whole, range(1, 7))
        assert take(first, (1, 2)) == rows[:2], name
        second.load_meta(StoredBalancing.model_validate(json.loads(json.dumps(first.to_meta()))))
        assert take(second, range(3, 7)) == rows[2:] and second.to_meta() == whole.to_meta(), name
        assert len({tuple(row) for row in rows}) > 1, f"{name}: could not fail"


# ---------------------------------------------------------------------------------------------------------------------
# In a run


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("dwa", ("train.balancing.args={window: 1}",)),
        ("famo", ("train.gradient_accumulation_steps=2",)),
        ("gradnorm", ("train.balancing.every=3",)),
        pytest.param("nash_mtl", ("train.balancing.on=representation",), marks=with_ecos),
    ],
)
def test_two_steps_and_two_are_four(method, more, scenes, tmp_path):
    options = (*SHORT, "train.batch_size=2", "train.deterministic=true", f"train.balancing.method={method}", *more)
    tiny_run(scenes, tmp_path / "whole", *options)
    source = tmp_path / "whole" / "checkpoints" / "step_2"
    tiny_run(scenes, tmp_path / "resumed", *options, f"resume={source}")
    assert same_bits(checkpoint(tmp_path / "whole", 4), checkpoint(tmp_path / "resumed", 4)) == []
    lines = metric_lines(tmp_path / "whole")
    assert metric_lines(tmp_path / "resumed") == {step: lines[step] for step in (3, 4)}
    assert saved_meta(tmp_path / "whole", 4)["balancing"] == saved_meta(tmp_path / "resumed", 4)["balancing"]
    weights = [tuple(line["task_weights"].values()) for line in lines.values()]
    assert len({*weights}) > 1


def test_another_method_on_resuming_is_listed_and_begins_afresh(scenes, tmp_path):
    tiny_run(scenes, tmp_path / "one", *SHORT, "train.max_steps=2", "train.balancing.method=uncertainty")
    source = tmp_path / "one" / "checkpoints" / "step_2"
    with mock.patch.object(balancers.Balancer, "load_meta", autospec=True, side_effect=Balancer.load_meta) as load:
        tiny_run(scenes, tmp_path / "two", *SHORT, f"resume={source}", "train.balancing.method=imtl_l")
    balancer = load.call_args.args[0]
    assert saved_meta(tmp_path / "two", 4)["balancing"]["method"] == "imtl_l"
    assert balancer.method.state["log_scale.steps"].tolist() == [2.0] * 5
    text = (tmp_path / "two" / "train.log").read_text()
    assert "train.balancing.method 'uncertainty' -> 'imtl_l'" in text
    assert "imtl_l, of losses, every step" in text


def test_how_often_a_step_waits(scenes, tmp_path):
    """Twice, as with fixed weights; a weighting that is solved on the host reads the Gram matrix once more."""
    found = {}
    step = Trainer._step
    for method, extra in (("famo", 0), ("gls", 0), ("uncertainty", 0), ("dwa", 0), ("gradnorm", 0), ("mgda", 1)):

        def counted(trainer, method=method):
            with HostWaits() as waits:
                step(trainer)
            found[method] = waits.lines

        with (
            mock.patch("ase_dist.training.loop.engine.FUSED", ("cpu",)),
            mock.patch.object(Trainer, "_step", counted),
        ):
            short = ("train.max_steps=2", "train.log_every=9", "checkpoint.every=0")
            tiny_run(scenes, tmp_path / method, *short, f"train.balancing.method={method}", config="z2")
        balancing = {line: count for line, count in found[method].items() if "balancing" in line}
        if method == "mgda":  # what is solved is on the host, where nothing waits
            balancing = {line: count for line, count in balancing.items() if line.startswith("cpu at")}
        assert sum(balancing.values()) == extra, (method, found[method])


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["train.balancing.method=cagard"], ["train.balancing.method", "'cagrad'"]),
        (["train.balancing.method=cagrad", "train.balancing.args={c: 2}"], ["train.balancing.args.c", "got 2"]),
        (["train.balancing.method=dwa", "train.balancing.args={c: 2}"], ["'c'", "temperature, window"]),
        (["train.balancing.method=gls", "train.balancing.args={c: 2}"], ["'c'", "takes none"]),
        (["train.balancing.args={c: 2}"], ["'c'", "'fixed' takes none"]),
        (["train.balancing.method=gls", "tasks=[edge]"], ["one task"]),
        (["train.balancing.every=0"], ["train.balancing.every"]),
    ],
)
def test_what_cannot_be_balanced_is_refused(overrides, parts, scenes, tmp_path):
    sentence = str(said(scenes, tmp_path / "no", *overrides))
    assert sentence.startswith("UserError") and all(part in sentence for part in parts), sentence


def test_a_missing_package_is_named_with_what_brings_it():
    with (
        mock.patch("importlib.util.find_spec", side_effect=lambda name: None if name == "quadprog" else name),
        pytest.raises(ValueError, match=r"'upgrad' needs quadprog.*pip install 'ase-dist\[balancing\]'"),
    ):
        methods.require_modules("upgrad", BALANCINGS["upgrad"].modules)
    with (
        mock.patch("importlib.util.find_spec", side_effect=lambda name: None if name == "ecos" else name),
        pytest.raises(ValueError, match=r"'nash_mtl' needs ecos, which is not installed: pip install ecos$"),
    ):
        methods.require_modules("nash_mtl", BALANCINGS["nash_mtl"].modules)


def test_an_extension_adds_a_method(scenes, tmp_path):
    class Halves(methods.Method):
        modules = ()

        def weights(self, seen):
            return torch.full((self.count,), 0.5, device=self.device)

    BALANCINGS["halves"] = Halves
    try:
        tiny_run(scenes, tmp_path / "run", *SHORT, "train.max_steps=1", "train.balancing.method=halves")
    finally:
        del BALANCINGS["halves"]
    (line,) = metric_lines(tmp_path / "run").values()
    assert set(line["task_weights"].values()) == {0.5}


def test_weights_that_are_not_finite_are_told_once_and_counted(scenes, tmp_path):
    class Broken(methods.Method):
        modules = ()
        calls = 0

        def weights(self, seen):
            Broken.calls += 1
            self.problem = "a singular matrix"
            value = torch.nan if Broken.calls in (2, 3, 5) else float(Broken.calls)
            return torch.full((self.count,), value, device=self.device)

    BALANCINGS["broken"] = Broken
    try:
        tiny_run(scenes, tmp_path / "run", *SHORT, "train.max_steps=5", "train.balancing.method=broken")
    finally:
        del BALANCINGS["broken"]
    lines = metric_lines(tmp_path / "run")
    assert [line.get("kept_weights") for line in lines.values()] == [None, 1, 1, None, 1]
    assert [next(iter(line["task_weights"].values())) for line in lines.values()] == [1, 1, 1, 4, 4]
    text = (tmp_path / "run" / "train.log").read_text()
    assert text.count("finite weights") == 1
    assert "'broken' found no finite weights at step 2 (a singular matrix); those of the step before stay" in text


def test_the_sum_is_of_the_weighted_losses_and_fixed_weights_change_no_bit():
    tasks = [PASCAL_TASKS[name] for name in ("semseg", "edge")]
    settings = load_settings(None, ["tasks=[semseg, edge]", "train.loss_weights={edge: 3}"])
    balancer = Balancer(settings, tasks, torch.nn.Identity(), CPU)
    by_task = {"semseg": torch.tensor(0.7), "edge": torch.tensor(0.11)}
    assert torch.equal(
        balancer.weighted_sum(by_task), torch.stack([1.0 * by_task["semseg"], 3.0 * by_task["edge"]]).sum()
    )
    assert balancer.to_meta() is None and balancer.weights_t is None
    settings = load_settings(
        None, ["tasks=[semseg, edge]", "train.loss_weights={edge: 3}", "train.balancing.method=gls"]
    )
    balancer = Balancer(settings, tasks, torch.nn.Identity(), CPU)
    batch = SimpleNamespace(labels={})
    balancer.begin_step(1, [batch], torch.ones(2, 2), beat=lambda doing: None)
    total = balancer.weighted_sum(by_task)
    torch.testing.assert_close(total, (torch.tensor(0.7) * 0.33).sqrt())
