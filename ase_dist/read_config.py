"""Reads settings from YAML files and from ``key=value`` on the command line; says in one sentence what is wrong there.

Neither this module nor ``config`` imports torch, so that ``--help`` and ``--print-config`` answer at once.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ase_dist import typed_yaml
from ase_dist.baselines import apply_baseline
from ase_dist.config import ALIASES, Settings, is_section, setting_keys, type_of
from ase_dist.description import find_description, problem_in, read_description
from ase_dist.errors import UserError, did_you_mean, first_problem
from ase_dist.files import expand_user, is_regular, read_text
from ase_dist.tasks import DATA_SETS

LOGGER = logging.getLogger("ase_dist")
CONFIG_FOLDER = Path(__file__).parent / "configs"
DEFAULT_CONFIG = "scenes"


def load_settings(
    config: str | Path | None = None, overrides: Iterable[str] = (), *, baseline: str | None = None
) -> Settings:
    """Read a shipped config by name or a YAML file by path, change it into ``baseline``, then apply ``overrides``.

    An override is ``key=value``. A ``dataset.yaml`` that ``data.name`` names, or that lies in the folder ``data.root``,
    becomes ``data.description``. Raises UserError with one sentence: the key, what was got, what was wanted, and the
    nearest right name.
    """
    path = find_config(config or DEFAULT_CONFIG)
    tree = read_tree(path)
    if baseline is not None:
        settings = build_settings(tree)
        apply_baseline(tree, baseline, lr=settings.train.lr, output=settings.output)
    changes = list(map(parse_override, overrides))
    changed = deepcopy(tree)
    try:
        return _overridden(changed, changes + _described_data(changed, changes))
    except UserError as error:
        if path.parent != CONFIG_FOLDER:
            try:
                build_settings(tree)
            except UserError as without_overrides:
                if str(without_overrides) == str(error):  # the file's fault, not an override's
                    raise UserError(f"{path}: {error}") from None
        raise


def recorded_settings(config: Path) -> Settings:
    """The settings in the config.yaml of a run as they were; no ``dataset.yaml`` is looked for."""
    try:
        return build_settings(read_tree(config))
    except UserError as error:
        raise UserError(str(error) if str(config) in str(error) else f"{config}: {error}") from None


def override_settings(settings: Settings, overrides: Iterable[str] | Mapping[str, Any]) -> Settings:
    """``settings`` with ``key=value`` texts or values by dotted key, in their order; UserError as ``load_settings``.

    The description of the data stays unless the data are named anew.
    """
    tree = settings.model_dump(mode="json")
    changes = list(overrides.items() if isinstance(overrides, Mapping) else map(parse_override, overrides))
    return _overridden(tree, changes + (_described_data(tree, changes) if _name_data(changes) else []))


def build_settings(tree: Mapping[str, Any]) -> Settings:
    """Validate a plain dictionary as a tree of settings; UserError names the first wrong key."""
    try:
        settings = Settings.model_validate(tree)
    except ValidationError as error:
        raise UserError(_sentence(error)) from None
    settings.chosen_tasks()
    return settings


def _sentence(error: ValidationError) -> str:
    """The first problem of a validation as one sentence."""
    problem = first_problem(error)
    if problem.keys[:2] == ("data", "description"):
        return problem_in(error)
    if problem.kind == "extra_forbidden":
        *path, name = problem.keys
        section = type_of(".".join(path))
        hint = did_you_mean(name, section.model_fields) if is_section(section) else ""
        elsewhere = [key for key in setting_keys() if key.rsplit(".", 1)[-1] == name]
        if not hint and elsewhere:
            hint = f", did you mean {elsewhere[0]!r}?"
        return f"{problem.where}: there is no such setting{hint}"
    if problem.kind == "value_error":  # of a registry: a complete sentence
        return f"{problem.where}: {problem.why}"
    if problem.kind in ("tuple_type", "list_type") and isinstance(problem.got, str) and problem.got.isprintable():
        return f"{problem.where}: got {problem.got!r}, wanted a list; write {problem.where}=[{problem.got}]"
    return f"{problem.where}: got {problem.got!r}, {problem.why}"


def shipped_configs() -> list[str]:
    """Names of the configs that come with the package."""
    return sorted(path.stem for path in CONFIG_FOLDER.glob("*.yaml"))


def find_config(config: str | Path) -> Path:
    """The file of a shipped config's name or of a path; UserError if there is neither."""
    text = expand_user(str(config))
    path, names = Path(text), shipped_configs()
    if path.suffix in {".yaml", ".yml"} and is_regular(path):
        return path
    if text in names:
        return CONFIG_FOLDER / f"{text}.yaml"
    if path.is_file():
        raise UserError(f"--config: got {text!r}, wanted a name that ends with .yaml or .yml, or a shipped config's")
    stems = dict.fromkeys((path.name, path.stem)) if path.name else ()
    others = [path.with_name(f"{stem}{suffix}") for stem in stems for suffix in (".yaml", ".yml")]
    others.append(path / "config.yaml")  # of a run
    there = next((other for other in others if other.is_file()), None)
    hint = did_you_mean(text, names) if there is None else f", did you mean {str(there)!r}?"
    raise UserError(f"--config: no file and no shipped config {text!r}{hint} (shipped: {', '.join(names)})")


def read_tree(path: Path) -> dict[str, Any]:
    """The plain tree of settings in a YAML file, under today's keys, not yet validated; UserError with one sentence."""
    text = read_text(path, max_bytes=typed_yaml.MOST_BYTES)
    try:
        tree = typed_yaml.from_yaml(text, type_of)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not plain YAML: {' '.join(str(error).split()):.300}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if tree is None:
        raise UserError(f"{path}: the file is empty, wanted settings such as 'seed: 0'")
    if not isinstance(tree, dict):
        raise UserError(f"{path}: got a {type(tree).__name__} at the top, wanted keys such as 'seed: 0'")
    return upgrade_tree(tree, warn=True)


