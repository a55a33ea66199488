"""What a container does, without one: keys, waiting, registering, and ranks that get their time to save."""

import logging
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time

import pytest

from ase_dist.cluster import container, peers, ssh
from ase_dist.cluster.check import CheckResult, ClusterJob
from ase_dist.cluster.hostfile import Node
from tests.training.tiny_runs import ROOT

pytestmark = pytest.mark.single_gpu

NEEDS_SSH = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="no ssh-keygen (package openssh-client)")


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, logger="ase_dist")
    return caplog


@pytest.fixture
def listener():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


# ---------------------------------------------------------------------------------------------------------------------
# Keys


@NEEDS_SSH
def test_one_key_for_all_that_start_at_once(tmp_path):
    keys = tmp_path / "cluster"
    threads = [threading.Thread(target=ssh.prepare, args=(keys, tmp_path / f"state_{i}")) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    private = {(tmp_path / f"state_{i}" / "key").read_bytes() for i in range(4)}
    assert private == {(keys / "id_ed25519").read_bytes()}
    assert sorted(path.name for path in keys.iterdir()) == [".lock", "id_ed25519", "id_ed25519.pub"]


@NEEDS_SSH
def test_what_must_be_private_is(tmp_path):
    config = ssh.prepare(tmp_path / "cluster", tmp_path / "state", port=2345)
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "state" / "key").stat().st_mode) == 0o600
    text = config.read_text()
    assert "Port 2345\n" in text and "PasswordAuthentication no\n" in text
    public = (tmp_path / "cluster" / "id_ed25519.pub").read_text().split()[1]
    assert public in (tmp_path / "state" / "authorized_keys").read_text()
    assert (tmp_path / "state" / "known_hosts").read_text().startswith("* ssh-ed25519 ")


@NEEDS_SSH
def test_an_operators_key_is_taken_and_left_alone(tmp_path):
    """Kubeflow mounts an EC key under the name id_rsa, readable for the group."""
    keys = tmp_path / "secret"
    keys.mkdir()
    subprocess.run(["ssh-keygen", "-q", "-t", "ecdsa", "-N", "", "-f", str(keys / "id_rsa")], check=True)
    (keys / "id_rsa").chmod(0o640)
    before = sorted(keys.iterdir())
    ssh.prepare(keys, tmp_path / "state")
    assert sorted(keys.iterdir()) == before
    assert (tmp_path / "state" / "known_hosts").read_text().startswith("* ecdsa-sha2-nistp256 ")


@NEEDS_SSH
def test_no_key_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"ssh: no usable key in .*file.* \(.*\); mount a folder there"):
        ssh.prepare(tmp_path / "file", tmp_path / "state")
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "id_rsa").write_text("no key\n")
    with pytest.raises(ValueError, match="ssh: no usable key"):
        ssh.prepare(tmp_path / "keys", tmp_path / "state")


# ---------------------------------------------------------------------------------------------------------------------
# Waiting


def test_waiting_says_for_what_and_goes_on(said):
    left = [["n1 is not there", "n2 is not there"], ["n2 is not there"], ["n2 is not there"], []]
    peers.wait_until(lambda: left.pop(0), timeout=60, pause=0)
    assert said.messages == ["waiting: n1 is not there; n2 is not there", "waiting: n2 is not there"]


def test_waiting_ends_with_the_reason():
    with pytest.raises(ValueError, match=r"gave up after 0\.05 s of waiting: n2 is not there"):
        peers.wait_until(lambda: ["n2 is not there"], timeout=0.05, pause=0.01)


def test_unreachable_hosts_are_told_apart(listener):
    hosts = [("127.0.0.1", listener), ("127.0.0.1", None), ("127.0.0.1", 1), ("host.invalid", 1)]
    assert peers.unreachable_hosts(hosts) == [
        "127.0.0.1 does not answer on port 1 (Connection refused)",
        "the name host.invalid is not known yet",
    ]


@pytest.mark.parametrize("text", ["", ":22", "n1:", "n1:x", "n1:0", "n1:70000"])
def test_a_peer_is_a_host_and_perhaps_a_port(text):
    assert peers.host_and_port("n1") == ("n1", None) and peers.host_and_port("n1:22") == ("n1", 22)
    with pytest.raises(ValueError, match="wanted HOST or HOST:PORT"):
        peers.host_and_port(text)


def test_workers_that_answer_are_the_nodes(tmp_path, listener, said):
    peers.register(tmp_path, Node("localhost", 4))
    peers.register(tmp_path, Node("host.invalid", 4))  # of a worker that is gone
    (tmp_path / "junk").write_text("{")
    assert peers.wait_for_nodes(tmp_path, count=1, port=listener, timeout=5) == (Node("localhost", 4),)
    with pytest.raises(ValueError, match=r"1 of 2 workers are there \(localhost\); the name host\.invalid"):
        peers.wait_for_nodes(tmp_path, count=2, port=listener, timeout=0)


# ---------------------------------------------------------------------------------------------------------------------
# Roles


def become(*words, **options):
    command = [sys.executable, "-m", "ase_dist.cluster.container", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT, **options)


