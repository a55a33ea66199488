"""The API pages of the site: one page per package of ase_dist, with every module of it, from the docstrings."""

import pkgutil
import re
from importlib import import_module

from docutils.nodes import SkipNode

__all__ = ["SkipNode", "markdown_to_rst", "write"]

PACKAGE = "ase_dist"


def packages():
    """The modules of each package by the package's name, itself first; ``__main__`` is left out."""
    found = {PACKAGE: [PACKAGE]}
    for module in pkgutil.walk_packages(import_module(PACKAGE).__path__, f"{PACKAGE}."):
        if module.ispkg:
            found[module.name] = [module.name]
        elif not module.name.endswith("__main__"):
            found[module.name.rpartition(".")[0]].append(module.name)
    return found


def write(folder):
    """Write a page per package and their table of contents into ``folder``; files that would not change stay."""
    folder.mkdir(exist_ok=True)
    pages = {f"{package}.rst": _page(package, modules) for package, modules in packages().items()}
    entries = "\n".join(f"   {name.removesuffix('.rst')}" for name in sorted(pages))
    pages["index.rst"] = (
        f"{_heading('API', '=')}\nFrom the docstrings of every module, one page per package. What a program imports is "
        "exported by :doc:`ase_dist` and :doc:`ase_dist.moe`; the tables to extend are in ``ase_dist.registries``.\n\n"
        f".. toctree::\n   :maxdepth: 1\n\n{entries}\n"
    )
    for path in folder.glob("*.rst"):
        if path.name not in pages:
            path.unlink()
    for name, text in pages.items():
        path = folder / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def _page(package, modules):
    parts = [_heading(package, "=")]
    exported = getattr(import_module(package), "__all__", ())
    for module in modules:
        if module != package:
            parts.append(_heading(module.removeprefix(f"{package}."), "-"))
        parts.append(f".. automodule:: {module}\n   :members:\n   :show-inheritance:\n")
        if module == package and exported:
            parts.append(f"Exported: {', '.join(f'``{name}``' for name in exported)}.\n")
    return "\n".join(parts)


def _heading(text, line):
    return f"{text}\n{line * len(text)}\n"


def markdown_to_rst(app, what, name, obj, options, lines):
    """Where docstrings have what only Markdown reads: tables and indented blocks are shown as they are typed.

    The arguments are those of the event ``autodoc-process-docstring``, and ``lines`` is changed in place.
    """
    changed, shown = [], False
    for line in lines:
        indent = len(line) - len(line.lstrip())
        is_row = line.lstrip().startswith("|") and line.rstrip().endswith("|")
        begins = is_row or (indent >= 4 and (not changed or not changed[-1]))
        if begins and not shown:
            changed += ["", f"{' ' * (0 if indent >= 4 else indent)}.. code-block:: text", ""]
        shown = begins or (shown and (not line.strip() or indent >= 4))
        if shown and is_row:
            changed.append(f"   {line}")
        elif shown or not line.strip():
            changed.append(line)
        else:
            changed += ([""] if changed and changed[-1].lstrip().startswith("|") else []) + [_without_bars(line)]
    lines[:] = changed


def _without_bars(line):
    """A single bar, which RST takes for a substitution, and a star before a word stand for themselves."""
    parts = re.split(r"(``.*?``)", line)
    return "".join(p if p.startswith("``") else re.sub(r"([|*])(?=\S)", r"\\\1", p) for p in parts)