def upgrade_tree(tree: Mapping[str, Any], *, warn: bool = False) -> dict[str, Any]:
    """A copy of a tree, of this or an earlier version, with ``ALIASES`` applied; ``warn`` logs which were.

    Raises UserError where a setting stands under its old and its new key.
    """
    upgraded = deepcopy(dict(tree))
    moved = []
    for old, new in ALIASES.items():
        old_path, _, old_name = old.rpartition(".")
        new_path, _, new_name = new.rpartition(".")
        branch = _branch(upgraded, old_path)
        if old_name in branch:
            value = branch.pop(old_name)
            if new_name in _branch(upgraded, new_path):
                raise UserError(f"{old} is called {new} now, and both are set; keep {new}")
            _set(upgraded, new, value)
            moved.append(f"{old} is {new}")
    if moved and warn:
        LOGGER.warning("renamed settings, whose old names will go: %s", ", ".join(moved))
    return upgraded


def to_yaml(settings: Settings) -> str:
    """The whole tree as YAML, defaults included; reading it back gives equal settings."""
    return typed_yaml.to_yaml(settings.model_dump(mode="json"))


def _overridden(tree: dict[str, Any], changes: Iterable[tuple[str, Any]]) -> Settings:
    for key, value in changes:
        _set(tree, key, value)
    return build_settings(tree)


def _name_data(changes: Iterable[tuple[str, Any]]) -> bool:
    return any(key in ("data", "data.name", "data.root", "data.sets") for key, _ in changes)


def _described_data(tree: Mapping[str, Any], changes: Sequence[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Further changes: the description of the data that ``tree`` with ``changes`` names, where there is one.

    A description that ``tree`` holds already, a run's own, stays unless ``changes`` name other data, with a
    description or without.
    """
    merged = deepcopy(dict(tree))
    for key, value in changes:
        _set(merged, key, value)
    data, held = _branch(merged, "data"), _branch(tree, "data.description")
    if isinstance(sets := data.get("sets"), list) and sets:
        return [("data.description", None), ("data.sets", [_described_set(each, data.get("root")) for each in sets])]
    name, root = data.get("name"), data.get("root")
    if not isinstance(name, str | None):
        return []  # the check of the settings refuses it
    if (held and not _name_data(changes)) or any(key.startswith("data.description") for key, _ in changes):
        return []
    is_own = bool(held) and name == held.get("name")  # what the run calls it, not a place
    place = find_description(None if is_own else name, root)
    if place is not None:
        description = read_description(place)
        is_place = name is not None and find_description(name, None) is not None
        if name is not None and name not in (*DATA_SETS, description.name) and not is_place:
            raise UserError(
                f"data.name: got {name!r}, but {place} describes {description.name!r}; leave data.name out"
                f"{did_you_mean(str(name), [*DATA_SETS, description.name])}"
            )
        found = [("data.name", description.name), ("data.description", description.model_dump(mode="json"))]
        return found if root is not None else [*found, ("data.root", str(place.parent))]
    return [("data.description", None)] if held and not is_own else []


def _described_set(each: Any, folder: str | None) -> Any:
    """An entry of ``data.sets`` with the description of the dataset.yaml that it names, or that lies in its root."""
    if not isinstance(each, dict) or each.get("description"):
        return each
    name, root = each.get("name"), each.get("root")
    if name is not None and root is None and (named := find_description(str(name), None)) is not None:
        root = str(named.parent.absolute())  # its own folder, not data.root
    parts = [expand_user(str(part)) for part in (folder, root) if part]
    place = str(Path(*parts)) if parts else None
    found = dict(_described_data({"data": {"name": name, "root": place}}, []))
    if not found:
        return each
    root = found.get("data.root", root)
    return {**each, "name": found["data.name"], "description": found["data.description"], "root": root}


def parse_override(override: str) -> tuple[str, Any]:
    """The dotted key, as it is called today, and the value of ``key=value``.

    A text or a path is taken as typed, so ``output=runs/exp #2`` needs no quotes of YAML's. Raises UserError.
    """
    key, separator, text = override.partition("=")
    key = key.strip()
    if not separator or not key:
        raise UserError(f"{override!r}: wanted key=value, such as train.lr=1e-4")
    value = typed_yaml.from_argument(text, type_of, key=key)
    if key in ALIASES:
        LOGGER.warning("renamed setting, whose old name will go: %s is %s", key, ALIASES[key])
    return ALIASES.get(key, key), value


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    """Put ``value`` at a dotted key. What a section is not told stays; a setting that is a dictionary is replaced."""
    *path, name = key.split(".")
    branch = tree
    for depth, part in enumerate(path, start=1):
        if part not in branch:  # a setting that is a dictionary keeps the entries that it has by default
            default: Any = Settings()
            for each in path[:depth]:
                default = getattr(default, each, None)
            branch[part] = dict(default) if isinstance(default, dict) else {}
        branch = branch[part]
        if not isinstance(branch, dict):
            raise UserError(f"{key}: {part!r} is a value, not a section")
    if isinstance(value, dict) and isinstance(branch.get(name), dict) and is_section(type_of(key)):
        for inner, each in value.items():
            _set(tree, f"{key}.{inner}", each)
    else:
        branch[name] = value


def _branch(tree: Any, key: str) -> dict[str, Any]:
    """The dictionary at a dotted key; an empty one where there is none."""
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree if isinstance(tree, dict) else {}
