"""The experts and routers of any model as one small file: what was trained, without the model that it was trained in.

state = adapter_state(model)                  # or save_adapters(model, "adapters.safetensors")
load_adapter_state(other, state)              # or load_adapters(other, "adapters.safetensors")

Names are those of a checkpoint, without rank and shard: ``blocks.3.mlp.router.weight`` [tasks, N, D] and one tensor for
each expert under its global id, ``blocks.3.mlp.fc1.A.07``. The file's card has the settings of every layer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ase_dist.agreement import on_rank_zero
from ase_dist.errors import UserError, file_error
from ase_dist.files import expand_user, replacing
from ase_dist.json_files import parse_json
from ase_dist.moe import deepspeed_compat
from ase_dist.moe.experts import LoRAExperts
from ase_dist.moe.layer import MoEFFN
from ase_dist.moe.state import check_global_state, expert_names, global_state, load_global_state
from ase_dist.moe.task_ffn import TaskFFN
from ase_dist.versions import versions_of

FORMAT, VERSION = "ase_dist adapters", 1


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The trained tensors of every ``MoEFFN``, ``ASEMoE`` and ``TaskFFN`` in ``model`` by global name, as copies.

    With expert parallelism or ZeRO 3 every rank must call this, and each gets all experts. Raises UserError for a
    model without such a layer.
    """
    state: dict[str, Tensor] = {}
    for path, layer in _layers(model).items():
        with deepspeed_compat.whole(layer.parameters()):
            names = _names(path, layer)
            for name, tensor in global_state(layer).items():
                parts = [tensor] if name == "router" else [expert.clone() for expert in tensor]
                state |= zip(names[name], parts, strict=True)
    return state


