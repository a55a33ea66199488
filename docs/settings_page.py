"""The tables of docs/settings.md, from the typed tree in ase_dist/config.py.

    python docs/settings_page.py    # prints them as Markdown

Type and range are those of pydantic's JSON schema, defaults those of ``Settings()``, what a resumed run does those of
``ON_RESUME``. A key without a description is an error.
"""

import json
import sys

from pydantic import AfterValidator

from ase_dist.config import ON_RESUME, Section, SetSettings, Settings
from ase_dist.registries import Registry
from ase_dist.typed_yaml import WrittenAs

TYPES = {"integer": "whole number", "number": "number", "boolean": "true or false", "string": "text",
         "array": "list", "object": "mapping", "null": "null"}  # fmt: skip
LIMITS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


def sections():
    """Every section of the tree as Markdown: a heading, what it is for, and a definition of each key."""
    found = "\n".join(_section(section, prefix, level) for section, prefix, level in _tree(Settings, "", 3))
    return f"{found}\n{_section(SetSettings, 'data.sets[].', 3)}"


def without_description(section=Settings):
    """The dotted keys that lack a description, and the sections that lack a docstring of their own."""
    lacking = []
    for each, prefix, _ in [*_tree(section, "", 3), *((SetSettings, "data.sets[].", 3),) * (section is Settings)]:
        lacking += [each.__name__] * (not (vars(each).get("__doc__") or "").strip())
        lacking += [prefix + name for name, field in _keys(each) if not (field.description or "").strip()]
    return lacking


def _tree(section, prefix, level):
    """A section and those below it, each with the prefix of its keys and the level of its heading."""
    yield section, prefix, level
    for name, field in section.model_fields.items():
        if _is_section(field.annotation):
            yield from _tree(field.annotation, f"{prefix}{name}.", min(level + bool(prefix), 5))


def _is_section(annotation):
    return isinstance(annotation, type(Section)) and issubclass(annotation, Section)


def _keys(section):
    return [(field.alias or name, field) for name, field in section.model_fields.items()
            if not _is_section(field.annotation)]  # fmt: skip


def _section(section, prefix, level):
    lacking = without_description(section)
    if lacking:
        raise ValueError(f"settings without a description: {', '.join(lacking)}")
    heading = f"`{prefix.rstrip('.')}`" if prefix else "The run"
    parts = [f"{'#' * level} {heading}\n\n{section.__doc__.strip()}\n"]
    schema = section.model_json_schema(by_alias=True)
    for name, field in _keys(section):
        key = prefix + name
        facts = [_type(schema["properties"][name], field), _default(section, name, field)]
        facts += [f"on resume {ON_RESUME[key]}"] if key in ON_RESUME else []
        parts.append(f"(setting-{key})=\n`{key}`\n: {field.description}\n\n  {'; '.join(facts)}\n")
    return "\n".join(parts)


def _default(section, name, field):
    if field.is_required():
        return "must be given"
    value = field.get_default(call_default_factory=True)
    if not section.model_fields.keys() - {name} or section is SetSettings:
        return f"default `{json.dumps(value)}`"
    return f"default `{json.dumps(section().model_dump(mode='json', by_alias=True)[name])}`"


def _type(schema, field):
    for each in field.metadata:
        registry = getattr(getattr(each, "func", None), "__self__", None) if isinstance(each, AfterValidator) else None
        if isinstance(registry, Registry):
            return f"one of {_listed(registry)}, or one of your own"
        if isinstance(each, WrittenAs):
            return "a whole number, or two as `448x576`"
    return _of_schema(schema)


def _of_schema(schema):
    if "enum" in schema or "const" in schema:
        return _listed(schema.get("enum", [schema.get("const")]))
    if "anyOf" in schema:
        return " or ".join(_of_schema(each) for each in schema["anyOf"])
    kind = "path" if schema.get("format") == "path" else TYPES[schema.get("type", "object")]  # a $ref is a mapping
    limits = " and ".join(f"{sign} {schema[name]}" for name, sign in LIMITS.items() if name in schema)
    items = schema.get("items") or next(iter(schema.get("prefixItems", [])), None)
    if kind == "list" and items:
        return f"list of {_of_schema(items)}"
    if kind == "mapping" and "enum" in schema.get("propertyNames", {}):
        return f"mapping of {_listed(schema['propertyNames']['enum'])} to {_of_schema(schema['additionalProperties'])}"
    if kind == "mapping" and isinstance(schema.get("additionalProperties"), dict):
        return f"mapping of text to {_of_schema(schema['additionalProperties'])}"
    return f"{kind} {limits}".strip()


def _listed(names):
    return ", ".join(f"`{str(name).lower() if isinstance(name, bool) else name}`" for name in names)


if __name__ == "__main__":
    sys.stdout.write(sections())
