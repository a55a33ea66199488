"""What ranks did, read from logs, and what that says of the run."""

import os

import pytest

from ase_dist.report import ranks as ranks_module
from ase_dist.report.outcome import outcome, settle_ranks
from ase_dist.report.ranks import MOST_NOTICES, RankReport, read_ranks
from ase_dist.training.record.run_folder import RunFolder
from tests.report.conftest import write_log

pytestmark = pytest.mark.single_gpu

NOW = 1_700_000_000.0
STAMP = "2026-01-02 03:04:05,678 [rank 1] "
SUMMARY = {"exit": "done", "step": 6, "total_steps": 6}
ERROR = f"{STAMP}ERROR rank 1 ends at step 6: rank 0 is dead\nTraceback (most recent call last):\nOSError: gone"
SILENT = "rank 1 on node7 has made no progress for 60 s (limit 60 s), the last thing it began was 'x'; stacks are in y"


def beat(folder, rank, *, age):
    path = folder / f"rank_{rank}.beat"
    path.write_text('{"beats": 3, "doing": "forward of step 7", "host": "node7", "pid": 1}')
    os.utime(path, (NOW - age, NOW - age))


def ended(folder, summary, *, last_step=6):
    """The word for the run and those for its ranks."""
    found = read_ranks(RunFolder(folder), now=NOW)
    result = outcome(summary, found, last_step=last_step, total=6)
    settle_ranks(found, result)
    return result, [report.ended for report in found]


def test_a_log_says_how_far_a_rank_came_and_when(tmp_path):
    write_log(tmp_path, 0)
    write_log(tmp_path, 10, f"{STAMP}WARNING odd\nmore of it", f"{STAMP}INFO fine", "stray")
    zero, ten = read_ranks(RunFolder(tmp_path), now=NOW)
    assert (zero.rank, zero.starts, zero.steps, zero.warnings, zero.errors) == (0, 1, 6, 0, 0)
    assert (zero.first, zero.last) == ("2026-01-02 03:04:01", "2026-01-02 03:04:03")
    assert ten.rank == 10 and ten.warnings == 1 and ten.notices[0].text == "odd\nmore of it"


def test_a_finished_run(tmp_path):
    for rank in (0, 1):
        write_log(tmp_path, rank)
    result, ranks = ended(tmp_path, SUMMARY)
    assert (result.word, result.tone, ranks) == ("done", "good", ["done", "done"])


def test_a_run_stopped_by_a_signal(tmp_path):
    write_log(tmp_path, 0, f"{STAMP}INFO stopped by a signal at step 3, saved")
    result, ranks = ended(tmp_path, {**SUMMARY, "exit": "stopped", "step": 3}, last_step=3)
    assert (result.word, ranks) == ("stopped", ["stopped"]) and "step 3 of 6" in result.sentence


def test_a_killed_run_is_known_by_the_sign_of_life_that_it_left(tmp_path):
    write_log(tmp_path, 0)
    beat(tmp_path, 0, age=3600)
    result, ranks = ended(tmp_path, {})
    assert (result.word, result.tone, ranks) == ("killed", "bad", ["killed"])
    assert "Rank 0 (last seen at 'forward of step 7')" in result.sentence


def test_a_run_at_work_is_no_killed_one(tmp_path):
    write_log(tmp_path, 0)
    beat(tmp_path, 0, age=2)
    assert ended(tmp_path, {})[0].word == "running"


def test_one_rank_killed_while_the_other_reports_it(tmp_path):
    write_log(tmp_path, 0)
    write_log(tmp_path, 1, ERROR)
    beat(tmp_path, 0, age=100)
    result, ranks = ended(tmp_path, {})
    assert result.word == "killed" and ranks == ["killed", "failed"]
    assert "OSError: gone" in read_ranks(RunFolder(tmp_path), now=NOW)[1].notices[0].text


def test_an_error_without_summary_and_none_at_all(tmp_path):
    write_log(tmp_path, 1, ERROR)
    assert ended(tmp_path, {})[0].word == "failed"
    write_log(tmp_path, 1)
    assert ended(tmp_path, {})[0].word == "no summary"


def test_a_silent_run_ended_itself(tmp_path):
    write_log(tmp_path, 1, SILENT, "Thread 0x1 (most recent call first):", '  File "x"')
    beat(tmp_path, 1, age=1)
    result, ranks = ended(tmp_path, {})
    assert (result.word, ranks) == ("ended itself", ["silent"])
    assert 'File "x"' in read_ranks(RunFolder(tmp_path), now=NOW)[0].notices[0].text


def test_the_summary_of_an_earlier_start_says_nothing_of_this_one(tmp_path):
    write_log(tmp_path, 0)
    assert ended(tmp_path, {**SUMMARY, "step": 3}, last_step=6)[0].word == "no summary"


def test_a_new_start_forgives_the_end_of_the_one_before(tmp_path):
    write_log(tmp_path, 1)
    again = (tmp_path / "rank_1.log").read_text()
    write_log(tmp_path, 1, ERROR)
    (tmp_path / "rank_1.log").write_text((tmp_path / "rank_1.log").read_text() + again)
    (report,) = read_ranks(RunFolder(tmp_path), now=NOW)
    assert (report.starts, report.errors) == (2, 1)
    assert ended(tmp_path, SUMMARY)[1] == ["done"]


def test_only_the_end_of_a_long_log_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(ranks_module, "TAIL", 2000)
    write_log(tmp_path, 0, *[f"{STAMP}WARNING number {i}" for i in range(200)])
    (report,) = read_ranks(RunFolder(tmp_path), now=NOW)
    assert report.is_cut and 0 < report.warnings < 60
    assert report.shown[-1].text == "number 199" and len(report.shown) == MOST_NOTICES


def test_logs_in_no_encoding_and_odd_beats_are_read_all_the_same(tmp_path):
    (tmp_path / "rank_0.log").write_bytes(b"\xff\xfe\x00 nonsense\n" + f"{STAMP}ERROR \xe9\n".encode("latin-1"))
    (tmp_path / "rank_1.beat").write_text("[1, 2")
    (tmp_path / "rank_x.log").write_text("other")
    zero, one = read_ranks(RunFolder(tmp_path), now=NOW)
    assert zero.errors == 1 and (one.host, one.doing) == ("", "")


def test_a_sentence_about_many_ranks_stays_short():
    reports = [RankReport(i, ended="killed") for i in range(1000)]
    assert "Ranks 0, 1, 2, 3, 4, 5, 6, 7 and 992 others" in outcome({}, reports, last_step=1, total=None).sentence


@pytest.mark.parametrize(
    "odd", [{"exit": 5, "step": 6}, {"exit": "x" * 1000, "step": 6}, {"step": "6"}, {"exit": None}]
)
def test_odd_summaries_give_a_word(odd):
    assert len(outcome(odd, [], last_step=6, total=6).word) <= 40
