"""Shell scripts, Dockerfile, compose files and locks under their linters and schemas.

These come with packages of the dev extra; nothing is fetched.
"""

import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.test_namespaces import README
from tests.training.tiny_runs import ROOT

pytestmark = pytest.mark.single_gpu

TOOLS = Path(sys.executable).parent
CLUSTER, DOCKER = ROOT / "launch" / "cluster", ROOT / "docker"
CI = [path for path in (ROOT / ".ci").iterdir() if path.suffix != ".py"]
SCRIPTS = [*CLUSTER.glob("*.sh"), CLUSTER / "slurm.sbatch", *DOCKER.glob("*.sh"), *CI]
COMPOSE = [DOCKER / "compose.yaml", DOCKER / "compose.gpu.yaml"]
LOCKED = re.compile(r"^([a-z0-9-]+)==(\S+) \\$", re.MULTILINE)


def tool(name):
    found = shutil.which(name, path=str(TOOLS)) or shutil.which(name)
    return found or pytest.skip(f"{name} is not installed; it comes with the dev extra")


def check(*command, **options):
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120, check=False, **options)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound(script):
    assert check("bash", "-n", script) == (0, "")
    code, said = check(tool("shellcheck"), "--shell=bash", "--external-sources", script)
    assert code == 0, said
    assert script.stat().st_mode & 0o111 or script.suffix == ".sbatch", "not executable"


def run_script(folder, script, *words, **variables):
    """Run a script of launch/cluster, with a check that finds no fault and a deepspeed that shows what it gets."""
    for name, body in {"python": "echo n1", "deepspeed": 'echo "$@"; env'}.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    (folder / "hosts").write_text("# two\nn1 slots=1\nme@n2 slots=2  # big\n")
    return subprocess.run([CLUSTER / script, folder / "hosts", *words], capture_output=True, text=True, check=False,
                          env={"PATH": f"{folder}:/usr/bin:/bin", **variables})  # fmt: skip


def test_no_password_reaches_what_deepspeed_writes_into_command_lines(tmp_path):
    secrets = {"MLFLOW_TRACKING_PASSWORD": "hunter2", "MLFLOW_X": "a b; id", "NCCL_DEBUG": "INFO"}
    done = run_script(tmp_path, "ssh.sh", "output=x", **secrets)
    assert done.returncode == 0 and "MLFLOW" not in done.stdout and "hunter2" not in done.stdout
    assert "NCCL_DEBUG=INFO" in done.stdout and done.stdout.startswith("--hostfile")


@pytest.mark.parametrize("port", ["taken", "no number"])
def test_a_port_in_use_is_one_sentence(port, tmp_path):
    """The check of the hostfile goes before, and answers at once here."""
    stub = f"""#!/bin/sh\n[ "$1" = -c ] && exec {sys.executable} "$@"\necho n1\n"""
    (tmp_path / "python").write_text(stub)
    (tmp_path / "torchrun").write_text("#!/bin/sh\necho started\n")
    for name in ("python", "torchrun"):
        (tmp_path / name).chmod(0o755)
    (tmp_path / "hosts").write_text("n1 slots=1\nn2 slots=1\n")

    def start(node, port):
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "MASTER_PORT": str(port)}
        done = subprocess.run([CLUSTER / "torchrun.sh", tmp_path / "hosts", node], capture_output=True, text=True,
                              check=False, env=environment)  # fmt: skip
        return done.returncode, done.stdout, done.stderr

    with socket.create_server(("", 0)) as other:
        number = other.getsockname()[1] if port == "taken" else "none"
        code, out, said = start("0", number)
        assert (code, out) == (2, "") and re.fullmatch(rf"error: MASTER_PORT: {number} is in use on .+\n", said)
        assert start("1", number) == (0, "started\n", ""), "the other nodes connect to it"
    if port == "taken":
        assert start("0", number) == (0, "started\n", "")


@pytest.mark.parametrize("number", ["2", "-1", "x", "08", "1.0", "0; id", "99999999999999999999"])
@pytest.mark.parametrize("script", ["torchrun.sh", "no_ssh.sh"])
def test_a_wrong_node_number_is_one_sentence(script, number, tmp_path):
    """The check of the hostfile goes before, and answers at once here."""
    done = run_script(tmp_path, script, number)
    sentence = f"error: NODE_RANK: got '{number}', wanted a number from 0 to 1, a line of {tmp_path}/hosts\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", sentence)


def test_the_dockerfile_is_sound():
    code, said = check(tool("hadolint"), "--config", ROOT / ".hadolint.yaml", DOCKER / "Dockerfile")
    assert code == 0, said


def test_the_linters_see_mistakes(tmp_path):
    bad = tmp_path / "bad"
    bad.write_text("#!/bin/bash\nrm -rf $1/*\n")
    assert check(tool("shellcheck"), bad)[0] != 0
    bad.write_text("FROM debian\nRUN cd /x && sudo ls\n")
    assert check(tool("hadolint"), bad)[0] != 0
    bad.write_text("services: {a: {image: x, comand: y}}\n")
    assert check(tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", bad)[0] != 0


@pytest.mark.parametrize("path", COMPOSE, ids=lambda path: path.name)
def test_compose_files_keep_to_their_schema(path):
    code, said = check(tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", path)
    assert code == 0, said


def test_no_key_and_no_checkout_gets_into_an_image():
    ignored = (ROOT / ".dockerignore").read_text().split("\n")
    assert ignored[1] == "*" and "!.git" not in ignored
    copied = {word for line in (DOCKER / "Dockerfile").read_text().splitlines() if line.startswith("COPY")
              for word in line.split()[1:-1]}  # fmt: skip
    allowed = [line[1:] for line in ignored if line.startswith("!")]
    assert all(any(Path(name).is_relative_to(top) for top in allowed) and (ROOT / name).exists() for name in copied)
    assert "rm -rf /var/lib/apt/lists/* /etc/ssh/ssh_host_*" in (DOCKER / "Dockerfile").read_text()


def test_lock_files_hold_every_dependency_with_hashes():
    torch, rest = ((DOCKER / name).read_text() for name in ("torch-cuda.lock", "requirements.lock"))
    pinned = dict(LOCKED.findall(torch)) | dict(LOCKED.findall(rest))
    wanted = re.search(r"^dependencies = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)
    names = re.findall(r'"([\w-]+)', wanted[1])
    assert names and set(names) <= pinned.keys()
    for line in (DOCKER / "torch.in").read_text().splitlines():
        if not line.startswith("#"):
            name, version = line.split("==")
            assert pinned[name] == version
    assert not {"torch", "torchvision"} & dict(LOCKED.findall(rest)).keys()  # the CPU variant brings its own
    for text in (torch, rest):
        entries = re.split(r"\n(?=[a-z])", text)[1:]
        assert entries and all("--hash=sha256:" in entry for entry in entries)


def test_the_readme_has_the_lines_that_are_run_between_two_hosts():
    text = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")
    if "launch/cluster" not in text:
        pytest.skip("the README says nothing of clusters")
    assert f"```bash\n{README}```" in text
    assert subprocess.run(["bash", "-n"], input=README.encode(), check=False).returncode == 0
