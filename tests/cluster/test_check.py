"""The checker against nodes that answer, do not answer, or are not alike; and its command against ssh itself."""

import json
import subprocess
import sys
from dataclasses import asdict, replace

import pytest

from ase_dist.cluster import check
from ase_dist.cluster.check import ClusterJob, CommandResult, ask_nodes, differences, unshared
from ase_dist.cluster.environment import EXPORTED, refused_exports
from ase_dist.cluster.facts import NO_FOLDER, NodeFacts, Question, digest_code, digest_folder, gather
from ase_dist.cluster.hostfile import Node
from ase_dist.commands import cluster_check
from tests.training.tiny_runs import ROOT

pytestmark = pytest.mark.single_gpu

NODES = (Node("n1", 8), Node("n2", 8), Node("ann@n3", 8))
FACTS = NodeFacts(
    host="n1",
    machine="m1",
    user="ann",
    python="3.12.1",
    code="c",
    devices=8,
    cores=64,
    interface="eth0",
    address="10.0.0.1",
    data={"/data": "d", "/more": "e"},
    packages={"torch": "2.14.1", "deepspeed": "0.19.8"},
)


def known(**odd):
    """Facts of the three nodes, those of the second changed."""
    facts = {node: replace(FACTS, host=node.host, machine=node.host) for node in NODES}
    facts[NODES[1]] = replace(facts[NODES[1]], **odd)
    return facts


def test_equal_nodes_are_no_problem():
    assert differences(known()) == []
    assert differences({}) == []


@pytest.mark.parametrize(
    ("odd", "sentence"),
    [
        ({"python": "3.10.2"}, "n2 has other versions than n1: Python 3.10.2 (there 3.12.1); install the same"),
        ({"packages": {"torch": "2.9.0", "deepspeed": "0.19.8"}}, "n2 has other versions than n1: torch 2.9.0"),
        ({"packages": {"torch": "2.14.1", "deepspeed": "missing"}}, "n2 lacks deepspeed; install the project there"),
        ({"code": "x"}, "n2 runs other code than n1; bring both to the same commit"),
        ({"data": {"/data": "x", "/more": "e"}}, "n2 has other files in '/data' than n1; copy the data again"),
        ({"data": {"/data": "d", "/more": NO_FOLDER}}, "n2 has no data folder '/more'; copy it there, or mount it"),
        ({"user": "bob"}, "n2 is used as bob and n1 as ann; use one user everywhere"),
        ({"devices": 4}, "n2 has 4 devices and the hostfile gives it slots=8"),
        ({"devices": 0}, "n2 has 0 devices and n1 has 8; use nodes of one kind"),
        ({"machine": "n1"}, "n2 is the same machine as n1; list it once, with the sum of its slots"),
        ({"interface": ""}, "n2 does not know the others by their names in the hostfile; use addresses there"),
    ],
)
def test_each_difference_is_one_sentence(odd, sentence):
    (said,) = differences(known(**odd))
    assert said.startswith(sentence)


def answering(facts, *, silent=()):
    """A shell whose hosts answer with ``facts`` after some noise; ``silent`` maps others to what ssh says."""

    def run(host, command_line):
        if host in silent:
            return silent[host]
        return CommandResult(0, f"welcome to {host}\n{json.dumps(asdict(facts))}\n", "")

    return run


def test_nodes_that_do_not_answer_are_named_with_the_reason():
    silent = {
        "n1": CommandResult(255, "", "ssh: connect to host n1 port 22: Connection refused"),
        "n2": CommandResult(127, "", "sh: 1: /venv/bin/python: not found"),
        "ann@n3": CommandResult(124, "", "no answer within 120 s"),
    }
    facts, problems = ask_nodes(NODES, answering(FACTS, silent=silent), folder="/ase")
    assert facts == {}
    assert problems == [
        "n1 is not reachable over ssh without a password (ssh: connect to host n1 port 22: Connection refused)",
        "n2 cannot run this project (sh: 1: /venv/bin/python: not found); it needs the same folder and the same Python",
        "ann@n3 is slow or stuck (no answer within 120 s); look at its file systems",
    ]


def test_each_node_is_asked_for_the_way_to_another_one():
    asked = {}

    def run(host, command_line):
        asked[host] = command_line
        return answering(FACTS)(host, command_line)

    facts, problems = ask_nodes(NODES, run, folder="/a folder")
    assert list(facts) == list(NODES) and problems == []
    assert all(line.startswith("cd '/a folder' && ") for line in asked.values())
    assert '"towards": "n3"' in asked["n1"]
    assert '"towards": "n1"' in asked["n2"] and '"towards": "n1"' in asked["ann@n3"]


def on_disks(folders):
    """A shell whose hosts have each a folder of this machine in place of /shared."""

    def run(host, command_line):
        line = command_line.replace("/shared", str(folders[host]))
        done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=False)
        return CommandResult(done.returncode, done.stdout, done.stderr.strip())

    return run


