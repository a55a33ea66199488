"""Every reader of files of others takes a changed file, or refuses it in a sentence that names it; nothing else.

pytest -m nightly tests/fuzz        with ASE_FUZZ_SEED (0), thousands of changed files for each reader
"""

import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.mutations import changes, mutated
from tests.fuzz.readers import READERS
from tests.fuzz.trial import attempt, changed, run

pytestmark = [pytest.mark.single_gpu, pytest.mark.filterwarnings("ignore")]

SLOW = {"pth": 8, "card": 12, "export": 8, "run report": 3, "study report": 3, "checkpoint tensors": 10}  # examples
COUNT = 2000  # inputs of the nightly run for each reader
SEED = int(os.environ.get("ASE_FUZZ_SEED", "0"))  # of the nightly run


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """The valid folder of each reader, made once, and its files' contents."""
    made = {}

    def place(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("fuzz") / "valid"
            folder.mkdir()
            READERS[name].make(folder)
            wholes = {target: (folder / target).read_bytes() for target in READERS[name].targets}
            made[name] = folder, wholes
        return made[name]

    return place


@pytest.mark.parametrize("name", READERS)
def test_a_changed_file_is_read_or_refused_in_a_sentence(name, places):
    reader = READERS[name]
    folder, wholes = places(name)
    first = reader.targets[0]
    assert attempt(reader, folder, first, wholes[first]) == "read"

    @settings(max_examples=SLOW.get(name, 40), deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(st.sampled_from(reader.targets), changes, st.booleans())
    def check(target, drawn, rehash):
        attempt(reader, folder, target, changed(reader, wholes[target], drawn, rehash=rehash))

    check()


EMPTY = [name for name in READERS if name not in ("metrics", "run report", "study report", "hostfile")]


@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_file_is_refused(name, places):
    reader = READERS[name]
    folder, _ = places(name)
    for target in reader.targets:
        assert attempt(reader, folder, target, b"") == "sentence"


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=200), changes)
def test_changes_are_the_same_each_time_and_take_any_bytes(data, drawn):
    assert mutated(data, drawn) == mutated(data, drawn)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", READERS)
def test_thousands_of_changed_files(name, tmp_path, record_property):
    counts = run(name, count=COUNT, seed=SEED, folder=tmp_path)
    record_property("counts", json.dumps(counts))
    assert counts["inputs"] == COUNT
    assert not counts["tracebacks"] and not counts["hangs"] and not counts["crashes"], counts
