"""Build the model of a run from its settings: backbone, experts, LoRA, heads, and what of it is trained."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from ase_dist.agreement import raise_together
from ase_dist.collectives import gather_objects, rank
from ase_dist.config import ModelSettings, Settings
from ase_dist.errors import UserError
from ase_dist.hub import is_hub
from ase_dist.models.activation_checkpointing import checkpoint_block
from ase_dist.models.backbone import Backbone, build_backbone
from ase_dist.models.export_file import fetch_export
from ase_dist.models.heads import Level
from ase_dist.models.init_from import ExportInitializer
from ase_dist.models.levels import build_heads, chosen_levels, reads_levels
from ase_dist.models.lora import add_lora
from ase_dist.models.multitask import MultiTaskViT
from ase_dist.models.multitask_resnet import MultiTaskModel, MultiTaskResNet
from ase_dist.models.resnet import RESNETS, STRIDE, build_resnet, is_resnet
from ase_dist.models.seeded import seeded_initialisation
from ase_dist.models.sharing import TRUNKS
from ase_dist.models.swin import SwinTaskBlock
from ase_dist.models.weight_files import fetch_weights
from ase_dist.moe import MoEFFN
from ase_dist.seeding import derive_seed
from ase_dist.tasks import Task

ExpertLayer = Literal["deepspeed", "plain"]


def build_model(
    settings: Settings, tasks: tuple[Task, ...], *, expert_layer: ExpertLayer = "deepspeed"
) -> MultiTaskModel:
    """The model of ``settings`` for ``tasks``, on the CPU, every tensor a function of the seed and its own name.

    ``expert_layer``: 'deepspeed' for training under the engine; 'plain' layers need no DeepSpeed and hold all experts
    (ZeRO-3, inference). With ``model.tune=adapters`` the backbone is frozen, its norms included, as LoRA does: trained
    are experts, routers, LoRA, task embedding and heads. ``full`` trains everything, as MTL-ViT and M3ViT do.
    ``model.init_from`` starts from an exported model, with its backbone in place of ``model.pretrained``
    (``init_from.ExportInitializer`` says what is taken). A ResNet as ``model.backbone`` gives one of the convolutional
    baselines, see ``multitask_resnet``.

    Raises UserError naming the setting where settings do not fit together.
    """
    if is_resnet(settings.model.backbone):
        return _build_resnet_model(settings, tasks)
    if settings.model.sharing != "shared":
        raise UserError(
            f"model.sharing: got {settings.model.sharing!r} for {settings.model.backbone}, wanted 'shared': the "
            f"others are for {', '.join(RESNETS)}"
        )
    return _build_vit_model(settings, tasks, expert_layer)


def fetch_from_hub(settings: Settings) -> Settings:
    """``settings`` with ``model.pretrained`` and ``model.init_from`` on the hub pinned to the commit of this moment.

    Rank 0 fetches the files; the others then find them in the cache or, on another host, fetch the same commit.
    Collective. Raises as ``hub.fetch`` on all ranks.
    """
    chosen = settings.model

    def fetch() -> dict[str, str]:
        if chosen.init_from is not None:
            return {"init_from": str(fetch_export(chosen.init_from).pinned)} if is_hub(chosen.init_from) else {}
        return {"pretrained": str(fetch_weights(chosen.pretrained).pinned)} if is_hub(chosen.pretrained) else {}

    if not any(map(is_hub, (chosen.pretrained, chosen.init_from or ""))):
        return settings
    found = gather_objects(raise_together(lambda: fetch() if rank() == 0 else {}))[0]
    assert isinstance(found, dict)
    return settings.model_copy(update={"model": chosen.model_copy(update=found)})


def _build_resnet_model(settings: Settings, tasks: tuple[Task, ...]) -> MultiTaskResNet:
    """UserError where a setting asks a ResNet for what it does not have: experts, LoRA, a frozen backbone."""
    chosen, size = settings.model, settings.data.size
    wanted = {
        "model.moe.enabled": (chosen.moe.enabled, False),
        "model.lora_rank": (chosen.lora_rank, 0),
        "model.tune": (chosen.tune, "full"),
        "model.checkpoint_activations": (chosen.checkpoint_activations, "none"),
        "model.drop_path": (chosen.drop_path, 0.0),
        "model.init_from": (chosen.init_from, None),
    }
    for name, (got, right) in wanted.items():
        if got != right:
            raise UserError(
                f"{name}: got {got} for {chosen.backbone}, wanted {right}: a ResNet is trained whole and has no "
                "experts; the baselines of --baseline set all of this"
            )
    if reads_levels(chosen.head):
        raise UserError(
            f"model.head: got {chosen.head!r}, which reads several levels, for {chosen.backbone}, wanted one on the "
            "last level alone: pup, linear or pup_linear"
        )
    size.require_divisible(STRIDE, what=f"the {STRIDE}-pixel strides of {chosen.backbone}")
    parts = build_resnet(chosen.backbone, weights=chosen.pretrained, args=chosen.backbone_args, seed=settings.seed)
    grid = size.height // STRIDE, size.width // STRIDE
    heads = build_heads(settings, tasks, [Level(parts.widths[-1], grid, STRIDE)])
    with seeded_initialisation(settings.seed, "sharing"):
        trunk = TRUNKS[chosen.sharing](parts, len(heads))
    return MultiTaskResNet(trunk, heads)


def _build_vit_model(settings: Settings, tasks: tuple[Task, ...], expert_layer: ExpertLayer) -> MultiTaskViT:
    chosen = settings.model
    start = None if chosen.init_from is None else ExportInitializer(chosen)
    backbone = build_backbone(
        chosen.backbone,
        size=settings.data.size,
        weights="none" if start else chosen.pretrained,
        args=chosen.backbone_args,
        drop_path=chosen.drop_path,
        seed=settings.seed,
    )
    if start:
        start.fill_backbone(backbone)
    for module in (backbone.stem, *backbone.blocks, backbone.norm):
        module.requires_grad_(False)
    _add_adapters(backbone, chosen, len(tasks), seed=settings.seed, expert_layer=expert_layer)
    unit = "blocks" if len(backbone.levels) == len(backbone.blocks) else "stages"
    numbers = chosen_levels(chosen, len(backbone.levels), unit=unit)
    heads = build_heads(settings, tasks, [backbone.levels[number - 1] for number in numbers])
    model = MultiTaskViT(backbone, heads, levels=numbers, task_embedding=chosen.task_embedding)
    if start:
        start.fill_adapters(model)
    if chosen.tune == "full":
        model.requires_grad_(True)
    for block in model.blocks:
        checkpoint_block(block, chosen.checkpoint_activations)
    return model


def _add_adapters(
    backbone: Backbone, chosen: ModelSettings, num_tasks: int, *, seed: int, expert_layer: ExpertLayer
) -> None:
    """MoE in every n-th block (with n = 2 the second, the fourth, ... as M3ViT), LoRA in the FFNs of the others.

    Pairs of each task's own are not on the linears under experts, which see tokens in other orders.
    """
    for index, block in enumerate(backbone.blocks):
        name = f"blocks.{index}"
        plain: dict[str, Any] = {"rank": chosen.lora_rank, "alpha": chosen.lora_alpha}
        lora = {**plain, "task_rank": chosen.lora_task_rank, "num_tasks": num_tasks, "streams": block.streams}
        add_lora(block.attn, seed=derive_seed(seed, name, "attn"), **lora)
        if isinstance(block, SwinTaskBlock):
            add_lora(block.downsample, seed=derive_seed(seed, name, "downsample"), **lora)
        layer = None
        if chosen.moe.enabled and (index + 1) % chosen.moe.every_n_blocks == 0:
            layer = _moe_layer(block.mlp, chosen, num_tasks, seed=derive_seed(seed, name, "moe"), kind=expert_layer)
            # LoRA goes on those linears under the experts that carry none, as in the paper
            ffn, places = (layer, []) if layer.base is None else (layer.base, layer.linears_without_experts())
        else:
            ffn, places = block.mlp, None
        add_lora(ffn, seed=derive_seed(seed, name, "mlp"), only=places, **(lora if layer is None else plain))
        if layer is not None:
            block.mlp = layer


def _moe_layer(base: nn.Module, chosen: ModelSettings, num_tasks: int, *, seed: int, kind: ExpertLayer) -> MoEFFN:
    moe = chosen.moe
    names = ("num_experts", "k", "num_shared", "rank", "alpha", "experts", "hidden", "adapt", "gating", "aux_losses")
    options: dict[str, Any] = {**{name: getattr(moe, name) for name in names}, "num_tasks": num_tasks, "seed": seed}
    try:
        if kind == "plain":
            return MoEFFN(base, sync_statistics=True, **options)
        from ase_dist.moe import ASEMoE

        return ASEMoE(base, ep_size=moe.ep_size, dispatch=moe.dispatch, **options)
    except UserError as error:
        raise UserError(f"model.moe on {chosen.backbone}: {error}") from None
