"""The checker of a cluster: asks every node of a hostfile, and says in one sentence each what is wrong.

1. Nodes that cannot be reached, lack this folder or this Python, or are one machine under two names.
2. Nodes whose versions, code, data or user are not the first's; more slots than devices; no way to the others.
3. A run folder that is not the same one everywhere.

What is wrong with the hostfile itself is told by ``hostfile``.
"""

from __future__ import annotations

import json
import secrets
import shlex
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from ase_dist.cluster.facts import NO_FOLDER, Facts, Question
from ase_dist.cluster.hostfile import Node
from ase_dist.cluster.shell import TIMED_OUT, UNREACHABLE, Shell

AT_ONCE = 32  # nodes that are asked at a time


def ask_nodes(
    nodes: Sequence[Node], shell: Shell, *, folder: str | Path, data: str = ""
) -> tuple[dict[Node, Facts], list[str]]:
    """The facts of the nodes that answer, and a sentence for each that does not.

    Each is asked by this Python in ``folder`` there, as DeepSpeed will start it. ``data`` is a folder to digest.
    """

    def ask(node: Node) -> Facts | str:
        towards = nodes[0] if node is not nodes[0] else nodes[-1]
        question = Question("" if towards is node else address_of(towards), data=data)
        return _ask(node.host, question, shell, folder)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        answers = dict(zip(nodes, pool.map(ask, nodes), strict=True))
    known = {node: answer for node, answer in answers.items() if isinstance(answer, Facts)}
    return known, [answer for answer in answers.values() if isinstance(answer, str)]


def address_of(node: Node) -> str:
    """A node's name without the user to log in as."""
    return node.host.rpartition("@")[2]


def differences(known: Mapping[Node, Facts], *, data: str = "") -> list[str]:
    """A sentence for each thing that makes a node unfit to train with the first one."""
    if not known:
        return []
    (first, reference), *others = known.items()
    problems = [sentence for node, facts in known.items() for sentence in _alone(node, facts, data, len(known))]
    seen = {reference.machine: first.host}
    for node, facts in others:
        if facts.machine in seen:
            twin = seen[facts.machine]
            problems.append(f"{node.host} is the same machine as {twin}; list it once, with the sum of its slots")
            continue
        seen[facts.machine] = node.host
        problems += _against(node.host, facts, first.host, reference, data)
    return problems


def unshared(nodes: Sequence[Node], shell: Shell, *, output: str | Path) -> list[str]:
    """A sentence for each node that does not see what the first one writes into the folder ``output``."""
    first, *others = nodes
    mark = Path(output) / f".nodes_{secrets.token_hex(8)}"
    made = shell(first.host, f"mkdir -p {shlex.quote(str(output))} && touch {shlex.quote(str(mark))}")
    if made.code:
        return [f"{first.host} cannot write into {str(output)!r} ({made.complaint}); name another folder"]
    try:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            found = pool.map(lambda node: shell(node.host, f"test -e {shlex.quote(str(mark))}"), others)
            blind = [node.host for node, done in zip(others, found, strict=True) if done.code]
    finally:
        shell(first.host, f"rm -f {shlex.quote(str(mark))}")
    return [
        f"{host} does not see what {first.host} writes into {str(output)!r}; mount one shared folder there on all"
        for host in blind
    ]


def _ask(host: str, question: Question, shell: Shell, folder: str | Path) -> Facts | str:
    command = [sys.executable, "-m", "ase_dist.cluster.facts", json.dumps(asdict(question))]
    done = shell(host, f"cd {shlex.quote(str(folder))} && {shlex.join(command)}")
    if done.code == UNREACHABLE:
        return f"{host} is not reachable over ssh without a password ({done.complaint})"
    if done.code == TIMED_OUT:
        return f"{host} is slow or stuck ({done.complaint}); look at its file systems"
    try:
        return Facts(**json.loads(done.output.strip().splitlines()[-1]))
    except (IndexError, ValueError, TypeError):
        return f"{host} cannot run this project ({done.complaint}); it needs the same folder and the same Python"


def _alone(node: Node, facts: Facts, data: str, count: int) -> list[str]:
    """What is wrong with a node by itself."""
    problems = []
    if facts.devices and node.slots > facts.devices:
        problems.append(f"{node.host} has {facts.devices} devices and the hostfile gives it slots={node.slots}")
    if missing := [name for name, version in facts.packages.items() if version == "missing"]:
        problems.append(f"{node.host} lacks {', '.join(missing)}; install the project there as on the others")
    if data and facts.data == NO_FOLDER:
        problems.append(f"{node.host} has no data folder {data!r}; copy it there, or mount it")
    if count > 1 and not facts.interface:
        problems.append(f"{node.host} does not know the others by their names in the hostfile; use addresses there")
    return problems


def _against(host: str, facts: Facts, first: str, reference: Facts, data: str) -> list[str]:
    """What a node has otherwise than the first."""
    problems = []
    pairs = {"Python": (facts.python, reference.python)}
    pairs |= {name: (version, reference.packages.get(name, "missing")) for name, version in facts.packages.items()}
    odd = [f"{name} {here} (there {there})" for name, (here, there) in pairs.items() if here != there]
    if odd and "missing" not in facts.packages.values():
        problems.append(f"{host} has other versions than {first}: {', '.join(odd)}; install the same")
    if facts.code != reference.code:
        problems.append(f"{host} runs other code than {first}; bring both to the same commit")
    if facts.user != reference.user:
        problems.append(f"{host} is used as {facts.user} and {first} as {reference.user}; use one user everywhere")
    if data and facts.data != reference.data and NO_FOLDER not in (facts.data, reference.data):
        problems.append(f"{host} has other files in {data!r} than {first}; copy the data again")
    if bool(facts.devices) != bool(reference.devices):
        problems.append(
            f"{host} has {facts.devices} devices and {first} has {reference.devices}; use nodes of one kind"
        )
    return problems
