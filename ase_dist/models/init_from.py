"""Start a new run from an exported model: what fits is taken.

Tasks, heads, experts and image size may differ. The backbone must fit as a whole, in place of ``model.pretrained``.
Of the rest, each of these units is taken as a whole or not at all:

- the LoRA of a linear: same place, rank and scale;
- the tasks' own LoRA of a linear: likewise, by the name of the task;
- the experts of a layer: same kind, adapted linears, number of experts and of shared ones, rank and scale. Routers
  come with them, by the name of the task;
- a head: same task name and shapes, and of one on several levels the same levels;
- the task embedding: by the name of the task.

All other tensors keep their own initial values, and the log says so.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence

from timm.layers import resample_abs_pos_embed
from torch import Tensor

from ase_dist.config import ModelSettings
from ase_dist.errors import UserError
from ase_dist.models.backbone import Backbone
from ase_dist.models.export_file import Export, open_export
from ase_dist.models.levels import reads_levels, spread
from ase_dist.models.multitask import MultiTaskViT
from ase_dist.models.names import named_tensors
from ase_dist.models.pretrained import patch_grid
from ase_dist.models.swin import resized_tables

LOGGER = logging.getLogger("ase_dist")
LAYER = re.compile(r"(blocks\.\d+)\.mlp\.(?:router\.weight|\w+\.(?:A|B|weight|bias)\.\d+)")
LORA = re.compile(r"(.+)\.lora_[AB]")
HEAD = re.compile(r"heads\.(\w+)\..+")
TASK_LORA = re.compile(r"(.+)\.lora_tasks\.[AB]")
BY_TASK = ("router.weight", "task_embedding.weight", "lora_tasks.A", "lora_tasks.B")  # the first dimension is tasks
EMBEDDING = "task embedding"
TASKS_OWN = " LoRA of tasks"


class ExportInitializer:
    """The export that ``model.init_from`` names, and what of it a new model takes.

    1. ``fill_backbone`` before experts and LoRA are built on the backbone (feed-forward experts are copies of it)
    2. ``fill_adapters`` when the model is whole

    Raises UserError, beginning with the setting, where the export cannot be read.
    """

    def __init__(self, chosen: ModelSettings) -> None:
        assert chosen.init_from is not None
        try:
            self.export: Export = open_export(chosen.init_from)
        except UserError as error:
            raise UserError(f"model.init_from: {error}") from None
        self.chosen = chosen
        self.tensors = dict(self.export.tensors())
        self.num_levels = 0  # of the backbone
        self.without_ffn: set[str] = set()  # blocks of which the export has no FFN, only experts

    def fill_backbone(self, backbone: Backbone) -> None:
        """Copy the backbone; the position embedding is resampled to the new grid. UserError unless all of it fits."""
        self.num_levels = len(backbone.levels)
        targets: dict[str, Tensor] = dict(backbone.stem.state_dict())
        for i, block in enumerate(backbone.blocks):
            targets |= {f"blocks.{i}.{name}": tensor for name, tensor in block.state_dict().items()}
        targets |= {f"norm.{name}": tensor for name, tensor in backbone.norm.state_dict().items()}
        # blocks.0.mlp.base.fc1.base.weight, under experts and LoRA, is timm's blocks.0.mlp.fc1.weight
        saved = {
            name.removeprefix("stem.").replace(".base.", "."): tensor.float()
            for name, tensor in self.tensors.items()
            if _unit(name) is None
        }
        old, new = saved.get("pos_embed"), targets.get("pos_embed")
        if old is not None and new is not None and old.shape[-1] == new.shape[-1]:
            prefix = new.shape[1] - backbone.grid[0] * backbone.grid[1]  # timm's no_embed_class leaves them out
            grid = patch_grid(self.export.card.image.size, saved["patch_embed.proj.weight"])
            if grid != backbone.grid and prefix + grid[0] * grid[1] == old.shape[1]:
                saved["pos_embed"] = resample_abs_pos_embed(
                    old, list(backbone.grid), list(grid), num_prefix_tokens=prefix
                )
        if "patch_embed.proj.weight" in saved:
            grid = patch_grid(self.export.card.image.size, saved["patch_embed.proj.weight"])
            saved |= resized_tables(saved, backbone.blocks, grid=grid)
        if self.export.card.model.moe.experts == "ffn":
            lacking = [name for name in targets.keys() - saved.keys() if ".mlp." in name]
            self.without_ffn = {name.partition(".mlp.")[0] for name in lacking}
            targets = {name: tensor for name, tensor in targets.items() if name not in lacking}
        wanted, got = _shapes(targets), _shapes(saved)
        odd = sorted(name for name in wanted.keys() | got.keys() if wanted.get(name) != got.get(name))
        if odd:
            raise UserError(
                f"model.init_from: {self.export.folder} has another backbone, {self.export.card.model.backbone}: "
                f"{odd[0]!r} is {got.get(odd[0], 'missing')} for {wanted.get(odd[0], 'none')}; use its model.backbone "
                "and model.backbone_args"
            )
        for name, target in targets.items():
            target.copy_(saved[name])

    def fill_adapters(self, model: MultiTaskViT) -> None:
        """Copy the units that fit and log which do.

        Raises UserError where nothing but a backbone that was never trained fits, and where a block needs the FFN
        that feed-forward experts have replaced.
        """
        units: dict[str, dict[str, Tensor]] = {}
        for name, tensor in named_tensors(model).items():
            if (unit := _unit(name)) is not None:
                units.setdefault(unit, {})[name] = tensor
        taken = [unit for unit, targets in units.items() if self._fits(unit, targets) and self._copy(targets, model)]
        lacking = sorted(self.without_ffn - {unit.removesuffix(" experts") for unit in taken})
        if lacking:
            raise UserError(
                f"model.init_from: feed-forward experts have replaced the FFN of {lacking[0]} in {self.export.folder} "
                "and do not fit this model; use its model.moe"
            )
        if not taken and self.export.card.model.tune == "adapters":
            raise UserError(
                f"model.init_from: nothing of {self.export.folder} fits but its backbone, which was never trained; "
                "use its model.moe, model.lora_rank or model.head, or model.pretrained for the backbone alone"
            )
        self._report(list(units), taken, model)

    def _report(self, units: Sequence[str], taken: Sequence[str], model: MultiTaskViT) -> None:
        left = [unit for unit in units if unit not in taken]
        known = [name for name in self._source_tasks if name in model.task_names]
        LOGGER.info(
            "model.init_from %s: took the backbone, %s; routers and embeddings of the tasks %s; starting afresh: %s",
            self.export.folder,
            _listed(taken),
            ", ".join(known) or "none",
            _listed(left),
        )

    @property
    def _source_tasks(self) -> tuple[str, ...]:
        return tuple(task.name for task in self.export.card.tasks)

    def _fits(self, unit: str, targets: Mapping[str, Tensor]) -> bool:
        """Whether shapes and meaning of every tensor of the unit agree."""
        old, new = self.export.card.model, self.chosen
        saved = {name for name in self.tensors if _unit(name) == unit}
        if unit.endswith(" experts"):
            agree = _expert_facts(old) == _expert_facts(new) and targets.keys() <= saved  # a shard has some of them
        elif unit.endswith((" LoRA", TASKS_OWN)):
            ranks = [m.lora_task_rank if unit.endswith(TASKS_OWN) else m.lora_rank for m in (old, new)]
            scales = [_scale(model.lora_alpha, rank) for model, rank in zip((old, new), ranks, strict=True)]
            agree = scales[0] == scales[1] and targets.keys() == saved
        elif unit.endswith(" head") and reads_levels(new.head):
            agree = targets.keys() == saved and old.head == new.head and self._same_levels(old)
        else:
            agree = targets.keys() == saved
        return agree and all(self._same_shape(name, target) for name, target in targets.items())

    def _same_levels(self, old: ModelSettings) -> bool:
        """Whether the heads of both read the same levels of the backbone, which is the same."""
        there, here = (
            model.levels or spread(self.num_levels, reads_levels(model.head)) for model in (old, self.chosen)
        )
        return there == here and old.head_args == self.chosen.head_args

    def _same_shape(self, name: str, target: Tensor) -> bool:
        first = 1 if name.endswith(BY_TASK) else 0
        return self.tensors[name].shape[first:] == target.shape[first:]

    def _copy(self, targets: Mapping[str, Tensor], model: MultiTaskViT) -> bool:
        """Copy one unit; False where it is of tasks alone and none is in both models."""
        pairs = [
            (new, self._source_tasks.index(name))
            for new, name in enumerate(model.task_names)
            if name in self._source_tasks
        ]
        for name, target in targets.items():
            if not name.endswith(BY_TASK):
                target.copy_(self.tensors[name])
                continue
            for new, old in pairs:
                target[new].copy_(self.tensors[name][old])
        return bool(pairs) or not all(name.endswith(BY_TASK) for name in targets)


def _unit(name: str) -> str | None:
    """The unit that a tensor belongs to, or None for the backbone's."""
    if found := HEAD.fullmatch(name):
        return f"{found[1]} head"
    if name.startswith("task_embedding."):
        return EMBEDDING
    if found := LAYER.fullmatch(name):
        return f"{found[1]} experts"
    if found := TASK_LORA.fullmatch(name):
        return f"{found[1]}{TASKS_OWN}"
    found = LORA.fullmatch(name)
    return f"{found[1]} LoRA" if found else None


def _listed(units: Sequence[str]) -> str:
    """Heads by name, and how many of the rest: ``semseg head, LoRA of 8 linears, experts of 4 layers``."""
    heads = [unit for unit in units if unit.endswith(" head") or unit == EMBEDDING]
    kinds = {" LoRA": "linears", TASKS_OWN: "linears", " experts": "layers"}
    counts = {kind: sum(unit.endswith(kind) for unit in units) for kind in kinds}
    rest = [f"{kind[1:]} of {count} {kinds[kind]}" for kind, count in counts.items() if count]
    return ", ".join([*heads, *rest]) or "nothing"


def _expert_facts(model: ModelSettings) -> tuple[object, ...]:
    """What must agree, apart from shapes, for each expert to compute the same in the same role, shared or routed."""
    moe = model.moe
    scale = _scale(moe.alpha, moe.rank) if moe.experts == "lora" else 1.0
    return moe.experts, set(moe.adapt) if moe.experts == "lora" else None, moe.num_experts, moe.num_shared, scale


def _scale(alpha: float | None, rank: int) -> float:
    return 1.0 if alpha is None or rank == 0 else alpha / rank


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
