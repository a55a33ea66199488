"""Pictures: recompression, the budget, what is left out, damaged files."""

import base64
import io
import itertools

import numpy as np
import pytest
from PIL import Image, features

from ase_dist.report.images import LADDER, Candidate, by_importance, make_album
from tests.report.conftest import write_picture

pytestmark = pytest.mark.single_gpu


def candidates(folder, count, **options):
    for i in range(count):
        write_picture(folder / f"{i}.png", seed=i, **options)
    return [Candidate(folder / f"{i}.png", str(i)) for i in range(count)]


def opened(shot):
    head, data = shot.uri.split(",")
    assert head in ("data:image/webp;base64", "data:image/jpeg;base64", "data:image/png;base64")
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_pictures_look_the_same_and_say_their_size(tmp_path):
    album = make_album(candidates(tmp_path, 2))
    assert [shot.caption for shot in album.shots] == ["0", "1"] and album.notes == []
    for i, shot in enumerate(album.shots):
        picture, source = opened(shot).convert("RGB"), Image.open(tmp_path / f"{i}.png")
        assert (shot.width, shot.height) == picture.size == source.size
        assert np.abs(np.asarray(picture, float) - np.asarray(source, float)).mean() < 12
        assert len(shot.uri) < (tmp_path / f"{i}.png").stat().st_size * 4


def test_drawings_lose_nothing(tmp_path):
    write_picture(tmp_path / "a.png")
    (shot,) = make_album([Candidate(tmp_path / "a.png", "a", is_drawing=True)]).shots
    assert np.array_equal(np.asarray(opened(shot).convert("RGB")), np.asarray(Image.open(tmp_path / "a.png")))


def test_a_wide_picture_is_narrowed(tmp_path):
    (shot,) = make_album(candidates(tmp_path, 1, size=(3200, 160))).shots
    assert (shot.width, shot.height) == (LADDER[0].width, 120)


def test_a_tight_budget_lowers_the_quality_of_all_before_it_drops_any(tmp_path):
    found = candidates(tmp_path, 3, size=(2000, 120), grain=1)
    rich = make_album(found)
    weight = sum(len(shot.uri) for shot in rich.shots)
    poor = make_album(found, budget=weight // 2)
    assert len(poor.shots) == 3 and sum(len(shot.uri) for shot in poor.shots) <= weight // 2 and poor.notes == []
    assert {shot.width for shot in poor.shots} == {
        min(2000, next(q.width for q in LADDER if q.width <= poor.shots[0].width))
    }


def test_a_few_light_pictures_do_not_hide_the_weight_of_the_others(tmp_path):
    found = candidates(tmp_path, 5, size=(64, 64))  # 0, 2 and 4 are weighed first
    for i in (1, 3):
        write_picture(tmp_path / f"{i}.png", size=(2000, 120), grain=1, seed=i)
    weight = sum(len(shot.uri) for shot in make_album(found).shots)
    assert sum(len(shot.uri) for shot in make_album(found, budget=weight // 2).shots) <= weight // 2


def test_where_not_even_the_least_fits_the_last_one_stays_and_it_is_said(tmp_path):
    found = candidates(tmp_path, 4)
    least = min(len(shot.uri) for shot in make_album(found, budget=1_000_000_000).shots)
    album = make_album(found, budget=int(least * 1.3))
    assert [shot.caption for shot in album.shots] == ["3"]
    assert "3 pictures are left out" in album.notes[-1]


def test_of_many_pictures_some_are_tried_and_it_is_said(tmp_path):
    album = make_album(candidates(tmp_path, 9, size=(64, 64)), most=5)
    assert [shot.caption for shot in album.shots] == ["0", "2", "4", "6", "8"]
    assert "5 of 9 pictures" in album.notes[0]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 10, 100])
def test_the_last_and_the_first_matter_most_and_every_start_of_the_order_is_spread_evenly(count):
    order = by_importance(count)
    assert sorted(order) == list(range(count)) and order[:2] == [count - 1, 0][:count]
    for chosen in range(3, min(count, 9)):
        gaps = [b - a for a, b in itertools.pairwise(sorted(order[:chosen]))]
        assert max(gaps) <= 2 * (min(gaps) + 1)


@pytest.mark.parametrize("damage", ["empty", "half", "text", "gone"])
def test_a_damaged_picture_is_named_and_the_others_are_shown(tmp_path, damage):
    found = candidates(tmp_path, 2)
    whole = found[0].path.read_bytes()
    if damage == "gone":
        found[0].path.unlink()
    else:
        found[0].path.write_bytes({"empty": b"", "half": whole[: len(whole) // 2], "text": b"not a picture"}[damage])
    album = make_album(found)
    assert [shot.caption for shot in album.shots] == ["1"] and album.notes[0].startswith("0.png cannot be shown")


def test_pillow_without_webp_has_jpeg_and_png(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "check", lambda name: False)
    write_picture(tmp_path / "a.png")
    found = [Candidate(tmp_path / "a.png", "a", is_drawing=drawing) for drawing in (True, False)]
    assert [opened(shot).format for shot in make_album(found).shots] == ["PNG", "JPEG"]
