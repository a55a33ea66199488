"""The Hugging Face hub: files of ``hf://owner/name`` in its own cache on this machine, and uploads.

All of it is done by ``huggingface_hub``, as its variables say: HF_TOKEN, HF_HOME, HF_HUB_OFFLINE, HF_ENDPOINT. Only the
files that are asked for by name are fetched, and nothing of them is ever run. A place is pinned to the commit that it
had when its first file came (``Fetched.pinned``), so that the other ranks and hosts read the same one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from ase_dist.errors import ExitCode, RunError, UserError, describe, did_you_mean, file_error

SCHEME = re.compile(r"hf:/{1,2}(?!/)")  # pathlib makes one slash of two
NAME = r"[A-Za-z0-9][\w.-]*"
PLACE = re.compile(rf"({NAME}/{NAME})(?:@(refs/\w+/\w+|[^@/\s]+))?(?:/([^@]+))?/?", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")
FORM = "hf://owner/name, perhaps with @revision and /path"
LIBRARIES = ("huggingface_hub", "hf_xet", "httpx", "httpx2", "httpcore", "requests", "urllib3")  # raise their own
LOG_IN = "log in by `hf auth login`, or set HF_TOKEN"


class Place(NamedTuple):
    """A repository of models on the hub, or a file or folder in it."""

    repository: str
    revision: str | None
    path: str

    @classmethod
    def read(cls, text: str | PathLike[str]) -> Place:
        """``hf://owner/name[@revision][/path]``; UserError for anything else."""
        found = PLACE.fullmatch(SCHEME.sub("", str(text), count=1))
        if found is None or ".." in (found[3] or "").split("/"):
            raise UserError(f"got {str(text)!r}, wanted {FORM}")
        if found[1].startswith(("datasets/", "spaces/")):
            raise UserError(f"got {str(text)!r}, which is no repository of models; wanted {FORM}")
        return cls(found[1], found[2], (found[3] or "").strip("/"))

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"hf://{self.repository}{revision}{f'/{self.path}' if self.path else ''}"


class Fetched(NamedTuple):
    """Files that were fetched: the path of the first, and the place with its commit."""

    path: Path
    pinned: Place


def is_hub(name: str | PathLike[str]) -> bool:
    """Whether a setting or an option names something on the hub."""
    return SCHEME.match(str(name)) is not None


def fetch(place: Place, names: Sequence[str], *, lacking: str = "") -> Fetched:
    """Fetch the files ``names``, relative to the place's path, all of one commit; what the cache has is not fetched.

    Raises UserError where repository, revision or a file is missing, access is refused, or HF_HUB_OFFLINE is set and
    the cache lacks it; RunError where the hub cannot be reached. ``lacking`` goes with a missing first file.
    """
    first, pinned = Path(), place
    for i, name in enumerate(names):
        path = _download(pinned, name, lacking="" if i else lacking)
        if i == 0:
            first, pinned = path, place._replace(revision=_commit_of(path, pinned, name))
    return Fetched(first, pinned)


def fetch_any(place: Place, names: Sequence[str]) -> Fetched | None:
    """Fetch the first of ``names`` that there is at the place; None where there is none. Raises as ``fetch``."""
    for name in names:
        try:
            path = _download(place, name, lacking=None)
        except _MissingError:
            continue
        return Fetched(path, place._replace(revision=_commit_of(path, place, name), path=_joined(place, name)))
    return None


def files_of(place: Place) -> list[str]:
    """The files of a repository, the place's folder alone, relative to it. Raises as ``fetch``."""
    from huggingface_hub import HfApi

    with _told(place, ""):
        every = HfApi().list_repo_files(place.repository, revision=place.revision)
    folder = f"{place.path}/" if place.path else ""
    return sorted(name.removeprefix(folder) for name in every if name.startswith(folder))


def check_upload(repository: str) -> None:
    """Raise UserError where ``--push`` names no repository, or huggingface_hub has no token: before any work."""
    from huggingface_hub import get_token

    place = Place.read(f"hf://{repository}")
    if place.revision or place.path:
        raise UserError(f"--push: got {repository!r}, wanted owner/name")
    if get_token() is None:
        raise UserError(f"--push: there is no token for the hub; {LOG_IN}")


