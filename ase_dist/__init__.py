"""Train one vision transformer for many dense-prediction tasks with LoRA mixture-of-experts layers on DeepSpeed."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ase_dist.models.exported import load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> object:
    """Import ``load``, and torch with it, on demand."""
    if name == "load":
        from ase_dist.models.exported import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
