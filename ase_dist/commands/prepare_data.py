"""Check a data set and pack it for training: one's own folder, or a published data set from its archive or folder.

One's own folder has a dataset.yaml (docs/own_data.md), which --init begins. Every file that the splits need is decoded;
what is missing or unusable is named, all of it. The packed data set is read by data.root=DIR and gives the same samples
several times faster. Nothing is written into the source except by --init. An interrupted command, given again, goes on
where it stood; where nothing has changed it has nothing to do.
"""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Sequence
from pathlib import Path

from ase_dist.commands.cli import command_parser, path, path_or_name, run_command
from ase_dist.config import DataSettings, SetSettings
from ase_dist.description import FILE_NAME, read_description
from ase_dist.errors import UserError, did_you_mean
from ase_dist.files import is_regular, read_text
from ase_dist.printable import log_messages
from ase_dist.read_config import load_settings
from ase_dist.tasks import packable

EPILOG = """examples:
  python launch/prepare_data.py photographs --init
  python launch/prepare_data.py photographs --check-only
  python launch/prepare_data.py photographs --out packed/photographs
  python launch/prepare_data.py pascal-context PASCAL_MT.tgz --check-only
  python launch/prepare_data.py pascal-context PASCAL_MT.tgz --out packed/pascal
  python launch/prepare_data.py pascal-context packed/pascal --check-only
  python launch/prepare_data.py nyud NYUD_MT --pictures files
"""
LAYOUTS = tuple(name.replace("_", "-") for name in packable())


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = command_parser("prepare_data", description=__doc__, epilog=EPILOG)
    p.add_argument(
        "words",
        nargs="+",
        type=path_or_name,
        metavar="[LAYOUT] SRC",
        help=f"SRC: a folder with a {FILE_NAME}, a file of settings with data.sets (--check-only), or with a LAYOUT "
        f"({', '.join(LAYOUTS)} or package.module:NAME) an unpacked folder or an archive (.tgz, .tar.gz, .tar)",
    )
    p.add_argument("--init", action="store_true", help=f"write a first {FILE_NAME} into SRC from what is found there")
    p.add_argument("--out", type=path, metavar="DIR", help="where to pack to (default: a folder in the user's cache)")
    p.add_argument("--tasks", metavar="A,B", help="pack the labels of these only (default: all of the data set's)")
    p.add_argument("--partial", action="store_true", help="accept images that lack the label files of some tasks")
    p.add_argument("--subset", action="store_true", help="accept lists that are not the published ones")
    p.add_argument(
        "--pictures",
        choices=("pixels", "files"),
        default="pixels",
        help="keep images decoded (default), or as the files they are, slower and smaller",
    )
    p.add_argument("--workers", type=int, metavar="N", help="processes (default: one for each core)")
    p.add_argument("--check-only", action="store_true", help="pack nothing; SRC may also be a packed data set")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exit code 0, or 2 after one sentence about what is wrong."""
    arguments = parser().parse_args(argv)
    log_messages()
    return run_command(lambda: _prepare(arguments), after_signal="; the same command goes on from here")


def _prepare(arguments: argparse.Namespace) -> int:
    from ase_dist.data.packed.layout import is_packed
    from ase_dist.data.packed.prepare import Request, check_only, prepare
    from ase_dist.data.packed.verify import verify

    layout, source = _layout_and_source(arguments.words)
    if arguments.init:
        if layout is not None:
            raise UserError(f"--init: {layout} is described already; give the folder of your own data alone")
        return _init(source)
    if is_packed(source):
        logging.info("%s: %d packed files are whole", source, verify(source))
        return 0
    if layout is None and (sets := _sets_in(source)):
        if not arguments.check_only:
            raise UserError(f"{source}: it is of several data sets; pack each from its own folder, or add --check-only")
        for each, data in sets:
            if data.root is None or is_packed(data.root):
                logging.info("%s: packed or generated, not checked here", each.title)
                continue
            of_set = Request(
                data.name,
                data.root,
                each.tasks,
                subset=arguments.subset,
                workers=arguments.workers,
                description=data.description,
                partial=arguments.partial or data.partial,
            )
            logging.info("%s: the files of %d images are whole", each.title, check_only(of_set, arguments.out))
        return 0
    description = None if layout is not None else read_description(_description_of(source))
    folder = source if source.is_dir() or layout else source.parent
    request = Request(
        layout or (description.name if description else ""),
        folder,
        tuple(arguments.tasks.split(",")) if arguments.tasks else None,
        arguments.pictures,
        arguments.subset,
        arguments.workers,
        description,
        arguments.partial,
    )
    if arguments.check_only:
        logging.info("%s: the files of %d images are whole", folder, check_only(request, arguments.out))
        return 0
    place = prepare(request, arguments.out)
    name, partial = "" if description else f"data.name={layout} ", " data.partial=true" if request.partial else ""
    logging.info("train with %sdata.root=%s%s", name, place, partial)
    return 0


def _sets_in(source: Path) -> list[tuple[SetSettings, DataSettings]]:
    """The data sets of a file of settings with ``data.sets``, each with its own settings; none in any other file."""
    is_file = source.suffix.lower() in (".yaml", ".yml") and is_regular(source)
    if not is_file or not re.search(r"^data\s*:", read_text(source), re.MULTILINE):
        return []
    data = load_settings(source).data
    return [(each, data.of_set(each)) for each in data.sets]


def _layout_and_source(words: Sequence[str]) -> tuple[str | None, Path]:
    """The layout by its name in ``DATA_SETS``, None for one's own data, and the source."""
    if len(words) == 1:
        if words[0] in LAYOUTS and not Path(words[0]).exists():
            raise UserError(f"SRC: missing, wanted the folder or the archive of {words[0]} after its name")
        return None, Path(words[0])
    if len(words) > 2:
        raise UserError(
            f"got {' '.join(map(repr, words))}, wanted [LAYOUT] SRC; put a path with blanks into quotation marks"
        )
    if words[0] not in LAYOUTS and ":" not in words[0]:
        raise UserError(
            f"LAYOUT: got {words[0]!r}, wanted one of {', '.join(LAYOUTS)}, or for your own data the folder alone"
            f"{did_you_mean(words[0], LAYOUTS)}"
        )
    return words[0] if ":" in words[0] else words[0].replace("-", "_"), Path(words[1])