def upload(repository: str, files: Sequence[Path], *, private: bool, message: str) -> str:
    """Commit ``files`` to the top of a repository of models, which is made where it is missing; returns its address.

    The token is huggingface_hub's own, and is never shown. Raises UserError for a name that is none, a missing token
    or right, and where ``private`` and the repository is public; RunError where the hub cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    check_upload(repository)
    place, api = Place.read(f"hf://{repository}"), HfApi()
    with _told(place, ""):
        address = api.create_repo(repository, private=private or None, exist_ok=True)
        if private and not api.model_info(repository).private:
            raise UserError(f"--private: {place} is there and public; make it private on its page, or name another")
        added = [CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=file) for file in files]
        api.create_commit(repository, added, commit_message=message)
    return str(address)


class _MissingError(UserError):
    """There is no such file; another one may do."""


def _joined(place: Place, name: str) -> str:
    return str(PurePosixPath(place.path, name)) if name else place.path


def _commit_of(path: Path, place: Place, name: str) -> str:
    """The commit of a file in the cache: the folder under ``snapshots`` that it lies in."""
    depth = len(PurePosixPath(_joined(place, name)).parts)
    commit = path.parents[depth - 1].name
    assert COMMIT.fullmatch(commit), path
    return commit


def _download(place: Place, name: str, *, lacking: str | None) -> Path:
    """The file in the cache. ``lacking`` None: _MissingError where there is no such file."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    from huggingface_hub.utils.tqdm import disable_progress_bars  # several ranks, and logs, have no use for them

    disable_progress_bars()
    wanted = _joined(place, name)
    with _told(place, wanted):
        try:
            return Path(hf_hub_download(place.repository, wanted, revision=place.revision))
        except LocalEntryNotFoundError:
            if lacking is None and _is_offline():
                raise _MissingError(wanted) from None
            raise
        except EntryNotFoundError:
            if lacking is None:
                raise _MissingError(wanted) from None
    top = place._replace(path="")
    there = files_of(top)
    near = "" if lacking else did_you_mean(wanted, there)
    listed = f"{', '.join(there[:6])}{f' and {len(there) - 6} more' if len(there) > 6 else ''}" or "no files at all"
    raise UserError(f"{top} has no file {wanted!r}{near}; it has {listed}{f'; {lacking}' if lacking else ''}")


def _is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


@contextmanager
def _told(place: Place, wanted: str) -> Iterator[None]:
    """What huggingface_hub raises as one sentence; none of them has the token."""
    from huggingface_hub import constants, errors

    no_repository = f"{place}: the hub has no such repository of models, or it is private; check the name, or {LOG_IN}"
    no_revision = f"{place} has no revision {place.revision or 'main'!r}; name a branch, a tag or a commit"
    sentences: tuple[tuple[type[Exception], str], ...] = (  # the more special ones first
        (errors.GatedRepoError, f"{place} is gated: ask for access on its page on the hub, then {LOG_IN}"),
        (errors.RevisionNotFoundError, no_revision),
        (errors.RepositoryNotFoundError, no_repository),
        (errors.EntryNotFoundError, f"{place} has no file {wanted!r}"),
        (errors.HFValidationError, f"{place} is no name on the hub, wanted {FORM}"),
        (errors.OfflineModeIsEnabled, f"{place}: HF_HUB_OFFLINE is set, so the hub cannot be asked; unset it"),
    )
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # errors of connections are of the HTTP library, which another version has another of
        uncached = f"{wanted} is not in the cache {constants.HF_HUB_CACHE}"
        if isinstance(error, errors.LocalEntryNotFoundError):
            if _is_offline():
                way_out = "unset it, or fetch it once where there is a network"
                raise UserError(f"{place}: HF_HUB_OFFLINE is set and {uncached}; {way_out}") from None
            raise _unreachable(place, error.__cause__ or error, f", and {uncached}") from None
        for kind, sentence in sentences:
            if isinstance(error, kind):
                raise UserError(sentence) from None
        if isinstance(error, errors.HfHubHTTPError):
            status, said = error.response.status_code, f": {error.server_message}" if error.server_message else ""
            if status < 500 and status not in (408, 429):
                way_out = f"; {LOG_IN}" if status in (401, 403) else ""
                raise UserError(f"{place}: the hub refuses this (HTTP {status}{said}){way_out}") from None
            raise _unreachable(place, error, "") from None
        if isinstance(error, OSError) and error.errno is not None and error.filename is not None:  # the cache's disk
            raise file_error(error, f"{place}: {describe(error)}") from None
        is_theirs = type(error).__module__.partition(".")[0] in LIBRARIES or isinstance(error, (OSError, RuntimeError))
        if not is_theirs:
            raise
        raise _unreachable(place, error.__cause__ or error, "") from None


def _unreachable(place: Place, error: BaseException, more: str) -> RunError:
    from huggingface_hub import constants

    why = f"{type(error).__name__}: {describe(error)}"
    return RunError(
        f"{place}: the hub at {constants.ENDPOINT} cannot be reached ({why}){more}", exit_code=ExitCode.IO_ERROR
    )
