"""Hostfiles: what is read, what is refused (fault 14), and that DeepSpeed reads the same."""

import pytest

from ase_dist.cluster.hostfile import Node, parse_hostfile, read_hostfile, write_hostfile

pytestmark = pytest.mark.single_gpu

GOOD = """# two racks
n1 slots=8
  node-2.example.org   slots=4  # the small one

trainer@10.0.0.3 slots=1
"""


def problems(text):
    return parse_hostfile(text, name="hosts")[1]


def test_nodes_are_read_as_deepspeed_reads_them():
    from deepspeed.launcher.runner import _parse_hostfile

    nodes, wrong = parse_hostfile(GOOD)
    assert wrong == []
    assert dict(nodes) == dict(_parse_hostfile(GOOD.splitlines()))
    assert nodes[1] == Node("node-2.example.org", 4)


def test_what_is_written_is_read_again(tmp_path):
    nodes = (Node("n1", 8), Node("n2", 2))
    write_hostfile(tmp_path / "hosts", nodes)
    assert read_hostfile(tmp_path / "hosts") == nodes


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("n1", "got 'n1', wanted 'host slots=N'"),
        ("n1 slots=2 max_slots=4", "got 'n1 slots=2 max_slots=4'"),
        ("n1 slot=2", "got 'n1 slot=2'"),
        ("n1 slots=0", "got slots=0 for n1, wanted a whole number from 1 to 64"),
        ("n1 slots=-1", "got slots=-1"),
        ("n1 slots=2x", "got slots=2x"),
        ("n1 slots=", "got slots= for n1"),
        ("n1 slots=99999", "got slots=99999"),
        ("n1 slots=\u0662", "got slots="),
        ("n[1-3] slots=2", "the characters [ ] in it"),
        ("n1;reboot slots=2", "the characters ; in it"),
        ("$(reboot) slots=2", "the characters $ ( ) in it"),
        ("`reboot` slots=2", "the characters ` in it"),
        ("n1|n2 slots=2", "the characters | in it"),
        ("a,b slots=2", "the characters , in it"),
        ("-oProxyCommand=x slots=2", "the characters = in it"),
        ("-n1 slots=2", "such a beginning or end"),
        ("n0 slots=3\nn0 slots=1", "hosts, line 2: n0 is listed twice"),
        ("n1 slots=1\nlocalhost slots=1", "'localhost' among 2 hosts"),
        ("# nothing\n\n", "hosts: got no host"),
        ("", "hosts: got no host"),
    ],
)
def test_a_bad_line_is_one_sentence(line, words):
    (sentence,) = problems(line)
    assert words in sentence and "\n" not in sentence


def test_every_bad_line_is_told():
    assert len(problems("n1 slots=x\nn2 slots=1\nn2 slots=1\n&& slots=1\n")) == 3


def test_a_file_that_cannot_be_read_is_a_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"hostfile: cannot read .*No such file"):
        read_hostfile(tmp_path / "none")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_hostfile(tmp_path / "binary")
    (tmp_path / "bad").write_text("n1 slots=no\n")
    with pytest.raises(ValueError, match="bad, line 1: got slots=no"):
        read_hostfile(tmp_path / "bad")


def test_the_example_is_a_hostfile():
    from tests.training.tiny_runs import ROOT

    assert read_hostfile(ROOT / "launch" / "cluster" / "hosts.example") == (Node("n1", 8), Node("n2", 8))
