"""Module paths of earlier versions: importing an old one gives the module at its new place, with a warning.

For one version. The package itself uses the new paths only. Where a module was divided, the old path names the part
with the public functions.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "problems": "errors",
    "registry": "registries",
    "rows": "baselines",
    "cluster.cores": "cores",
    "data.kinds": "data.readers",
    "data.scenes": "scenes",
    "evaluation.legend": "pictures.legend",
    "evaluation.paint": "pictures.colors",
    "inference": "deployment",
    "inference.deploy": "deployment.programs",
    "inference.folder": "deployment.predict_folder",
    "inference.images": "deployment.images",
    "inference.pictures": "pictures.sheet",
    "inference.predictor": "deployment.predictor",
    "models.doubled_conv": "ops.doubled_conv",
    "models.exported": "deployment.exported",
    "models.flops": "planning.flops",
    "models.global_names": "models.names",
    "moe.autocast": "ops.modes",
    "moe.deepspeed_seam": "moe.deepspeed_compat",
    "moe.deepspeed_state": "moe.engine_names",
    "moe.in_model": "moe.task_ffn",
    "moe.lora_ffn": "ops.lowrank",
    "moe.lowrank": "ops.lowrank",
    "moe.products": "ops.products",
    "training.activations": "planning.activations",
    "training.build": "training.loop.components",
    "training.checkpoint": "training.state.checkpoint",
    "training.conflict": "training.loop.conflict",
    "training.console": "training.record.console",
    "training.engine": "training.loop.engine",
    "training.evaluate": "training.loop.evaluate",
    "training.evaluate_saved": "deployment.evaluate_model",
    "training.export": "deployment.export",
    "training.history": "training.state.history",
    "training.losses": "training.loop.losses",
    "training.named_state": "models.names",
    "training.pictures": "pictures.grid",
    "training.plan": "planning.plan",
    "training.plots": "training.record.plots",
    "training.ranks": "training.process.runtime",
    "training.recorder": "training.record.metrics",
    "training.reference": "deployment.reference",
    "training.reports": "training.record.reports",
    "training.restarts": "training.process.restarts",
    "training.run": "training.loop.run",
    "training.run_folder": "training.record.run_folder",
    "training.run_state": "training.state.run_state",
    "training.runtime": "training.process.runtime",
    "training.saved": "deployment.trained_model",
    "training.schedule": "training.loop.schedule",
    "training.traffic": "training.record.traffic",
    "training.trainer": "training.loop.trainer",
}
PACKAGE = __name__.partition(".")[0]


class MovedModules(MetaPathFinder, Loader):
    """Finds a module of ``MOVED``, or one below it, at its new place: the same module object under both names."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """A spec for an old name of this package; None for every other one."""
        new = new_name(name)
        return None if new is None else ModuleSpec(name, self, origin=new)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module at the new place."""
        warnings.warn(f"{spec.name} is now {spec.origin}; the old path goes in the next version", FutureWarning, 2)
        module = import_module(str(spec.origin))
        self._own_spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run; the import system has replaced the module's own spec by that of its alias."""
        module.__spec__ = self._own_spec


def new_name(name: str) -> str | None:
    """The present name of a module that had the old ``name``; None where it never moved."""
    package, _, rest = name.partition(".")
    parts = rest.split(".")
    for count in range(len(parts), 0, -1):
        found = MOVED.get(".".join(parts[:count]))
        if package == PACKAGE and found is not None:
            return ".".join([PACKAGE, found, *parts[count:]])
    return None


def install() -> None:
    """Let old paths be imported, in front of the other finders: a folder may hold a module of the old name's end."""
    if not any(isinstance(finder, MovedModules) for finder in sys.meta_path):
        sys.meta_path.insert(0, MovedModules())
