"""Generated scenes, as the tests of training have them."""

from tests.training.conftest import scenes

__all__ = ["scenes"]
