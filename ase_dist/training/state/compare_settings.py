"""Compares the settings of a checkpoint with those of the run that resumes from it: refused, or only listed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ase_dist.baselines import baselines
from ase_dist.config import ON_RESUME, SetSettings, Settings, setting_keys
from ase_dist.description import differences
from ase_dist.read_config import upgrade_tree

_NOTHING = object()


class Differences(NamedTuple):
    """Settings that differ, by key, each with its text.

    ``refused``: "seed is 0 there and 1 here"; ``listed``: "train.lr 0.001 -> 0.0005". ``baseline`` is the --baseline
    that explains what is refused, as a clause; empty where none does.
    """

    refused: dict[str, str]
    listed: dict[str, str]
    baseline: str = ""

    @property
    def why_refused(self) -> str:
        """All that is refused as a clause, what explains it first."""
        return ": ".join(filter(None, (self.baseline, ", ".join(self.refused.values()))))


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
        if key in ("data.description", "data.sets"):
            compare = differences if key == "data.description" else _set_differences
            found = compare(_value(saved, key), _value(here, key))
            refused, listed = refused | found[0], listed | found[1]
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
    trees = {"with": saved, "without": here}
    singles = {"with": len(saved_tasks) == 1, "without": len(tasks) == 1}
    for started, tree in trees.items() if refused else ():
        if name := _baseline_of(tree, refused, is_single=singles[started]):
            return Differences(refused, listed, f"the run was started {started} --baseline {name} or its settings")
    return Differences(refused, listed)


def _baseline_of(tree: Mapping[str, Any], refused: Mapping[str, str], *, is_single: bool) -> str:
    """The baseline whose settings ``tree`` has, and that sets all that is ``refused``; "" where there is none.

    Which one a run was started with is not recorded: its settings tell. ``is_single``: it is of one task alone, which
    tells stl_vit from mtl_vit.
    """
    default = Settings().model_dump(mode="json")
    found = []
    for name, baseline in baselines().items():
        named = {"model": baseline.model}
        sets = {key: _value(named, key, default=_NOTHING) for key in setting_keys()}
        sets = {key: value for key, value in sets.items() if value is not _NOTHING}
        is_it = all(_value(tree, key, default=_value(default, key)) == value for key, value in sets.items())
        if is_it and refused.keys() <= sets.keys() | {"tasks"}:
            found.append((baseline.separate != is_single, len(sets), name))
    return min(found)[-1] if found else ""


def _set_differences(before: Any, now: Any) -> tuple[dict[str, str], dict[str, str]]:
    """What differs between ``data.sets`` of a checkpoint and this run's: refused, and only listed, by dotted key.

    A folder may have moved; a description as ``description.differences`` says.
    """
    there, here = ({SetSettings.model_validate(each).title: each for each in sets or ()} for sets in (before, now))
    if list(there) != list(here):
        names = (", ".join(sets) or "none" for sets in (there, here))
        return {"data.sets": "data.sets are {} there and {} here".format(*names)}, {}
    refused: dict[str, str] = {}
    listed: dict[str, str] = {}
    for title, each in here.items():
        prefix = f"data.sets.{title}"
        for old, new in zip(
            differences(there[title]["description"], each["description"]), (refused, listed), strict=True
        ):
            new |= {key.replace("data", prefix, 1): text.replace("data", prefix, 1) for key, text in old.items()}
        for key in each.keys() - {"description"}:
            if (one := there[title].get(key)) != each[key]:
                if key == "root":
                    listed[f"{prefix}.{key}"] = f"{prefix}.{key} {_shown(one)} -> {_shown(each[key])}"
                else:
                    refused[f"{prefix}.{key}"] = f"{prefix}.{key} is {_shown(one)} there and {_shown(each[key])} here"
    return refused, listed


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