def _description_of(source: Path) -> Path:
    """The description of one's own data: ``source`` is a folder with a dataset.yaml, or a YAML file in the folder."""
    if source.suffix.lower() in (".yaml", ".yml") and is_regular(source):
        return source
    if is_regular(source / FILE_NAME):
        return source / FILE_NAME
    if source.is_dir():
        raise UserError(f"{source}: got no {FILE_NAME} in it; write one, which --init begins, or name its layout first")
    raise UserError(
        f"{source}: got no such folder, wanted one with a {FILE_NAME}; archives need their layout's name first"
    )


def _init(source: Path) -> int:
    """Write the first description, and lists where need be; nothing that is there is replaced."""
    from ase_dist.data.first_description import first_description
    from ase_dist.files import write_atomic

    if not source.is_dir():
        raise UserError(f"{source}: got no such folder, wanted that of your photographs and labels")
    if (source / FILE_NAME).exists():
        raise UserError(f"{source / FILE_NAME} is there already; edit it, or move it away to begin anew")
    first = first_description(source)
    there = [name for name in first.lists if (source / name).exists()]
    if there:
        raise UserError(f"{source / there[0]} is there already, where --init would write a list; move it away")
    for name, names in first.lists.items():
        write_atomic(source / name, "\n".join(names) + "\n")
    write_atomic(source / FILE_NAME, first.text)
    for note in first.notes:
        logging.info("%s", note)
    logging.info("wrote %s: look it through, then check it with --check-only", source / FILE_NAME)
    return 0
