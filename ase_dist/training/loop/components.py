"""The components of a run before its first step: data, model and engine, the same on all ranks."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ase_dist.agreement import raise_together, require_same_on_ranks
from ase_dist.config import ModelSettings, Settings, flat
from ase_dist.data.loader import EvalLoader, TrainLoader, build_eval_loader, build_train_loader, data_fingerprint
from ase_dist.errors import UserError
from ase_dist.models import ParameterTable, build_model, fetch_from_hub, parameter_table
from ase_dist.models.resnet import is_resnet
from ase_dist.tasks import Task
from ase_dist.training.balancing.balancer import Balancer
from ase_dist.training.ds_config import ResolvedConfig
from ase_dist.training.loop import engine as engines
from ase_dist.training.loop.conflict import check_conflict_settings
from ase_dist.training.process import runtime
from ase_dist.training.process.runtime import World
from ase_dist.training.state.frozen import FrozenWeights
from ase_dist.versions import versions_of

LOGGER = logging.getLogger("ase_dist")


class RunComponents(NamedTuple):
    """Data, model, engine and sizes of a run, before its first step."""

    config: ResolvedConfig
    tasks: tuple[Task, ...]
    world: World
    train_loader: TrainLoader
    eval_loader: EvalLoader
    engine: Any
    balancer: Balancer
    parameters: ParameterTable
    frozen: FrozenWeights
    total_steps: int

    @property
    def settings(self) -> Settings:
        """The run's final settings, DeepSpeed's JSON included."""
        return self.config.settings

    @property
    def labelled_images(self) -> dict[str, dict[str, int]]:
        """How many training and validation images have a label, by split and task."""
        datasets = {"train": self.train_loader.dataset, "val": self.eval_loader.dataset}
        return {split: dataset.labelled_images() for split, dataset in datasets.items()}

    def close(self) -> None:
        """End the loaders' threads and processes."""
        self.train_loader.close()
        self.eval_loader.close()


def build(config: ResolvedConfig, world: World, *, beat: Callable[[str], None]) -> RunComponents:
    """Build data, model and engine; ``beat`` is told what begins, as ``Watchdog.beat``.

    Raises UserError on all ranks where one of them cannot be built on any rank.
    """
    settings = config.settings
    tasks = settings.chosen_tasks()
    check_conflict_settings(settings, num_tasks=len(tasks), zero_stage=config.zero_stage)
    runtime.seed_everything(settings.seed, rank=world.rank)
    place: dict[str, Any] = {"rank": world.rank, "world_size": world.size, "device": world.device}
    beat("opening the data")
    train_loader = raise_together(lambda: build_train_loader(settings, tasks, **place))
    eval_loader = raise_together(lambda: build_eval_loader(settings, tasks, **place))
    require_same_on_ranks(
        {
            "training data": data_fingerprint(train_loader.dataset),
            "validation data": data_fingerprint(eval_loader.dataset),
        }
    )
    beat("building the model")
    fetched = fetch_from_hub(settings)
    model = raise_together(
        lambda: build_model(fetched, tasks, expert_layer="plain" if config.zero_stage == 3 else "deepspeed")
    )
    if has_random_frozen_backbone(settings.model):
        LOGGER.warning(
            "model.pretrained is 'none' and model.tune 'adapters': the backbone keeps the random weights that it "
            "starts with; give model.pretrained=hub or FILE, or train it too with model.tune=full"
        )
    balancer = raise_together(lambda: Balancer(settings, tasks, model, world.device))
    parameters = parameter_table(model)
    frozen = FrozenWeights.of(model, settings.model.backbone)
    steps = total_steps(settings, train_loader)
    beat("building the engine")
    engine = engines.initialize(model, config, world, total_steps=steps)
    return RunComponents(config, tasks, world, train_loader, eval_loader, engine, balancer, parameters, frozen, steps)


def has_random_frozen_backbone(model: ModelSettings) -> bool:
    """Whether the backbone's weights are drawn at random and not trained, which is hardly ever meant."""
    is_frozen = model.tune == "adapters" and not is_resnet(model.backbone)
    return is_frozen and model.pretrained == "none" and model.init_from is None


def total_steps(settings: Settings, loader: TrainLoader) -> int:
    """Optimiser steps of the run: ``train.max_steps``, or as many as ``train.epochs`` take."""
    train = settings.train
    if train.max_steps is not None:
        return train.max_steps
    if train.epochs is None:
        raise UserError("train: neither max_steps nor epochs is set; set one of them")
    return max(1, math.ceil(train.epochs * loader.steps_per_epoch / train.gradient_accumulation_steps))


def require_same_start(settings: Settings, ds_config: Mapping[str, Any]) -> None:
    """Compare settings, DeepSpeed's JSON and versions over the ranks; see ``require_same_on_ranks``."""
    versions = {f"the version of {name}": version for name, version in versions_of("ase_dist", "torch").items()}
    json_hash = hashlib.sha256(json.dumps(ds_config, sort_keys=True, default=str).encode()).hexdigest()[:16]
    require_same_on_ranks(
        {**flat(settings.model_dump(mode="json")), "the DeepSpeed JSON (SHA-256)": json_hash, **versions}
    )
