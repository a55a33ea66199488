"""Runs small enough for a test: a tiny model on a few generated scenes, its checkpoints and metrics compared."""

import contextlib
import json
import math
from functools import lru_cache, partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ase_dist.data.loader import TrainLoader
from ase_dist.models.build import build_model
from ase_dist.models.multitask import MultiTaskViT
from ase_dist.models.names import trained_entries
from ase_dist.moe.deepspeed_compat import full_shape, is_routed
from ase_dist.moe.router import TaskRouter
from ase_dist.read_config import load_settings, recorded_settings
from ase_dist.training.ds_config import read_ds_config, resolve
from ase_dist.training.loop import run
from ase_dist.training.loop.components import build
from ase_dist.training.process import runtime
from ase_dist.training.record.metrics import read_metrics
from ase_dist.training.state.checkpoint import CheckpointStore, open_checkpoint
from ase_dist.training.state.frozen import FrozenWeights
from ase_dist.training.state.run_state import RunState, _group_name
from ase_dist.training.state.tensors import saved_kinds

ROOT = Path(__file__).parents[2]
TRAIN_IMAGES, VAL_IMAGES, SCENE_SIZE = 10, 3, 40
TINY = (
    f"data.scenes.train_images={TRAIN_IMAGES}",
    f"data.scenes.val_images={VAL_IMAGES}",
    f"data.scenes.size={SCENE_SIZE}",
    "data.size=32",
    "data.cache_in_memory=true",
    "model.backbone=vit_tiny_patch16_224",
    "model.backbone_args={embed_dim: 24, depth: 2, num_heads: 2}",
    "model.pretrained=none",
    "model.head=linear",
    "model.moe.num_experts=5",
    "model.moe.k=2",
    "train.max_steps=6",
    "train.warmup_steps=2",
    "train.batch_size=4",
    "train.lr=1e-3",
    "train.log_every=1",
    "train.threads=1",
    "eval.at_start=false",
    "eval.batch_size=2",
    "eval.pictures=0",
    "checkpoint.every=3",
    "monitor.tensorboard=false",
)


def ds_config(name):
    """A shipped DeepSpeed JSON, with the optimiser offloaded where the name ends so and there is none of that name."""
    path = ROOT / "ds_configs" / f"{name}.json"
    if path.is_file() or not name.endswith("_offload"):
        return read_ds_config(path)
    config = read_ds_config(ROOT / "ds_configs" / f"{name.removesuffix('_offload')}.json")
    config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    return config


@lru_cache
def need_the_bits_of_then(old):
    """Skip unless this process makes the random backbone of the run in ``old``, which knows it by its bits alone.

    They are MKL's ``erfinv``, whose code differs between processors; that of then runs everywhere.
    """
    settings = recorded_settings(old / "config.yaml")
    model = build_model(settings, settings.chosen_tasks(), expert_layer="plain")
    then = json.loads((old / "checkpoints/step_2/manifest.json").read_text())["meta"]["backbone"]["sha256"]
    if FrozenWeights.of(model, settings.model.backbone).sha256 != then:
        pytest.skip("the old checkpoint has a random backbone that MKL_CBWR=COMPATIBLE makes on this processor")


def tiny_settings(scenes, output, *overrides):
    return load_settings(None, [*TINY, f"data.root={scenes}", f"output={output}", *overrides])


def tiny_run(scenes, output, *overrides, config="z0"):
    """Train in this process, plots left out; the exit code. The world is the one that this process has joined."""
    settings = tiny_settings(scenes, output, *overrides)
    world = runtime.start(timeout=settings.guard.timeout, threads=1)
    with mock.patch("ase_dist.training.record.plots.draw_all"):
        return int(run.train(settings, ds_config(config), world))


def said(scenes, output, *overrides, config="z0"):
    """The sentence with which a run refuses or ends, or its exit code."""
    try:
        return tiny_run(scenes, output, *overrides, config=config)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


def load_and_save(scenes, source, target, *overrides, config="z0"):
    """Resume from the checkpoint ``source`` and save the same step at once into the folder ``target``.

    Returns bytes: the most that loading and saving held at any time beside the model, and the sizes of what is trained
    with its moments: the largest parameter, the largest group and everything.
    """
    settings = tiny_settings(scenes, target, f"resume={source}", *overrides)
    world = runtime.start(timeout=60, threads=1)
    resolved = resolve(settings, ds_config(config), world=world.size, native_bf16=False)
    parts = build(resolved, world, beat=lambda doing: None)
    store = CheckpointStore(target / "checkpoints", keep=1)
    state = RunState(resolved.settings, world, store, zero_stage=resolved.zero_stage, frozen=parts.frozen,
                     balancer=parts.balancer)  # fmt: skip
    with LiveBytes() as loading:
        state.resume(parts.engine, parts.train_loader, total_steps=parts.total_steps)
    with LiveBytes() as saving:
        state.save(parts.engine, parts.train_loader)
    parts.close()
    sizes = {}
    for entry in trained_entries(parts.engine.module):
        sizes.setdefault(_group_name(entry), []).append(
            full_shape(entry.tensor).numel() * 4 * len(saved_kinds(parts.engine))
        )
    groups = [sum(group) for group in sizes.values()]
    largest = max(size for group in sizes.values() for size in group)
    return {"loading": loading.peak - loading.left, "saving": saving.peak, "parameter": largest, "group": max(groups),
            "all": sum(groups)}  # fmt: skip


