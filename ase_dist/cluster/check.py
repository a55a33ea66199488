"""The checker of a cluster: asks every node of a hostfile over ssh, and says in one sentence each what is wrong.

1. Nodes that cannot be reached, lack this folder or this Python, or are one machine under two names.
2. Nodes whose versions, code, data or user differ from the first node's; more slots than devices; no route to the
   others; words of the job that a remote shell would change.
3. A run folder that the nodes do not share.

``hostfile`` says what is wrong with the hostfile itself. Where all is well ``.deepspeed_env`` is written.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from ase_dist.cluster.environment import SHELL_SAFE, refused_exports, shared_variables, write_deepspeed_env
from ase_dist.cluster.facts import NO_FOLDER, NodeFacts, Question
from ase_dist.cluster.hostfile import Node, parse_hostfile, read_text
from ase_dist.config import Settings
from ase_dist.printable import say
from ase_dist.read_config import load_settings

MAX_THREADS = 32  # nodes that are asked at the same time
UNREACHABLE = 255  # ssh's own exit code
TIMED_OUT = 124  # the exit code of coreutils' timeout
_NO_SHELL_CODE = re.compile(r"[\w@+=:,./{}\[\] -]*", re.ASCII)  # no %, as pdsh replaces %n, %h and %u
_TRAINING = re.compile(r"\S*train\.py|(-m|--module) ase_dist train")  # how the command of a training begins


class CheckResult(NamedTuple):
    """A checked cluster: the address of its first node, and a sentence for each thing that is wrong."""

    master: str
    problems: list[str]


def check_cluster(
    hostfile: Path, job: ClusterJob, *, env: Path, port: int | None = None, ask: bool = True
) -> CheckResult:
    """Check a hostfile and, with ``ask``, its nodes over ssh; write ``env`` where all is well.

    Raises UserError and OSError where the hostfile cannot be read or ``env`` cannot be written.
    """
    nodes, problems = parse_hostfile(read_text(hostfile), name=str(hostfile))
    if problems or not ask:
        return CheckResult(nodes[0].address if nodes else "", problems)
    shell = over_ssh(port=port)
    known, problems = ask_nodes(nodes, shell, folder=Path.cwd(), data=job.data)
    problems += job.shell_characters() + refused_exports(os.environ) + differences(known)
    for what, path in (("the current folder", Path.cwd()), ("Python", Path(sys.executable))):
        if not SHELL_SAFE.fullmatch(str(path)):
            problems.append(f"{what} is {str(path)!r}, which a shell on every node would not read as one path; move it")
    if job.output and len(nodes) > 1 and not problems:
        problems = unshared(nodes, shell, output=Path(job.output).absolute())
    if problems:
        return CheckResult("", problems)
    for node, facts in known.items():
        devices = f"{facts.devices} devices" if facts.devices else "no accelerator"
        route = f", {facts.address} on {facts.interface}" if facts.interface else ""
        say(f"{node.host}: slots={node.slots}, {devices}, {facts.cores} cores{route}")
    write_deepspeed_env(env, shared_variables(nodes, list(known.values()), os.environ, timeout=job.timeout))
    return CheckResult(known[nodes[0]].address or nodes[0].address, [])


# ---------------------------------------------------------------------------------------------------------------------
# The job


@dataclass(frozen=True)
class ClusterJob:
    """The words of a command that a launcher starts on all nodes, and what its settings name.

    ``data`` are folders that must hold the same files on all nodes, one for each of several data sets; ``output`` must
    be shared. Each is empty where it is not known.
    """

    words: tuple[str, ...]
    data: tuple[str, ...] = ()
    output: str = ""
    timeout: float = Settings().guard.timeout

    @classmethod
    def from_words(cls, words: Sequence[str]) -> ClusterJob:
        """The job of ``launch/train.py ...`` or ``--module ase_dist train ...``; for other commands only the words.

        Raises UserError for wrong settings.
        """
        if not any(_TRAINING.fullmatch(" ".join(words[:count])) for count in (1, 3)):
            return cls(tuple(words))
        p = argparse.ArgumentParser(add_help=False)
        p.add_argument("--config")
        p.add_argument("--baseline", "--row")
        options, others = p.parse_known_args(list(words[1:]))
        overrides = [word for word in others if "=" in word and not word.startswith("-")]
        settings = load_settings(options.config, overrides, baseline=options.baseline)
        sets = [settings.data.of_set(each) for each in settings.data.sets] or [settings.data]
        # a node that lacks generated scenes generates them
        read = [str(data.root) for data in sets if data.data_set.layout is None and data.root is not None]
        return cls(tuple(words), tuple(dict.fromkeys(read)), str(settings.output), settings.guard.timeout)

    def shell_characters(self) -> list[str]:
        """A sentence for each word that DeepSpeed's launcher would hand to a remote shell as code (0.19.8, pdsh).

        It puts quotation marks round words with spaces, and leaves all others as they are.
        """
        return [
            f"{word!r} would be read by a shell on every node; put that setting into a file for --config"
            for word in self.words
            if not _NO_SHELL_CODE.fullmatch(word) or ("{" in word and " " not in word)
        ]


# ---------------------------------------------------------------------------------------------------------------------
# Commands on other machines


class CommandResult(NamedTuple):
    """A command that has ended: its exit code, what it wrote, and the last line of its errors."""

    code: int
    output: str
    complaint: str


Shell = Callable[[str, str], CommandResult]  # (host, command line) -> result


def over_ssh(*, port: int | None = None, timeout: float = 120.0) -> Shell:
    """A shell that runs a command line on a host over ssh without asking for a password; ``timeout`` in seconds."""
    options = ["-o", "BatchMode=yes", "-o", "ConnectTimeout=10", *([] if port is None else ["-p", str(port)])]

    def run(host: str, command: str) -> CommandResult:
        words = ["ssh", *options, "--", host, command]
        try:
            done = subprocess.run(
                words, capture_output=True, text=True, timeout=timeout, check=False, stdin=subprocess.DEVNULL
            )
        except subprocess.TimeoutExpired:
            return CommandResult(TIMED_OUT, "", f"no answer within {timeout:g} s")
        except OSError as error:
            return CommandResult(UNREACHABLE, "", f"cannot start ssh: {error.strerror}")
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        return CommandResult(done.returncode, done.stdout, lines[-1].strip().rstrip("."))

    return run


# ---------------------------------------------------------------------------------------------------------------------
# What is asked and compared


def ask_nodes(
    nodes: Sequence[Node], shell: Shell, *, folder: str | Path, data: Sequence[str] = ()
) -> tuple[dict[Node, NodeFacts], list[str]]:
    """The facts of the nodes that answer, and a sentence for each that does not.

    Each is asked by this Python in ``folder`` there, as DeepSpeed will start it. ``data`` are folders to digest.
    """

    def ask(node: Node) -> NodeFacts | str:
        towards = nodes[0] if node is not nodes[0] else nodes[-1]
        question = Question("" if towards is node else towards.address, data=tuple(data))
        command = [sys.executable, "-m", "ase_dist.cluster.facts", json.dumps(asdict(question))]
        done = shell(node.host, f"cd {shlex.quote(str(folder))} && {shlex.join(command)}")
        if done.code == UNREACHABLE:
            return f"{node.host} is not reachable over ssh without a password ({done.complaint})"
        if done.code == TIMED_OUT:
            return f"{node.host} is slow or stuck ({done.complaint}); look at its file systems"
        try:
            return NodeFacts(**json.loads(done.output.strip().splitlines()[-1]))
        except (IndexError, ValueError, TypeError):
            needs = "it needs the same folder and the same Python"
            return f"{node.host} cannot run this project ({done.complaint}); {needs}"

    with ThreadPoolExecutor(MAX_THREADS) as pool:
        answers = dict(zip(nodes, pool.map(ask, nodes), strict=True))
    known = {node: answer for node, answer in answers.items() if isinstance(answer, NodeFacts)}
    return known, [answer for answer in answers.values() if isinstance(answer, str)]


def differences(known: Mapping[Node, NodeFacts]) -> list[str]:
    """A sentence for each thing that makes a node unfit to train with the first one."""
    problems = []
    for node, facts in known.items():
        if facts.devices and node.slots > facts.devices:
            problems.append(f"{node.host} has {facts.devices} devices and the hostfile gives it slots={node.slots}")
        if missing := [name for name, version in facts.packages.items() if version == "missing"]:
            problems.append(f"{node.host} lacks {', '.join(missing)}; install the project there as on the others")
        for folder, digest in facts.data.items():
            if digest == NO_FOLDER:
                problems.append(f"{node.host} has no data folder {folder!r}; copy it there, or mount it")
        if len(known) > 1 and not facts.interface:
            problems.append(f"{node.host} does not know the others by their names in the hostfile; use addresses there")
    first_with: dict[str, Node] = {}
    for node, facts in known.items():
        twin = first_with.setdefault(facts.machine, node)
        if twin is not node:
            problems.append(f"{node.host} is the same machine as {twin.host}; list it once, with the sum of its slots")
        elif len(first_with) > 1:
            first, reference = next(iter(known.items()))
            problems += _differences_between(node.host, facts, first.host, reference)
    return problems


def _differences_between(host: str, facts: NodeFacts, first: str, reference: NodeFacts) -> list[str]:
    problems = []
    pairs = {"Python": (facts.python, reference.python)}
    pairs |= {name: (version, reference.packages.get(name, "missing")) for name, version in facts.packages.items()}
    different = [f"{name} {here} (there {there})" for name, (here, there) in pairs.items() if here != there]
    if different and "missing" not in facts.packages.values():
        problems.append(f"{host} has other versions than {first}: {', '.join(different)}; install the same")
    if facts.code != reference.code:
        problems.append(f"{host} runs other code than {first}; bring both to the same commit")
    if facts.user != reference.user:
        problems.append(f"{host} is used as {facts.user} and {first} as {reference.user}; use one user everywhere")
    for folder, digest in facts.data.items():
        there = reference.data.get(folder, NO_FOLDER)
        if digest != there and NO_FOLDER not in (digest, there):
            problems.append(f"{host} has other files in {folder!r} than {first}; copy the data again")
    if bool(facts.devices) != bool(reference.devices):
        problems.append(
            f"{host} has {facts.devices} devices and {first} has {reference.devices}; use nodes of one kind"
        )
    return problems


def unshared(nodes: Sequence[Node], shell: Shell, *, output: str | Path) -> list[str]:
    """A sentence for each node that does not see what the first one writes into the folder ``output``."""
    first, *others = nodes
    marker = Path(output) / f".nodes_{secrets.token_hex(8)}"
    made = shell(first.host, f"mkdir -p {shlex.quote(str(output))} && touch {shlex.quote(str(marker))}")
    if made.code:
        return [f"{first.host} cannot write into {str(output)!r} ({made.complaint}); name another folder"]
    try:
        with ThreadPoolExecutor(MAX_THREADS) as pool:
            found = pool.map(lambda node: shell(node.host, f"test -e {shlex.quote(str(marker))}"), others)
            without = [node.host for node, done in zip(others, found, strict=True) if done.code]
    finally:
        shell(first.host, f"rm -f {shlex.quote(str(marker))}")
    return [
        f"{host} does not see what {first.host} writes into {str(output)!r}; mount one shared folder there on all"
        for host in without
    ]
