"""Writes the page of a run, a study, or runs compared, with rules that keep it from loading or running anything else.

The page loads nothing: its Content-Security-Policy allows pictures that are part of it, and the one style sheet and
the one script whose hashes it names, so that text from a log or a file name could not run even if it got in as markup.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import ase_dist
from ase_dist.errors import UserError, file_error
from ase_dist.files import write_atomic
from ase_dist.overwriting import contains, refuse_foreign
from ase_dist.printable import printable
from ase_dist.report import text
from ase_dist.report.compare_page import comparison_content
from ase_dist.report.run_page import run_content
from ase_dist.report.study_page import is_study, study_content
from ase_dist.training.record.run_folder import RunFolder

PAGE_MARK = b"<footer>Made by ase-dist "  # what every page has, and no other file
ASSETS = Path(__file__).parent / "assets"
POLICY = (
    "default-src 'none'; img-src data:; style-src '{style}'; script-src {scripts}; base-uri 'none'; form-action 'none'"
)


def write_report(folder: str | Path, out: str | Path | None = None) -> Path:
    """Write the page of a run's or a study's ``folder`` to ``out`` (``folder``/report.html where None); the file.

    Raises UserError with one sentence where ``folder`` is neither, and where ``out`` is a file that is no such page,
    and what ``errors.file_error`` makes of it where ``out`` cannot be written.
    """
    folder = Path(folder)
    out = RunFolder(folder).report if out is None else Path(out)
    _refuse_foreign_page(out)
    return _write(out, *_report(folder, out))


def watched_report(folders: Sequence[Path], version: int, *, reference: str | None = None) -> str:
    """The page of a run or a study, or of several runs compared, as ``watch.serve`` shows it. Raises as the others."""
    if len(folders) == 1 and reference is None:
        template, content = _report(folders[0], RunFolder(folders[0]).report)
    else:
        out = RunFolder(folders[0]).report.absolute()
        template, content = "compare.html", comparison_content(folders, reference=reference, out=out)
    return render(template, content, version=version)


def _report(folder: Path, out: Path) -> tuple[str, dict[str, Any]]:
    """The template of a run's or a study's page at ``out``, and what it shows."""
    if is_study(folder):
        return "study.html", study_content(folder.absolute(), out=out.absolute())
    if RunFolder(folder).looks_used():
        return "run.html", run_content(RunFolder(folder.absolute()))
    problem = "there is no such folder" if not folder.is_dir() else "it has none of the files that either leaves"
    name = str(folder.absolute())
    raise UserError(f"{name!r} is neither a run's folder nor a study's: {problem}; name the output of a run")


def write_comparison(folders: Sequence[str | Path], out: str | Path, *, reference: str | None = None) -> Path:
    """Write the page that compares the runs in ``folders`` to ``out``; the file. See ``comparison_content``.

    Raises UserError where no run is there to be compared, and as ``write_report``.
    """
    out = Path(out)
    _refuse_foreign_page(out)
    content = comparison_content([Path(folder) for folder in folders], reference=reference, out=out.absolute())
    return _write(out, "compare.html", content)


def _refuse_foreign_page(out: Path) -> None:
    refuse_foreign([out], is_own=contains(PAGE_MARK), option="--out")


def _write(out: Path, template: str, content: dict[str, Any]) -> Path:
    try:
        write_atomic(out, render(template, content))
    except OSError as error:
        raise file_error(
            error, f"--out: cannot write {str(out)!r} ({error.strerror or error}); name a file that can be written"
        ) from None
    return out


def render(template: str, content: dict[str, Any], *, version: int = 0) -> str:
    """The page; every value of ``content`` is escaped unless it is Markup, and one that is missing is an error.

    With a ``version`` it asks the server that it comes from for a newer one.
    """
    style, script, watch_script = (_inline(ASSETS / name) for name in ("page.css", "page.js", "watch.js"))
    scripts = [script, watch_script] if version else [script]
    return (
        _templates()
        .get_template(template)
        .render(
            content,
            style=style,
            script=script,
            watch_script=watch_script,
            version_shown=version,
            policy=POLICY.format(
                style=_hash(style),
                scripts=" ".join(f"'{_hash(source)}'" for source in scripts),
            )
            + ("; connect-src 'self'" if version else ""),
            version=ase_dist.__version__,
            made=time.strftime("%Y-%m-%d %H:%M"),
        )
    )


@functools.cache
def _templates() -> Environment:
    """The templates; all values are escaped, and control characters are not shown."""
    environment = Environment(
        loader=PackageLoader("ase_dist.report", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {name: getattr(text, name) for name in ("significant", "plural")}
    return environment


def _finalize(value: Any) -> Any:
    """Each value as the page shows it; Markup stays Markup."""
    return type(value)(printable(value, lines=True)) if isinstance(value, str) else value


def _inline(path: Path) -> Markup:
    """An asset as it stands in the page; browsers hash exactly this text."""
    found = path.read_text(encoding="utf-8")
    assert "</" not in found, f"{path.name} would end its own element"
    return Markup(found)


def _hash(source: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}"
