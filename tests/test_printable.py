"""Names with control characters: none of them reaches a terminal, a log, Markdown or LaTeX."""

import io
import logging
from types import SimpleNamespace

import pytest

from ase_dist.commands.cli import command_parser, run_command
from ase_dist.data.folder import FolderDataset
from ase_dist.data.packed.findings import LONG, conclude, report_path
from ase_dist.errors import UserError
from ase_dist.evaluation.tables import Report, to_latex, to_markdown
from ase_dist.printable import MARK, PrintableFormatter, log_messages, printable
from ase_dist.tables import Table
from ase_dist.tasks import select_tasks
from ase_dist.training.record.console import close_console, set_up_logging
from ase_dist.training.record.logs import LOGGER, close_logs, format_line, open_logs, parse_line
from ase_dist.training.record.run_folder import RunFolder

pytestmark = pytest.mark.single_gpu

FORGED = "2026-01-31 12:00:00,123 [rank 0] INFO all is well"
ODD = f"a\x1b[2Jb\r\n{FORGED}\x9b\u202e\u2028\x00\udcff"


def is_clean(text):
    return printable(text, lines=True) == text and "\x1b" not in text


def test_what_is_shown_stays_as_it_is():
    for text in ("runs/exp #2", "donn\u00e9es/\u6570", "a | b \\ c", "\u2191 \u2193"):
        assert printable(text) == text


@pytest.mark.parametrize("character", [*map(chr, range(32)), "\x7f", "\x9b", "\u2028", "\u202e", "\udcff"])
def test_control_characters_are_replaced(character):
    assert printable(f"a{character}b") == f"a{MARK}b"
    assert printable(f"a{character}b", lines=True) == (f"a{character}b" if character in "\t\n" else f"a{MARK}b")


def test_a_name_forges_no_line_of_a_log(tmp_path, capsys):
    set_up_logging(rank=0, terminal=False)
    open_logs(RunFolder(tmp_path), rank=0)
    try:
        LOGGER.warning("skipped %s", ODD)
        LOGGER.info("\n%s", Table(("name",), [(ODD,)], title=ODD).to_text())
        try:
            raise ValueError(ODD)
        except ValueError:
            LOGGER.exception("a bug")
    finally:
        close_console()
        close_logs()
    for text in (capsys.readouterr().err, (tmp_path / "train.log").read_text(), (tmp_path / "rank_0.log").read_text()):
        lines = [parsed for line in text.splitlines() if (parsed := parse_line(line))]
        assert [line.level for line in lines] == ["WARNING", "INFO", "ERROR"]
        assert is_clean(text) and FORGED in text  # shown, as a part of another line
    assert format_line(0, "INFO", ODD).count("\n") == 1


def test_the_log_of_commands_is_clean():
    stream, root = io.StringIO(), logging.getLogger()
    before = root.handlers[:]
    root.handlers[:] = []
    try:
        log_messages(stream)
        logging.getLogger("ase_dist.data").warning("skipped %s", ODD)
    finally:
        root.handlers[:] = before
    assert is_clean(stream.getvalue()) and stream.getvalue().count("\n") == 1


def test_the_sentence_of_a_command_is_one_line(capsys):
    def work():
        raise UserError(f"no such file {ODD}")

    assert run_command(work) == 2
    said = capsys.readouterr().err
    assert is_clean(said) and said.count("\n") == 1 and said.startswith("error: no such file a")


def test_the_complaint_about_an_argument_is_one_line(capsys):
    with pytest.raises(SystemExit):
        command_parser("plan", description=None).parse_args([f"--{ODD}"])
    said = capsys.readouterr().err
    assert is_clean(said) and said.splitlines()[-1].count(FORGED) == 1 and said.count("\n") == 2


def test_the_report_of_a_check_has_a_line_for_each_file(tmp_path):
    found = SimpleNamespace(problems=[], resized=[f"{i} {ODD}" for i in range(LONG + 1)])
    conclude([found], tmp_path, tmp_path / "packed", kind=FolderDataset, partial=False)
    text = report_path(tmp_path / "packed").read_text()
    assert is_clean(text) and text.count("\n") == LONG + 1


def test_tables_and_reports_are_clean():
    table = Table((f"head {ODD}", "x"), [(ODD, 1)], title=ODD)
    report = Report(f"run {ODD}", {"model": ODD}, select_tasks("scenes", ["saliency"]), {"saliency": {"miou": 50.0}})
    for text in (table.to_markdown(), table.to_latex(), table.to_text(), to_markdown(report), to_latex(report)):
        assert is_clean(text) and FORGED not in text.splitlines()
    assert MARK not in table.to_latex()
    assert table.to_markdown().count("\n") == 2
    assert PrintableFormatter().format(logging.makeLogRecord({"msg": ODD})) == printable(ODD)
