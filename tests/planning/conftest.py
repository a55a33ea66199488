"""The tiny models of the tests of ``ase_dist.models``."""

from tests.models.conftest import model_for, settings_for  # noqa: F401  (fixtures)