class LiveBytes(TorchDispatchMode):
    """``peak`` is the most bytes of tensors alive at the same time, of those made while it was open.

    ``left`` is what outlived it, such as an optimiser's state.
    """

    def __init__(self):
        super().__init__()
        self.peak, self.left, self._made = 0, 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()).data_ptr() not in given:
                self._made[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self._alive())
        return result

    def __exit__(self, *error):
        super().__exit__(*error)
        self.left = self._alive()

    def _alive(self):
        return sum(size for made, size in self._made.values() if not made.expired())


# ---------------------------------------------------------------------------------------------------------------------
# What a run has left behind


def checkpoint(output, step):
    """All tensors of a checkpoint by name, random states and all."""
    with open_checkpoint(output / "checkpoints" / f"step_{step}") as found:
        return {name: found.tensor(name) for name in found.names()}


def saved_meta(output, step):
    """The meta of a checkpoint without what clocks say."""
    with open_checkpoint(output / "checkpoints" / f"step_{step}") as found:
        meta = json.loads(json.dumps(found.meta))
    meta["history"].pop("train_seconds")
    return meta


def trained(output, step):
    """Weights and moments alone."""
    return {name: tensor for name, tensor in checkpoint(output, step).items() if not name.startswith("random/")}


def same_bits(one, two):
    """Names of the tensors that differ in any bit; NaN equals NaN."""
    assert one.keys() == two.keys()
    return [name for name in one if not torch.equal(one[name].nan_to_num(7.5), two[name].nan_to_num(7.5))]


def distance(one, two):
    """By kind of tensor (weight and moments) the norm of the difference over the norm."""
    assert one.keys() == two.keys()
    found = {}
    for kind in sorted({name.partition("/")[0] for name in one}):
        a, b = (torch.cat([t[n].flatten().double() for n in sorted(t) if n.startswith(f"{kind}/")]) for t in (one, two))
        found[kind] = float((a - b).norm() / b.norm())
    return found


def metric_lines(output, kind="train"):
    """Lines of metrics.jsonl by step, without what clocks and the size of the process say."""
    left_out = ("seconds", "images_per_second", "memory_bytes")
    records = [record for record in read_metrics(output / "metrics.jsonl") if record["kind"] == kind]
    return {r["step"]: {name: value for name, value in r.items() if name not in left_out} for r in records}


def losses(output):
    """Every loss of every step: {step: {name: loss}}."""
    return {step: {"total": line["loss"], **line["losses"]} for step, line in metric_lines(output).items()}


def close(one, two, *, rel):
    """Whether two mappings of ``losses`` hold the same numbers to ``rel``."""
    assert one.keys() == two.keys() and one
    return all(math.isclose(one[step][name], two[step][name], rel_tol=rel, abs_tol=1e-7)
               for step in one for name in one[step])  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Faults


@contextlib.contextmanager
def before_step(actions):
    """While open, ``actions[step](batch)`` is called on the batch of that step (from 1) before the loop gets it."""
    taken, real = [], TrainLoader.__next__

    def next_batch(loader):
        batch = real(loader)
        taken.append(1)
        if len(taken) in actions:
            actions[len(taken)](batch)
        return batch

    with mock.patch.object(TrainLoader, "__next__", next_batch):
        yield


@contextlib.contextmanager
def not_finite(kinds):
    """While open, step ``s`` meets NaN in its image, its normals' label, the routers' logits or the gradient alone.

    "expert": in the gradient of this rank's own experts, which no other rank sees.
    """
    kind, forward, route = [""], MultiTaskViT.forward, TaskRouter.forward

    def spoil(batch, what):
        kind[0] = what
        if what == "image":
            batch.images[0, 1, 3, 4] = math.nan
        if what == "label":
            batch.labels["normals"][0, :, 0, 0] = math.nan

    def spoilt_forward(model, *arguments, **options):
        output = forward(model, *arguments, **options)
        if kind[0] == "gradient" and torch.is_grad_enabled():
            output.predictions["edge"].register_hook(lambda gradient: gradient * math.inf)
        if kind[0] == "expert" and torch.is_grad_enabled():
            bank = next(parameter for parameter in model.parameters() if is_routed(parameter))
            bank.register_hook(lambda gradient: gradient * math.inf if kind[0] == "expert" else gradient)
        return output

    def spoilt_route(router, tokens, tasks):
        return route(router, tokens * math.nan if kind[0] == "router" else tokens, tasks)  # and so are its logits

    plan = {step: partial(spoil, what=kinds.get(step, "")) for step in range(1, 20)}
    with (
        mock.patch.object(MultiTaskViT, "forward", spoilt_forward),
        mock.patch.object(TaskRouter, "forward", spoilt_route),
        before_step(plan),
    ):
        yield
