"""What ranks did, read from logs, and what that says of the run."""

import json
import os

import pytest

from ase_dist.report import ranks as ranks_module
from ase_dist.report.outcome import outcome, settle_ranks
from ase_dist.report.ranks import MOST_NOTICES, RankReport, read_ranks
from ase_dist.training.record.records import Records
from ase_dist.training.record.run_folder import RunFolder
from tests.report.conftest import write_log

pytestmark = pytest.mark.single_gpu

NOW = 1_700_000_000.0
STAMP = "2026-01-02 03:04:05,678 [rank 1] "
SUMMARY = {"exit": "done", "step": 6, "total_steps": 6}
ERROR = f"{STAMP}ERROR rank 1 ends at step 6: rank 0 is dead\nTraceback (most recent call last):\nOSError: gone"
RUN = {"kind": "run", "step": 0, "world": 2}  # of version 0.1
START = {**RUN, "attempt": 1, "time": "2026-01-02 03:04:00", "ranks": []}
TRAINED = {"kind": "train", "step": 6}


def beat(folder, rank, *, age, **more):
    path = folder / f"rank_{rank}.beat"
    path.write_text(json.dumps({"beats": 3, "doing": "forward of step 7", "host": "node7", "pid": 1, **more}))
    os.utime(path, (NOW - age, NOW - age))


def end(exit, why="", step=6):
    return {"kind": "end", "step": step, "exit": exit, "why": why, "time": "2026-01-02 03:05:00"}


def ended(folder, *records, summary=None):
    """The outcome of the run and the words for its ranks."""
    records = Records(records)
    found = read_ranks(RunFolder(folder), records, now=NOW)
    result = outcome(records, summary or {}, found, total=6)
    settle_ranks(found, result)
    return result, [report.ended for report in found]


def ranks_of(folder, *records):
    return read_ranks(RunFolder(folder), Records(records), now=NOW)


def test_a_log_and_the_records_say_what_a_rank_did_and_when(tmp_path):
    write_log(tmp_path, 0)
    write_log(tmp_path, 1, f"{STAMP}WARNING odd\nmore of it", f"{STAMP}INFO fine", "stray")
    zero, one = ranks_of(tmp_path, {**START, "world": 1}, {**START, "attempt": 2})
    assert (zero.rank, zero.starts, zero.warnings, zero.errors) == (0, 2, 0, 0)
    assert (zero.first, zero.last) == ("2026-01-02 03:04:01", "2026-01-02 03:04:03")
    assert (one.rank, one.starts, one.warnings, one.notices[0].text) == (1, 1, 1, "odd\nmore of it")


@pytest.mark.parametrize(
    ("exit", "word", "tone", "rank"),
    [
        ("done", "done", "good", "done"),
        ("stopped", "stopped", "open", "stopped"),
        ("non_finite", "not finite", "bad", "not finite"),
        ("not_saved", "not saved", "bad", "not saved"),
        ("silent", "ended itself", "bad", "unknown"),
        ("io_error", "failed", "bad", "unknown"),
        ("of a later version", "of a later version", "bad", "unknown"),
    ],
)
def test_the_end_that_was_recorded_is_shown_whatever_the_logs_say(tmp_path, exit, word, tone, rank):
    """A failure of an earlier start is in the log, and the message of the end is in no log at all."""
    for number in (0, 1):
        (tmp_path / f"rank_{number}.log").write_text("2026-01-02 03:00:00,000 [rank 0] ERROR of an earlier start\n")
    result, ranks = ended(tmp_path, START, TRAINED, end(exit, "the disk is full"), summary={"exit": "x", "step": 6})
    assert (result.word, result.tone, ranks) == (word, tone, [rank, rank])
    assert "step 6 of 6" in result.sentence or exit == "done"
    assert ("the disk is full" in result.sentence) == (tone == "bad")


def test_a_failure_is_told_with_its_reason_and_its_rank(tmp_path):
    write_log(tmp_path, 0)
    write_log(tmp_path, 1, ERROR)
    result, ranks = ended(tmp_path, START, TRAINED, end("failed", "OSError: gone"))
    assert (result.word, ranks) == ("failed", ["failed", "failed"]) and "OSError: gone" in result.sentence
    assert "OSError: gone" in ranks_of(tmp_path)[1].notices[0].text


def test_only_the_end_of_the_last_start_counts(tmp_path):
    write_log(tmp_path, 0)
    failed, again = end("failed", "boom", step=3), {**START, "step": 3, "attempt": 2, "time": "2026-01-02 04:00:00"}
    assert ended(tmp_path, START, failed, again, TRAINED, end("done"))[0].word == "done"
    result, ranks = ended(tmp_path, START, end("done"), again, summary={"exit": "done", "step": 6})
    assert (result.word, ranks) == ("no end", ["unknown"])


