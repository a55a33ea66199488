"""The API reference, made from the docstrings by pdoc into build/api, or into the folder that is named.

A warning is an error: a type or an exported name that does not resolve, a module that cannot be imported.
"""

import inspect
import pkgutil
import sys
import warnings
from importlib import import_module
from pathlib import Path
from typing import get_type_hints

import pdoc

PACKAGE = "ase_dist"
OUT = Path("build") / "api"


def modules():
    """Every module of the package but ``__main__``, imported, by name."""
    package = import_module(PACKAGE)
    found = pkgutil.walk_packages(package.__path__, f"{PACKAGE}.")
    names = [PACKAGE, *(module.name for module in found if not module.name.endswith("__main__"))]
    return {name: import_module(name) for name in names}


def prepare(module, names):
    """Make what pdoc (16.0) does not see visible, and what nobody wrote invisible.

    1. Names of ``__all__`` that are imported on demand, and the modules of a package that has an ``__all__``.
    2. Types of a named tuple's fields, which Python keeps as strings of another module.
    3. Docstrings of constructors that Python or a base class has written, and those of a named tuple's fields.
    """
    if hasattr(module, "__all__"):
        for name in module.__all__:
            setattr(module, name, getattr(module, name))
        below = [name.rpartition(".") for name in names]
        module.__all__ = [*module.__all__, *(child for parent, _, child in below if parent == module.__name__)]
    for kind in vars(module).values():
        if inspect.isclass(kind) and kind.__module__ == module.__name__:
            _prepare_class(kind)


def _prepare_class(kind):
    if "__init__" in vars(kind) and kind.__init__.__doc__ is None:
        kind.__init__.__doc__ = "&#8203;"  # a space of no width: with nothing at all it takes the base class's
    fields = getattr(kind, "_fields", None)
    if issubclass(kind, tuple) and fields:
        hints = get_type_hints(kind)
        kind.__new__.__annotations__ = {field: hints[field] for field in fields}
        kind.__new__.__doc__ = ""
        for field in fields:
            getattr(kind, field).__doc__ = ""


def main():
    """Write the pages."""
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else OUT
    found = modules()
    for module in found.values():
        prepare(module, found)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", DeprecationWarning)
        pdoc.pdoc(PACKAGE, output_directory=out)
    sys.stdout.write(f"{len(found)} modules in {out / 'index.html'}\n")


if __name__ == "__main__":
    pdoc.render.configure(show_source=False)
    main()