def test_a_run_folder_of_its_own_is_found_and_nothing_is_left_behind(tmp_path):
    folders = {"n1": tmp_path / "one", "n2": tmp_path / "one", "ann@n3": tmp_path / "other"}
    (said,) = unshared(NODES, on_disks(folders), output="/shared/runs")
    assert said.startswith("ann@n3 does not see what n1 writes into '/shared/runs'")
    assert [*(tmp_path / "one" / "runs").iterdir()] == []
    folders["ann@n3"] = tmp_path / "one"
    assert unshared(NODES, on_disks(folders), output="/shared/runs") == []
    (tmp_path / "file").touch()
    folders["n1"] = tmp_path / "file"
    (said,) = unshared(NODES, on_disks(folders), output="/shared/runs")
    assert said.startswith("n1 cannot write into '/shared/runs'")


# ---------------------------------------------------------------------------------------------------------------------
# Facts


def test_facts_of_this_machine(tmp_path):
    import torch

    facts = gather(Question(towards="127.0.0.1", data=(str(tmp_path),)))
    assert facts.packages["torch"] == torch.__version__.split("+")[0] or facts.packages["torch"] == torch.__version__
    assert (facts.interface, facts.address) == ("lo", "127.0.0.1")
    assert facts.cores >= 1 and facts.machine == gather(Question()).machine
    folders = (str(tmp_path), str(tmp_path / "none"))
    assert gather(Question(data=folders)).data == {folders[0]: digest_folder(tmp_path), folders[1]: NO_FOLDER}


