"""Compares the settings of a checkpoint with those of the run that resumes from it: refused, or only listed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ase_dist.config import ON_RESUME, Settings, setting_keys, upgrade_tree
from ase_dist.description import differences


class Differences(NamedTuple):
    """Settings that differ, by key, each with its text.

    ``refused``: "seed is 0 there and 1 here"; ``listed``: "train.lr 0.001 -> 0.0005".
    """

    refused: dict[str, str]
    listed: dict[str, str]


def compare_settings(
    saved: Mapping[str, Any], settings: Settings, *, tasks: Sequence[str], saved_tasks: Sequence[str]
) -> Differences:
    """What differs between the settings ``saved`` in a checkpoint and those of this run, by key.

    A key that ``saved`` lacks, being older than the setting, counts as that setting's default. ``tasks`` and
    ``saved_tasks`` are the names of the tasks in order. What is refused and what may differ: ``config.ON_RESUME``.
    """
    saved = upgrade_tree(saved)
    default, here = Settings().model_dump(mode="json"), settings.model_dump(mode="json")
    refused: dict[str, str] = {}
    listed: dict[str, str] = {}
    for key in setting_keys():
        if key == "data.description":
            of_description = differences(_value(saved, key), _value(here, key))
            refused, listed = refused | of_description[0], listed | of_description[1]
            continue
        if key == "tasks":
            before, now = list(saved_tasks), list(tasks)
            is_refused = sorted(before) != sorted(now)
        else:
            before, now = _value(saved, key, default=_value(default, key)), _value(here, key)
            is_refused = ON_RESUME[key] == "refused"
        is_same = before == now or _meaning(saved, key, before) == _meaning(here, key, now)
        if is_same or ON_RESUME[key] == "ignored":
            continue
        if is_refused:
            refused[key] = f"{key} is {_shown(before)} there and {_shown(now)} here"
        else:
            listed[key] = f"{key} {_shown(before)} -> {_shown(now)}"
    return Differences(refused, listed)


def _value(tree: Mapping[str, Any], key: str, *, default: Any = None) -> Any:
    """The value at a dotted key."""
    value: Any = tree
    for name in key.split("."):
        if not isinstance(value, Mapping) or name not in value:
            return default
        value = value[name]
    return value


def _meaning(tree: Mapping[str, Any], key: str, value: Any) -> Any:
    """``value``, or what None stands for: a LoRA scale of 1."""
    rank = {"model.moe.alpha": "model.moe.rank", "model.lora_alpha": "model.lora_rank"}.get(key)
    return _value(tree, rank) if rank is not None and value is None else value


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, str) else json.dumps(value)