def test_any_other_command_is_run_as_it_stands():
    done = become("sh", "-c", "echo $0 $1; exit 7", "a", "b c")
    assert (done.returncode, done.stdout) == (7, "a b c\n")
    done = become("no-such-command")
    assert done.returncode == container.NOT_FOUND
    assert done.stderr == "error: cannot run 'no-such-command' (No such file or directory)\n"


def test_wait_runs_its_command_afterwards(listener):
    done = become("wait", "--for", f"127.0.0.1:{listener}", "--wait", "5", "echo", "--for", "x")
    assert (done.returncode, done.stdout) == (0, "--for x\n")
    done = become("wait", "--for", "127.0.0.1:1", "--wait", "0", "--", "echo", "x")
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr == "error: gave up after 0 s of waiting: 127.0.0.1 does not answer on port 1 (Connection refused)\n"
    )


@NEEDS_SSH
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "wanted either --nodes N"),
        (["--nodes", "2", "--wait", "0"], "gave up after 0 s of waiting: 0 of 2 workers are there (none yet)"),
        (["--hosts", "none"], "hostfile: cannot read 'none'"),
    ],
)
def test_launch_says_what_is_missing(tmp_path, words, sentence):
    done = become("--cluster", str(tmp_path / "c"), "--state", str(tmp_path / "s"), "launch", *words, "x.py")
    assert done.returncode == 2 and sentence in done.stderr and done.stderr.count("error: ") == 1


@NEEDS_SSH
def test_launch_becomes_deepspeeds_launcher(tmp_path, listener, monkeypatch):
    became = []
    checked = CheckResult("10.0.0.1", [])
    monkeypatch.setattr(
        container.check, "check_cluster", lambda hostfile, job, env: became.append((job, env)) or checked
    )
    monkeypatch.setattr(container, "_replace_process", became.append)
    peers.register(tmp_path / "cluster" / "nodes", Node("localhost", 3))
    folders = ["--cluster", str(tmp_path / "cluster"), "--state", str(tmp_path / "state"), "--port", str(listener)]
    container.main([*folders, "launch", "--nodes", "1", "launch/train.py", "output=/shared/x", "--dry-run"])
    words = ["launch/train.py", "output=/shared/x", "--dry-run"]
    job, env = became[0]
    assert job == ClusterJob.from_words(words) and env.name == ".deepspeed_env"
    hostfile = str(tmp_path / "state" / "hosts")
    assert became[1] == ["deepspeed", "--hostfile", hostfile, "--master_addr", "10.0.0.1", *words]
    assert (tmp_path / "state" / "hosts").read_text() == "localhost slots=3\n"


# ---------------------------------------------------------------------------------------------------------------------
# The end of a worker

RANK = """
import signal, subprocess, sys, time
helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])  # as a loader's process
def save(*_):
    alive = helper.poll() is None
    helper.kill()
    sys.stdout.write("saved\\n" if alive else "without its helper\\n")
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
sys.stdout.write("ready\\n"); sys.stdout.flush()
time.sleep(60)
"""


def test_ranks_get_the_signal_and_their_helpers_do_not(monkeypatch):
    monkeypatch.setattr(container, "RANK", "RANK_OF_THIS_TEST")  # other tests' ranks on this machine are left alone
    environment = {**os.environ, "RANK_OF_THIS_TEST": "0"}
    rank = subprocess.Popen([sys.executable, "-c", RANK], env=environment, stdout=subprocess.PIPE)
    assert rank.stdout.readline() == b"ready\n"
    assert container.end_ranks(grace=20) == 1
    assert rank.communicate(timeout=20)[0] == b"saved\n"


def test_a_stopped_worker_takes_its_note_away(tmp_path):
    """SIGTERM, as from docker stop: the note is gone, the server ends, and so does the worker, well."""
    program = (
        "import sys\nfrom pathlib import Path\nfrom ase_dist.cluster import container, ssh\n"
        "container.RANK, ssh.SERVER = 'NO_RANK_AT_ALL', sys.argv[1]\n"
        "sys.exit(container.serve_worker(Path('config'), Path(sys.argv[2]), slots=3, grace=1))"
    )
    server = tmp_path / "server"
    server.write_text("#!/bin/sh\nexec sleep 60\n")
    server.chmod(0o755)
    notes = tmp_path / "nodes"
    process = subprocess.Popen([sys.executable, "-c", program, str(server), str(notes)], cwd=ROOT)
    deadline = time.monotonic() + 30
    while not peers.registered(notes) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert peers.registered(notes) == [Node(os.uname().nodename, 3)]
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 0
    assert peers.registered(notes) == []


def test_a_bug_keeps_its_traceback(tmp_path, monkeypatch):
    def prepare_with_bug(*arguments, **options):
        raise ValueError("a bug, not a missing key")

    monkeypatch.setattr(ssh, "prepare", prepare_with_bug)
    with pytest.raises(ValueError, match="a bug"):
        container.main(["--cluster", str(tmp_path), "--state", str(tmp_path), "worker"])