def test_the_digest_of_a_folder_sees_names_and_sizes(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.jpg").write_bytes(b"12345")
    first = digest_folder(tmp_path)
    (tmp_path / ".nfs0001").touch()
    assert digest_folder(tmp_path) == first
    (tmp_path / "a" / "1.jpg").write_bytes(b"123")
    truncated = digest_folder(tmp_path)
    (tmp_path / "a" / "1.jpg").rename(tmp_path / "a" / "2.jpg")
    assert len({first, truncated, digest_folder(tmp_path), digest_folder(tmp_path / "a" / "2.jpg")}) == 4


def test_the_digest_of_code_sees_a_changed_letter(tmp_path):
    (tmp_path / "x.py").write_text("a = 1\n")
    first = digest_code(tmp_path)
    (tmp_path / "x.pyc").write_bytes(b"1")
    assert digest_code(tmp_path) == first
    (tmp_path / "x.py").write_text("a = 2\n")
    assert digest_code(tmp_path) != first


# ---------------------------------------------------------------------------------------------------------------------
# The job


def test_a_job_names_its_folders():
    config = ["--config", "pascal_ase_16_3_1_4", "--deepspeed_config", "ds_configs/z2.json"]
    job = ClusterJob.from_words(
        ["launch/train.py", *config, "data.root=PASCAL_MT", "output=runs/x", "guard.timeout=60"]
    )
    assert (job.data, job.output, job.timeout) == (("PASCAL_MT",), "runs/x", 60.0)
    generated = ClusterJob.from_words(
        ["launch/train.py", "data.root=/cache"]
    )  # by the first node that lacks the scenes
    assert generated.data == ()
    assert ClusterJob.from_words(["other.py", "data.root=x"]).output == ""
    sets = "data.sets=[{name: pascal_context, called: a, root: one}, {name: nyud, called: b, root: two}]"
    assert ClusterJob.from_words(["launch/train.py", sets]).data == ("one", "two")
    assert ClusterJob.from_words(["launch/train.py", sets, "data.root=all"]).data == ("all/one", "all/two")
    assert ClusterJob.from_words(["--module", "ase_dist", "train", "output=runs/x"]).output == "runs/x"
    assert ClusterJob.from_words(["--module", "ase_dist", "evaluate", "output=runs/x"]).output == ""
    assert ClusterJob.from_words(["launch/train.py", "--baseline", "mtl_vit"]).output == "runs/scenes_mtl_vit"
    with pytest.raises(ValueError, match="did you mean"):
        ClusterJob.from_words(["launch/train.py", "trian.lr=1"])


@pytest.mark.parametrize(
    ("word", "is_told"),
    [
        ("train.lr=1e-3", False),
        ("tasks=[semseg,edge]", False),
        ("model.backbone_args={depth: 2, num_heads: 2}", False),
        ("model.backbone_args={depth:2,num_heads:2}", True),  # braces without spaces are expanded by bash
        ("output=$HOME/x", True),
        ("output=`id`", True),
        ("output=a;b", True),
        ("output=a&b", True),
        ("output='x'", True),
        ("output=runs/%n", True),  # pdsh writes the node's number there
    ],
)
def test_words_that_a_remote_shell_would_change_are_told(word, is_told):
    assert bool(ClusterJob(("launch/train.py", word)).shell_characters()) == is_told


# ---------------------------------------------------------------------------------------------------------------------
# The command


@pytest.fixture
def hostfile(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("n1 slots=8\nn2 slots=8\n")
    return path


def checked(monkeypatch, hostfile, run, *job):
    monkeypatch.setattr(check, "over_ssh", lambda port: run)
    return cluster_check.main([str(hostfile), "--env", str(hostfile.parent / "variables"), "--", *job])


def test_a_cluster_that_is_ready(monkeypatch, hostfile, capsys):
    monkeypatch.setenv("NCCL_IB_HCA", "mlx5")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    nodes = {"n1": FACTS, "n2": replace(FACTS, machine="m2", address="10.0.0.2", cores=32)}
    code = checked(monkeypatch, hostfile, lambda host, line: answering(nodes[host])(host, line))
    out, said = capsys.readouterr()
    assert (code, out) == (0, "10.0.0.1\n")
    assert "n2: slots=8, 8 devices, 32 cores, 10.0.0.2 on eth0" in said
    assert (hostfile.parent / "variables").read_text() == (
        "GLOO_SOCKET_IFNAME=eth0\nNCCL_IB_HCA=mlx5\nNCCL_SOCKET_IFNAME=eth0\nOMP_NUM_THREADS=3\n"
        "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC=1800\n"
    )


def test_a_cluster_that_is_not_ready(monkeypatch, hostfile, capsys):
    code = checked(monkeypatch, hostfile, answering(FACTS), "launch/train.py", "output=a;b")
    out, said = capsys.readouterr()
    assert code == 2 and out == ""
    assert said.count("error: ") == said.count("\n") == 2
    assert "n2 is the same machine as n1" in said and "'output=a;b' would be read by a shell" in said
    assert not (hostfile.parent / "variables").exists()


def test_paths_that_a_remote_shell_would_not_read_as_one_are_refused(monkeypatch, hostfile, tmp_path, capsys):
    """DeepSpeed has pdsh run ``cd FOLDER; PYTHON -u -m ...`` without quotation marks."""
    for name in ("a b", "a;touch x", "a$(id)", "a%n"):
        odd = tmp_path / name
        odd.mkdir()
        monkeypatch.chdir(odd)
        nodes = {"n1": FACTS, "n2": replace(FACTS, machine="m2")}
        assert checked(monkeypatch, hostfile, lambda host, line, nodes=nodes: answering(nodes[host])(host, line)) == 2
        assert f"the current folder is {str(odd)!r}" in capsys.readouterr().err


def test_variables_that_deepspeed_would_export_as_code_are_refused(monkeypatch, hostfile, capsys):
    monkeypatch.setenv("PYTHONPATH", "/x; touch /tmp/y")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2")
    assert checked(monkeypatch, hostfile, answering(FACTS)) == 2
    said = capsys.readouterr().err
    assert "PYTHONPATH holds characters" in said and "MLFLOW_TRACKING_PASSWORD is set" in said
    assert "hunter2" not in said and "touch" not in said


def test_the_variables_are_those_of_deepspeed():
    from deepspeed.launcher.runner import EXPORT_ENVS

    assert set(EXPORT_ENVS) <= set(EXPORTED)
    safe = {"PYTHONPATH": "/a/b:/c", "UCX_TLS": "rc,sm", "HOME": "a b", "LS_COLORS": "*.x=1;2"}
    assert refused_exports(safe) == []


def test_the_hostfile_alone(hostfile, capsys):
    assert cluster_check.main([str(hostfile), "--no-ssh"]) == 0
    assert capsys.readouterr().out == "n1\n"
    hostfile.write_text("n1 slots=8\nn1 slots=x\n")
    assert cluster_check.main([str(hostfile), "--no-ssh"]) == 2
    assert cluster_check.main([str(hostfile.parent / "none")]) == 2
    assert capsys.readouterr().err.count("error: ") == 2


def test_the_script_starts_at_once():
    program = "import runpy, sys\nsys.argv = ['check.py', '--help']\n"
    program += f"try: runpy.run_path({str(ROOT / 'launch' / 'cluster' / 'check.py')!r}, run_name='__main__')\n"
    program += "except SystemExit as end: assert not end.code\n"
    program += "assert not {'torch', 'deepspeed', 'numpy'} & sys.modules.keys()"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=False).returncode == 0


def test_a_host_that_nobody_has_is_unreachable():
    done = check.over_ssh(timeout=20)("host.invalid", "true")
    assert done.code == check.UNREACHABLE and done.complaint


def test_an_option_in_place_of_a_host_is_no_option():
    assert check.over_ssh(timeout=20)("-V", "true").code == check.UNREACHABLE
