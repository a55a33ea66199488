"""Pictures inside the page: recompressed, as data URIs, within a budget; notes name those that do not fit or open."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image, features

from ase_dist.picture_files import open_picture
from ase_dist.report import text

BUDGET = 5_000_000  # bytes of data URIs in a page; the rest of a page stays below 3 MB
MOST = 24  # pictures that are tried, evenly spread over the steps
FEW = 3  # pictures that are encoded to estimate the size of all
MAX_PIXELS = 60_000_000  # of one picture; a larger one was not written by a run


class Candidate(NamedTuple):
    """A picture that may go into the page. ``is_drawing``: lines and text, compressed without loss."""

    path: Path
    caption: str
    is_drawing: bool = False


class Quality(NamedTuple):
    """How far a picture is reduced: its maximum width in pixels, and the encoder's quality."""

    width: int
    quality: int


LADDER = (Quality(2400, 82), Quality(1800, 76), Quality(1300, 70), Quality(900, 60))


@dataclass(frozen=True)
class Shot:
    """A picture in the page, and the file that it was made from."""

    path: Path
    caption: str
    uri: str
    width: int
    height: int


class Album(NamedTuple):
    """The pictures in the order of the candidates, and a sentence for each that is missing."""

    shots: list[Shot]
    notes: list[str]


def make_album(candidates: Sequence[Candidate], *, budget: int = BUDGET, most: int = MOST) -> Album:
    """Every picture at the best quality at which all fit into ``budget`` bytes.

    Where they do not fit even at the lowest quality, the most important are kept, see ``by_importance``.
    """
    tried = [candidates[i] for i in sorted(by_importance(len(candidates))[:most])]
    pictures, notes = [], []
    for candidate in tried:
        try:
            pictures.append((candidate, _open(candidate.path)))
        except Exception as error:  # Pillow's readers raise errors of any type for damaged files
            reason = " ".join(str(error).split()) or type(error).__name__
            notes.append(f"{candidate.path.name} cannot be shown: {reason:.200}.")
    if len(tried) < len(candidates):
        notes.append(
            f"{len(tried)} of {len(candidates)} pictures are shown, evenly spread; the rest are in the folder."
        )
    shots: list[Shot] = []
    for quality in _promising(pictures, budget):
        shots = [_encode(picture, candidate, quality) for candidate, picture in pictures]
        if _total_bytes(shots) <= budget:
            return Album(shots, notes)
    chosen: list[int] = []
    for i in by_importance(len(shots)):
        if _total_bytes([shots[j] for j in (*chosen, i)]) <= budget:
            chosen.append(i)
    kept = [shots[i] for i in sorted(chosen)]
    notes.append(
        f"{text.plural(len(shots) - len(kept), 'picture is', 'pictures are')} left out to keep the page small; "
        "see the folder."
    )
    return Album(kept, notes)


def by_importance(count: int) -> list[int]:
    """Indices of a series of pictures, most important first: the last, the first, then the middles of gaps."""
    order = list(dict.fromkeys([count - 1, 0])) if count else []
    gaps = [(0, count - 1)]
    while gaps:
        low, high = gaps.pop(0)
        middle = (low + high) // 2
        if high - low > 1:
            order.append(middle)
            gaps += [(low, middle), (middle, high)]
    return order


def _open(path: Path) -> Image.Image:
    """The picture as RGB at the best quality's width; errors of any type for damaged files."""
    with open_picture(path, most_pixels=MAX_PIXELS) as image:
        picture = image.convert("RGB")
    return _narrowed(picture, LADDER[0].width)


def _encode(picture: Image.Image, candidate: Candidate, quality: Quality) -> Shot:
    """WebP where Pillow was built with it, else PNG for drawings and JPEG for photographs."""
    small, buffer, lossless = _narrowed(picture, quality.width), io.BytesIO(), candidate.is_drawing
    if features.check("webp"):
        kind = "webp"
        if lossless:
            small.save(buffer, format="WEBP", lossless=True, quality=60)
        else:
            small.save(buffer, format="WEBP", quality=quality.quality, method=4)
    elif lossless:
        kind = "png"
        small.save(buffer, format="PNG", optimize=True)
    else:
        kind = "jpeg"
        small.save(buffer, format="JPEG", quality=quality.quality, optimize=True, progressive=True)
    uri = f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return Shot(candidate.path, candidate.caption, uri, small.width, small.height)


def _narrowed(picture: Image.Image, width: int) -> Image.Image:
    """The picture, at most ``width`` pixels wide."""
    if picture.width <= width:
        return picture
    return picture.resize((width, max(1, round(picture.height * width / picture.width))), Image.Resampling.LANCZOS)


def _promising(pictures: Sequence[tuple[Candidate, Image.Image]], budget: int) -> Sequence[Quality]:
    """The qualities from the first on at which a sample of the pictures keeps to its share of the budget."""
    few = [pictures[i] for i in by_importance(len(pictures))[:FEW]]
    share = budget * len(few) / max(1, len(pictures))
    for i, quality in enumerate(LADDER[:-1]):
        if _total_bytes([_encode(picture, candidate, quality) for candidate, picture in few]) <= share:
            return LADDER[i:]
    return LADDER[-1:]


def _total_bytes(shots: Sequence[Shot]) -> int:
    return sum(len(shot.uri) for shot in shots)
