"""Pictures inside the page: recompressed, as data URIs, within a budget; what does not fit or open is said."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image, features

from ase_dist.errors import UserError
from ase_dist.report import text

BUDGET = 5_000_000  # bytes of data URIs in a page; what else is in it stays below 3 MB
MOST = 24  # pictures that are tried, evenly spread over the steps
FEW = 3  # pictures that are encoded to guess the weight of all
MAX_PIXELS = 60_000_000  # of one picture; a larger one is no grid of ours


class Candidate(NamedTuple):
    """A picture that may go into the page. ``is_drawing``: lines and text, kept without loss where that is small."""

    path: Path
    caption: str
    is_drawing: bool = False


class Quality(NamedTuple):
    """How far a picture is reduced: its greatest width in pixels, and the encoder's quality."""

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
    """The pictures in the order of the candidates, and a sentence for each that is not there."""

    shots: list[Shot]
    notes: list[str]


def make_album(candidates: Sequence[Candidate], *, budget: int = BUDGET, most: int = MOST) -> Album:
    """Every picture at the best quality at which all fit; at the lowest those that matter most, see ``by_weight``."""
    tried = [candidates[i] for i in sorted(by_weight(len(candidates))[:most])]
    pictures, notes = [], []
    for candidate in tried:
        try:
            pictures.append((candidate, _open(candidate.path)))
        except (OSError, ValueError, SyntaxError) as error:  # Pillow's readers raise all of them for damaged files
            notes.append(f"{candidate.path.name} cannot be shown: {' '.join(str(error).split())[:200]}.")
    if len(tried) < len(candidates):
        notes.append(
            f"{len(tried)} of {len(candidates)} pictures are shown, evenly spread; the rest are in the folder."
        )
    shots: list[Shot] = []
    for quality in _promising(pictures, budget):
        shots = [_encode(picture, candidate, quality) for candidate, picture in pictures]
        if _weight(shots) <= budget:
            return Album(shots, notes)
    chosen: list[int] = []
    for i in by_weight(len(shots)):
        if _weight([shots[j] for j in (*chosen, i)]) <= budget:
            chosen.append(i)
    kept = [shots[i] for i in sorted(chosen)]
    notes.append(
        f"{text.plural(len(shots) - len(kept), 'picture is', 'pictures are')} left out to keep the page small; "
        "see the folder."
    )
    return Album(kept, notes)


def by_weight(count: int) -> list[int]:
    """Indices of a series of pictures, those that say most first: the last, the first, then the middles of gaps."""
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
    """The picture as RGB, no wider than at best; OSError, ValueError or SyntaxError for what is no picture."""
    with Image.open(path) as image:
        if image.width * image.height > MAX_PIXELS:
            raise UserError(f"{image.width} x {image.height} pixels are too many")
        picture = image.convert("RGB")
    return _narrowed(picture, LADDER[0].width)


def _encode(picture: Image.Image, candidate: Candidate, quality: Quality) -> Shot:
    small = _narrowed(picture, quality.width)
    kind, data = _compress(small, quality, lossless=candidate.is_drawing)
    uri = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return Shot(candidate.path, candidate.caption, uri, small.width, small.height)


def _narrowed(picture: Image.Image, width: int) -> Image.Image:
    """The picture, at most ``width`` pixels wide."""
    if picture.width <= width:
        return picture
    return picture.resize((width, max(1, round(picture.height * width / picture.width))), Image.Resampling.LANCZOS)


def _compress(picture: Image.Image, quality: Quality, *, lossless: bool) -> tuple[str, bytes]:
    """WebP where Pillow was built with it, else PNG for drawings and JPEG for photographs."""
    buffer = io.BytesIO()
    if features.check("webp"):
        if lossless:
            picture.save(buffer, format="WEBP", lossless=True, quality=60)
        else:
            picture.save(buffer, format="WEBP", quality=quality.quality, method=4)
        return "webp", buffer.getvalue()
    if lossless:
        picture.save(buffer, format="PNG", optimize=True)
        return "png", buffer.getvalue()
    picture.save(buffer, format="JPEG", quality=quality.quality, optimize=True, progressive=True)
    return "jpeg", buffer.getvalue()


def _promising(pictures: Sequence[tuple[Candidate, Image.Image]], budget: int) -> Sequence[Quality]:
    """The qualities from the first at which a few of the pictures keep to their share of the budget."""
    few = [pictures[i] for i in by_weight(len(pictures))[:FEW]]
    share = budget * len(few) / max(1, len(pictures))
    for i, quality in enumerate(LADDER[:-1]):
        if _weight([_encode(picture, candidate, quality) for candidate, picture in few]) <= share:
            return LADDER[i:]
    return LADDER[-1:]


def _weight(shots: Sequence[Shot]) -> int:
    return sum(len(shot.uri) for shot in shots)