def test_a_killed_run_is_known_by_the_sign_of_life_that_it_left(tmp_path):
    write_log(tmp_path, 0)
    beat(tmp_path, 0, age=3600)
    result, ranks = ended(tmp_path, START, TRAINED)
    assert (result.word, result.tone, ranks) == ("killed", "bad", ["killed"])
    assert "Rank 0 (last seen at 'forward of step 7')" in result.sentence


def test_a_run_at_work_is_no_killed_one(tmp_path):
    write_log(tmp_path, 0)
    beat(tmp_path, 0, age=2)
    assert ended(tmp_path, START)[0].word == "running"


def test_one_rank_killed_while_the_other_reports_it(tmp_path):
    write_log(tmp_path, 0)
    write_log(tmp_path, 1, ERROR)
    beat(tmp_path, 0, age=100)
    result, ranks = ended(tmp_path, START, TRAINED)
    assert result.word == "killed" and ranks == ["killed", "failed"]


def test_what_a_rank_of_an_earlier_larger_start_left_is_no_sign_of_this_one(tmp_path):
    write_log(tmp_path, 0)
    beat(tmp_path, 1, age=9000)
    again = {**START, "world": 1, "attempt": 2}
    assert ended(tmp_path, START, again, TRAINED, end("done"))[0].word == "done"


def test_a_silent_rank_is_known_by_its_last_beat(tmp_path):
    beat(tmp_path, 1, age=1, ended="silent")
    result, ranks = ended(tmp_path, START, TRAINED)
    assert (result.word, ranks) == ("ended itself", ["silent"]) and "Rank 1" in result.sentence


# ---------------------------------------------------------------------------------------------------------------------
# Runs of version 0.1, which recorded no ends


def test_an_old_run_ended_as_its_summary_says(tmp_path):
    write_log(tmp_path, 0, ERROR)
    result, ranks = ended(tmp_path, RUN, TRAINED, summary=SUMMARY)
    assert (result.word, result.tone, ranks) == ("done", "good", ["done"])
    result, _ = ended(tmp_path, RUN, summary={**SUMMARY, "exit": "stopped", "step": 3})
    assert result.word == "stopped"


def test_an_old_run_without_summary(tmp_path):
    write_log(tmp_path, 1, ERROR)
    assert ended(tmp_path, RUN, TRAINED)[0].word == "failed"
    write_log(tmp_path, 1)
    assert ended(tmp_path, RUN, TRAINED)[0].word == "no end"
    beat(tmp_path, 1, age=100)
    assert ended(tmp_path, RUN, TRAINED)[0].word == "killed"


def test_the_summary_of_an_earlier_start_says_nothing_of_this_one(tmp_path):
    write_log(tmp_path, 0)
    assert ended(tmp_path, RUN, TRAINED, summary={**SUMMARY, "step": 3})[0].word == "no end"


# ---------------------------------------------------------------------------------------------------------------------
# Logs and odd values


def test_only_the_end_of_a_long_log_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(ranks_module, "TAIL", 2000)
    write_log(tmp_path, 0, *[f"{STAMP}WARNING number {i}" for i in range(200)])
    (report,) = ranks_of(tmp_path)
    assert report.is_cut and 0 < report.warnings < 60
    assert report.shown[-1].text == "number 199" and len(report.shown) == MOST_NOTICES


def test_logs_in_no_encoding_and_odd_beats_are_read_all_the_same(tmp_path):
    (tmp_path / "rank_0.log").write_bytes(b"\xff\xfe\x00 nonsense\n" + f"{STAMP}ERROR \xe9\n".encode("latin-1"))
    (tmp_path / "rank_1.beat").write_text("[1, 2")
    (tmp_path / "rank_x.log").write_text("other")
    zero, one = ranks_of(tmp_path)
    assert zero.errors == 1 and (one.host, one.doing) == ("", "")


def test_a_sentence_about_many_ranks_stays_short():
    reports = [RankReport(i, ended="killed") for i in range(1000)]
    assert "Ranks 0, 1, 2, 3, 4, 5, 6, 7 and 992 others" in outcome(Records([]), {}, reports, total=None).sentence


@pytest.mark.parametrize(
    "odd", [{"exit": 5, "step": 6}, {"exit": "x" * 1000, "step": 6}, {"step": "6"}, {"exit": None}]
)
def test_odd_summaries_give_a_word(odd):
    assert len(outcome(Records([TRAINED]), odd, [], total=6).word) <= 40
