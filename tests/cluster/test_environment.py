"""What ranks share: threads, interface, limits; what launchers tell them; the interface and the cores of a machine."""

import os
import socket

import psutil
import pytest

from ase_dist.cluster import environment as rank_environment
from ase_dist.cluster import network
from ase_dist.cluster.environment import interface_variables, shared_variables, task_variables, write_deepspeed_env
from ase_dist.cluster.hostfile import Node
from ase_dist.cluster.network import Interface
from ase_dist.cores import cpu_quota, usable_cores
from tests.cluster.test_check import FACTS, replace

pytestmark = pytest.mark.single_gpu

TWO = (Node("n1", 8), Node("n2", 2))


def variables(*facts, nodes=TWO, timeout=900.0, **environment):
    return shared_variables(nodes, facts, environment, timeout=timeout)


def test_threads_are_those_of_the_node_with_fewest_cores_a_rank():
    assert variables(FACTS, replace(FACTS, cores=8))["OMP_NUM_THREADS"] == "4"
    assert variables(replace(FACTS, cores=4), FACTS)["OMP_NUM_THREADS"] == "1"


def test_an_interface_is_named_where_it_has_one_name():
    named = variables(FACTS, FACTS)
    assert (named["NCCL_SOCKET_IFNAME"], named["GLOO_SOCKET_IFNAME"]) == ("eth0", "eth0")
    assert "GLOO_SOCKET_IFNAME" not in variables(FACTS, replace(FACTS, interface="ens5"))
    assert "GLOO_SOCKET_IFNAME" not in variables(FACTS, nodes=TWO[:1])


def test_what_the_user_has_set_goes_before():
    given = variables(FACTS, FACTS, GLOO_SOCKET_IFNAME="ib0", NCCL_DEBUG="INFO", SECRET_TOKEN="x", HOME="/")
    assert given["GLOO_SOCKET_IFNAME"] == "ib0" and given["NCCL_SOCKET_IFNAME"] == "eth0"
    assert given["NCCL_DEBUG"] == "INFO" and "SECRET_TOKEN" not in given and "HOME" not in given


def test_nccl_waits_as_long_as_the_run():
    assert variables(FACTS, FACTS, timeout=900.0)["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"] == "900"


def test_deepspeed_reads_the_file_back(tmp_path):
    wanted = variables(FACTS, FACTS, NCCL_IB_HCA="=mlx5_0:1,mlx5_1:1")
    write_deepspeed_env(tmp_path / "variables", wanted)
    pairs = [line.split("=", maxsplit=1) for line in (tmp_path / "variables").read_text().splitlines()]
    assert dict(pairs) == wanted  # deepspeed.launcher.runner.main (0.19.8) splits so


@pytest.mark.parametrize("value", ["$(id)", "`id`", 'a"b', "a b", "a;b", "", "a\nb"])
def test_no_shell_code_gets_into_the_file(tmp_path, value):
    with pytest.raises(ValueError, match="NCCL_DEBUG_FILE: got"):
        write_deepspeed_env(tmp_path / "variables", {"NCCL_DEBUG_FILE": value})
    assert not (tmp_path / "variables").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Launchers

SLURM = {"SLURM_PROCID": "9", "SLURM_STEP_NUM_TASKS": "20", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
         "SLURM_STEP_TASKS_PER_NODE": "8(x2),4"}  # fmt: skip
