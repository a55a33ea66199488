"""For all tests: no network, few threads, the accelerator that DeepSpeed finds, the real photographs and weights."""

import os
import signal
from pathlib import Path

# Before torch is first imported, and for every process that a test starts.
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing may reach the hub, also where there is a way to it
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tensors are tiny, and several processes share two cores

import pytest

from tests.lanes import DEEPSPEED, FAST, is_elsewhere

# A shell ignores these for what it starts in the background, and every process of a test would inherit that.
HANDLERS = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGQUIT: signal.SIG_DFL,
    signal.SIGHUP: signal.SIG_DFL,
}
for number, handler in HANDLERS.items():
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)

TESTS = Path(__file__).parent
REPOSITORY = Path(__file__).parents[1]
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.hookimpl(tryfirst=True)  # before pytest selects by markers
def pytest_collection_modifyitems(items):
    for item in items:
        module = item.path.relative_to(TESTS).as_posix() if item.path.is_relative_to(TESTS) else ""
        if module in FAST and not is_elsewhere({mark.name for mark in item.iter_markers()}):
            item.add_marker("fast")
        if module in DEEPSPEED:
            item.add_marker("deepspeed")


@pytest.fixture(autouse=True)
def launcher_variables():
    """A run in the test's own process names itself the only rank, with a port: that is for no other process."""
    before = {name: os.environ.get(name) for name in LAUNCHER}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture(scope="session")
def device():
    """The device of a ``single_gpu`` test: the first of the accelerator that DeepSpeed finds, CPU included."""
    import torch
    from deepspeed.accelerator import get_accelerator

    name = get_accelerator().device_name()
    return torch.device(name) if name == "cpu" else torch.device(name, 0)


@pytest.fixture
def one_sentence():
    """Checks an error for users: one line that has each of ``parts`` and the word for what was got or is missing."""

    def check(raised, *parts):
        message = str(raised.value)
        assert "\n" not in message
        assert not message.endswith(".")
        for part in parts:
            assert str(part) in message, message

    return check


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """The folder in which ``tests.training.tiny_runs`` finds its generated scenes."""
    from ase_dist.scenes.make import ensure_scenes
    from tests.training.tiny_runs import SCENE_SIZE, TRAIN_IMAGES, VAL_IMAGES

    root = tmp_path_factory.mktemp("scenes")
    ensure_scenes(root, train=TRAIN_IMAGES, val=VAL_IMAGES, size=SCENE_SIZE, seed=0)
    return root


@pytest.fixture(scope="session")
def shared_data():
    """The folder with data/ and weights/ that ASE_SHARED names, by default ../shared beside the repository."""
    folder = Path(os.environ.get("ASE_SHARED", REPOSITORY.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no real photographs and weights at {folder}; name their folder with ASE_SHARED")
    return folder
