"""What the tests of data sets check errors by."""

from tests.data.conftest import one_sentence  # noqa: F401  (the fixture)