MPI = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
       "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "values"),
    [
        (SLURM, ("9", "20", "1", "8")),
        ({**SLURM, "SLURM_NODEID": "2"}, ("9", "20", "1", "4")),
        (MPI, ("3", "4", "1", "2")),
    ],
)
def test_tasks_of_other_launchers_are_ranks(environment, values):
    found = task_variables(environment)
    assert tuple(found[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")) == values
    assert found["MASTER_PORT"] == "29500"
    assert task_variables({**environment, "MASTER_PORT": "1234"})["MASTER_PORT"] == "1234"


@pytest.mark.parametrize(
    "environment",
    [{}, {**SLURM, "RANK": "0", "WORLD_SIZE": "2"}, {**SLURM, "SLURM_STEP_NUM_TASKS": "1"}, {"SLURM_PROCID": "0"}],
)
def test_others_are_left_alone(environment):
    assert task_variables(environment) == {}


def test_a_task_without_a_meeting_point_is_refused(monkeypatch):
    from ase_dist.training.process import runtime

    monkeypatch.setattr(runtime.dist, "is_initialized", lambda: False)  # a test before may have left a group of one
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in MPI.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="launcher: MASTER_ADDR missing"):
        runtime.start(timeout=5, threads=1)


def test_the_interface_is_chosen_where_ranks_are_on_several_nodes(monkeypatch):
    monkeypatch.setattr(rank_environment, "interface_for", lambda master: Interface("eth7", "10.0.0.7"))
    several = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1"}
    both = {"NCCL_SOCKET_IFNAME": "eth7", "GLOO_SOCKET_IFNAME": "eth7"}
    assert interface_variables(several) == both
    assert interface_variables({**several, "GLOO_SOCKET_IFNAME": "x"}) == {"NCCL_SOCKET_IFNAME": "eth7"}
    assert interface_variables({**several, "LOCAL_WORLD_SIZE": "4"}) == {}
    assert interface_variables({"WORLD_SIZE": "2", "LOCAL_SIZE": "2", "MASTER_ADDR": "x"}) == {}
    monkeypatch.setattr(rank_environment, "interface_for", lambda master: Interface("lo", "127.0.0.1"))
    assert interface_variables(several) == {}


# ---------------------------------------------------------------------------------------------------------------------
# This machine


def test_the_interface_of_an_address():
    assert network.interface_towards("127.0.0.1") == Interface("lo", "127.0.0.1")
    assert network.interface_towards("host.invalid") is None
    assert network.interface_for("host.invalid") is None
    assert network.name_of("203.0.113.77") is None


def test_a_name_server_that_is_busy_is_asked_again(monkeypatch):
    answers = [socket.gaierror(socket.EAI_AGAIN, "busy"), socket.gaierror(socket.EAI_AGAIN, "busy")]
    real = socket.getaddrinfo

    def busy(host, *arguments, **options):
        if answers:
            raise answers.pop()
        return real("127.0.0.1", *arguments, **options)

    monkeypatch.setattr(network.socket, "getaddrinfo", busy)
    monkeypatch.setattr(network, "PAUSE", 0.0)
    assert network.interface_towards("n1") == Interface("lo", "127.0.0.1")
    answers += [socket.gaierror(socket.EAI_AGAIN, "busy")] * 3
    assert network.interface_towards("n1") is None and not answers
    answers += [socket.gaierror(socket.EAI_NONAME, "unknown")] * 2
    assert network.interface_towards("n1") is None and len(answers) == 1


def test_the_interface_on_the_master_itself(monkeypatch):
    """A name that stands for a loopback address leads to the one interface that others can reach, if there is one."""
    monkeypatch.setattr(network, "reachable_interfaces", lambda: [Interface("eth0", "10.0.0.1")])
    assert network.interface_for("127.0.0.1") == Interface("eth0", "10.0.0.1")
    monkeypatch.setattr(
        network, "reachable_interfaces", lambda: [Interface("a", "10.0.0.1"), Interface("b", "10.1.0.1")]
    )
    assert network.interface_for("127.0.0.1") is None


def test_the_master_knows_its_own_address():
    for interface in network.reachable_interfaces():
        assert network.interface_for(interface.address) == interface


def test_reachable_interfaces_are_up_and_no_loopback():
    up = {name for name, status in psutil.net_if_stats().items() if status.isup}
    for name, address in network.reachable_interfaces():
        assert name in up and not address.startswith("127.") and socket.inet_aton(address)


def test_a_containers_quota_limits_the_threads(tmp_path):
    assert cpu_quota(tmp_path) is None
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert cpu_quota(tmp_path) == 1.5
    assert usable_cores(tmp_path) == min(2, usable_cores())
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert cpu_quota(tmp_path) is None and usable_cores(tmp_path) == usable_cores()


def test_an_older_containers_quota(tmp_path):
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("50000\n")
    assert cpu_quota(tmp_path) == 0.5 and usable_cores(tmp_path) == 1
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    assert cpu_quota(tmp_path) is None


def test_cores_are_at_most_those_of_the_affinity():
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, before)