def load_adapter_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy what ``adapter_state`` gave into ``model``, whose layers may be sharded otherwise.

    Do this before ``deepspeed.initialize``, whose optimiser takes copies. Raises UserError where names or shapes
    differ, or where an engine has the model already; then nothing has been copied.
    """
    layers = _layers(model)
    if any(deepspeed_compat.is_in_engine(parameter) for parameter in model.parameters()):
        raise UserError(
            "load_adapter_state: DeepSpeed's engine has taken its own copies of the model's weights; load before "
            "deepspeed.initialize"
        )
    wanted = {path: _names(path, layer) for path, layer in layers.items()}
    expected = {name for names in wanted.values() for parts in names.values() for name in parts}
    if odd := sorted(expected.symmetric_difference(state)):
        where = "the model lacks" if odd[0] in state else "the state lacks"
        raise UserError(
            f"load_adapter_state: {len(odd)} names differ, {where} {odd[0]!r}; wanted a model with the same layers at "
            "the same places and the same settings"
        )
    stacked: dict[str, dict[str, Tensor]] = {}
    for path, names in wanted.items():
        stacked[path] = {}
        for name, parts in names.items():
            shapes = {tuple(state[part].shape) for part in parts}
            if len(shapes) > 1:
                raise UserError(f"load_adapter_state: {path}.{name}: got experts of the shapes {sorted(shapes)}")
            stacked[path][name] = state[parts[0]] if name == "router" else torch.stack([state[part] for part in parts])
        try:
            check_global_state(layers[path], stacked[path])
        except UserError as error:
            raise UserError(f"load_adapter_state: {path}: {error}") from None
    for path, layer in layers.items():
        load_global_state(layer, stacked[path])


def save_adapters(model: nn.Module, path: str | PathLike[str]) -> None:
    """Write ``adapter_state`` and a card of the layers' settings to one safetensors file (rank 0 writes it).

    Every rank must call this. Raises UserError for a model without such a layer and where the file cannot be written.
    """
    target, state = Path(expand_user(str(path))), adapter_state(model)
    card = {
        "format": FORMAT,
        "version": VERSION,
        "layers": {name: _settings(layer) for name, layer in _layers(model).items()},
        "versions": versions_of("ase-dist", "torch"),
    }

    def write() -> None:
        try:
            with replacing(target) as temporary:
                save_file({n: t.cpu().contiguous() for n, t in state.items()}, temporary, {"card": json.dumps(card)})
        except OSError as error:
            raise file_error(error, f"{target}: cannot be written ({error.strerror or error})") from None

    on_rank_zero(write)


def load_adapters(model: nn.Module, path: str | PathLike[str]) -> None:
    """Read what ``save_adapters`` wrote into ``model``; see ``load_adapter_state``.

    Raises UserError for any other file, and where a setting of a layer differs (the names of those that do); then
    nothing has been copied.
    """
    source = Path(expand_user(str(path)))
    try:
        with safe_open(source, framework="pt") as file:
            card = parse_json((file.metadata() or {}).get("card", "null"))
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, UserError) as error:
        raise file_error(
            error, f"{source}: cannot be read as adapters ({error}), wanted a file of save_adapters"
        ) from None
    if not isinstance(card, dict) or card.get("format") != FORMAT or not isinstance(card.get("layers"), dict):
        raise UserError(f"{source}: got a safetensors file without a card of adapters, wanted one of save_adapters")
    if card.get("version") != VERSION:
        raise UserError(f"{source}: got format version {card.get('version')}, this ase_dist reads {VERSION}")
    here, there = {name: _settings(layer) for name, layer in _layers(model).items()}, card["layers"]
    if odd := sorted(here.keys() ^ there.keys()):
        of = "the file" if odd[0] in there else "the model"
        raise UserError(
            f"{source}: {len(odd)} layers differ, {odd[0]!r} is only in {of}; wanted the same kind of model"
        )
    for name, settings in here.items():
        other = there[name] if isinstance(there[name], dict) else {}
        if different := [key for key in settings if settings[key] != other.get(key)]:
            said = ", ".join(f"{key} is {other.get(key)} there and {settings[key]} here" for key in different)
            raise UserError(f"{source}: {name}: {said}; build the model's layers with the settings of the file")
    load_adapter_state(model, state)


def _layers(model: nn.Module) -> dict[str, MoEFFN]:
    """The layers by the path of the FFN that each stands for.

    Left out is what torch.compile ("_orig_mod"), DistributedDataParallel and DeepSpeed's engine ("module") add.
    """
    found: dict[str, MoEFFN] = {}
    inside = {id(module.layer) for module in model.modules() if isinstance(module, TaskFFN)}
    for path, module in model.named_modules():
        layer = module.layer if isinstance(module, TaskFFN) else module
        if isinstance(layer, MoEFFN) and not (module is layer and id(layer) in inside):
            plain = f"{path}.".replace("_orig_mod.", "").removeprefix("module.")
            found[plain.removesuffix(".") or "layer"] = layer
    if not found:
        raise UserError(
            f"model: got a {type(model).__name__} without a MoEFFN, ASEMoE or TaskFFN; put one in the place of its FFN"
        )
    return found


def _names(path: str, layer: MoEFFN) -> dict[str, list[str]]:
    """The global names of each tensor of ``global_state``: one for the router, one an expert for all others."""
    ids = range(layer.num_experts)
    names = {name: expert_names(f"{path}.{name}", ids, count=layer.num_experts) for name in layer.routed.tensors()}
    return {"router": [f"{path}.router.weight"], **names}


def _settings(layer: MoEFFN) -> dict[str, Any]:
    """What decides, with the weights, which function the experts are."""
    lora = layer.routed if isinstance(layer.routed, LoRAExperts) else None
    return {
        "experts": "ffn" if lora is None else "lora",
        "num_experts": layer.num_experts,
        "num_shared": layer.num_shared,
        "k": layer.k,
        "num_tasks": layer.num_tasks,
        "gating": layer.router.gating,
        "width": layer.dim,
        "scale": layer.scale,
        "adapt": None if lora is None else list(lora.places),
    }
