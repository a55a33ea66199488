"""What a container of the image does: ``worker``, ``launch``, ``wait`` for peers, or any other command unchanged.

    worker                            ssh server for the launcher; registers itself on the shared volume
    launch --nodes 2 SCRIPT [...]     waits for the workers, checks them, starts DeepSpeed's launcher
    wait --for HOST COMMAND [...]     waits for peers by name and port, then runs the command

The shared volume is mounted at /cluster (see ``ssh``): keys, and in nodes/ one file for each worker.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

import psutil

from ase_dist.cluster import check, peers, ssh
from ase_dist.cluster.environment import FILE, PASSWORDS
from ase_dist.cluster.facts import devices
from ase_dist.cluster.hostfile import Node, read_hostfile, write_hostfile
from ase_dist.errors import RunError, UserError, describe, exit_code_of
from ase_dist.files import expand_user, home_folder
from ase_dist.printable import log_messages, say

CLUSTER = Path("/cluster")
NODES = "nodes"  # folder of the shared volume with a file for each registered worker
ROLES = ("worker", "launch", "wait", "--help", "-h")
WAIT = 600.0  # seconds
NOT_FOUND = 127
RANK = "LOCAL_RANK"  # the variable that deepspeed and torchrun set for ranks and not for themselves
LOGGER = logging.getLogger("ase_dist")


def parser() -> argparse.ArgumentParser:
    """The options of the three roles."""

    def path(text: str) -> Path:
        return Path(expand_user(text))

    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--cluster", type=path, default=CLUSTER, metavar="FOLDER", help="default %(default)s")
    p.add_argument("--state", type=path, metavar="FOLDER", help="default ~/.cluster")
    p.add_argument("--port", type=int, default=ssh.PORT, help="of the ssh servers (default %(default)s)")
    roles = p.add_subparsers(dest="role", required=True)
    serve = roles.add_parser("worker", help="serve the launcher")
    serve.add_argument("--slots", type=int, help="ranks to run here (default: one for each accelerator, or one)")
    serve.add_argument("--grace", type=float, default=45.0, metavar="S", help="seconds that ranks get to save")
    serve.add_argument("--no-note", action="store_true", help="do not register: the hostfile comes from elsewhere")
    launch = roles.add_parser("launch", help="wait, check, start DeepSpeed's launcher")
    launch.add_argument("--nodes", type=int, help="workers to wait for")
    launch.add_argument("--hosts", type=path, metavar="FILE", help="a hostfile, instead of --nodes")
    launch.add_argument("--wait", type=float, default=WAIT, metavar="S", help="seconds (default %(default)s)")
    launch.add_argument("command", nargs=argparse.REMAINDER, help="the script and its arguments")
    wait = roles.add_parser("wait", help="wait for peers, then run a command")
    wait.add_argument("--for", action="append", default=[], dest="hosts", metavar="HOST[:PORT]")
    wait.add_argument("--wait", type=float, default=WAIT, metavar="S", help="seconds (default %(default)s)")
    wait.add_argument("command", nargs=argparse.REMAINDER)
    return p


def main(argv: Sequence[str]) -> int:
    """Run the command of a container; its exit code, or 2 after one sentence where a peer or a key is missing."""
    log_messages()
    if argv and argv[0] not in ROLES and not argv[0].startswith("--"):
        _replace_process(argv)
    arguments = parser().parse_args(argv)
    try:
        if arguments.state is None:
            arguments.state = home_folder() / ".cluster"
        if arguments.role == "worker":
            config = ssh.prepare(arguments.cluster, arguments.state, port=arguments.port)
            folder = None if arguments.no_note else arguments.cluster / NODES
            return serve_worker(config, folder, slots=arguments.slots, grace=arguments.grace)
        command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
        if arguments.role == "wait":
            hosts = [peers.host_and_port(host) for host in arguments.hosts]
            peers.wait_until(lambda: peers.unreachable_hosts(hosts), timeout=arguments.wait)
            _replace_process(command)
        else:
            _launch(arguments, command)
    except (UserError, RunError, OSError) as error:
        say(f"error: {describe(error)}")
        return exit_code_of(error)


def _launch(arguments: argparse.Namespace, command: Sequence[str]) -> NoReturn:
    """Wait for the workers, check them, and become DeepSpeed's launcher for ``command``."""
    ssh.prepare(arguments.cluster, arguments.state, port=arguments.port)
    if (arguments.hosts is None) == (arguments.nodes is None):
        raise UserError("launch: wanted either --nodes N, for workers that register, or --hosts FILE")
    if arguments.hosts is None:
        folder = arguments.cluster / NODES
        nodes = peers.wait_for_nodes(folder, count=arguments.nodes, port=arguments.port, timeout=arguments.wait)
    else:
        nodes = read_hostfile(arguments.hosts)
        hosts = [(node.host, arguments.port) for node in nodes]
        peers.wait_until(lambda: peers.unreachable_hosts(hosts), timeout=arguments.wait)
    hostfile = arguments.state / "hosts"
    write_hostfile(hostfile, nodes)
    for name in [name for name in os.environ if name.startswith(PASSWORDS)]:
        del os.environ[name]
    checked = check.check_cluster(hostfile, check.ClusterJob.from_words(command), env=home_folder() / FILE)
    if checked.problems:
        raise UserError("; ".join(checked.problems))
    _replace_process(["deepspeed", "--hostfile", str(hostfile), "--master_addr", checked.master, *command])


def _replace_process(words: Sequence[str]) -> NoReturn:
    """Replace this process by a command, which then gets the container's signals."""
    if not words:
        raise SystemExit("error: got no command to run")
    try:
        os.execvp(words[0], list(words))
    except OSError as error:
        say(f"error: cannot run {words[0]!r} ({error.strerror})")
        raise SystemExit(NOT_FOUND) from None


# ---------------------------------------------------------------------------------------------------------------------
# A worker: an ssh server until the container is stopped, and then time for the ranks to save


def serve_worker(config: Path, folder: Path | None, *, slots: int | None, grace: float) -> int:
    """Serve ssh until SIGTERM or SIGINT; then ranks are asked to stop and get ``grace`` seconds to save. Exit code.

    ``folder`` is where this worker registers itself; None where the hostfile comes from elsewhere. The ranks are not in
    the server's process group, so the container's signal does not reach them directly.
    """
    server = subprocess.Popen([ssh.SERVER, "-D", "-e", "-f", str(config)])
    stopped = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = True
        end_ranks(grace=grace)
        server.terminate()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    file = peers.register(folder, Node(platform.node(), slots or max(1, devices()))) if folder else None
    LOGGER.info("%s serves ssh and waits for the launcher", platform.node())
    try:
        code = server.wait()
    finally:
        if file is not None:
            file.unlink(missing_ok=True)
    return 0 if stopped else code


def end_ranks(*, grace: float) -> int:
    """Send SIGTERM to every rank in this container and wait up to ``grace`` seconds; the number of ranks.

    Processes that a rank started, such as loader workers, get no signal: the rank ends them after it has saved.
    """
    ranks = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            parent = process.parent()
            if RANK in process.environ() and (parent is None or RANK not in parent.environ()):
                ranks.append(process)
    for process in ranks:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(ranks, timeout=grace)
    if alive:
        LOGGER.warning("%d of %d ranks did not end within %g s", len(alive), len(ranks), grace)
    return len(ranks)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
