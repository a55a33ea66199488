"""Rendered scenes: the same from the same numbers, labels that agree, exact mirrors and turns, true normals."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pytest

from ase_dist.scenes.classes import CONTEXT, NORMALS_VALID, PARTS, VOC
from ase_dist.scenes.compose import compose
from ase_dist.scenes.furniture import thing
from ase_dist.scenes.materials import Material
from ase_dist.scenes.render import Scene, render_scene
from ase_dist.scenes.solids import box, ellipsoid, frustum, round_cone
from ase_dist.scenes.tracing import View, pack, trace

pytestmark = pytest.mark.single_gpu
LABELS = ("semseg", "label_map", "parts", "saliency", "normals")
SIZE = 61  # odd, so that a pixel lies on the axis and vector loops have a remainder
GREY = Material((0.5, 0.5, 0.5))


@lru_cache(maxsize=64)
def scene(index: int, **camera: Any) -> Scene:
    return render_scene(seed=5, index=index, size=SIZE, **camera)


def arrays(one: Scene) -> dict[str, np.ndarray]:
    return {name: getattr(one, name) for name in ("image", *LABELS)}


def mirrored(one: Scene) -> dict[str, np.ndarray]:
    turned = {name: values[:, ::-1] for name, values in arrays(one).items()}
    turned["normals"] = turned["normals"] * np.float32([-1, 1, 1])
    return turned


def quarter(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A quarter turn counter-clockwise: what pointed right points up, what pointed down points right."""
    turned = {name: np.rot90(array) for name, array in values.items()}
    x, y, z = np.moveaxis(turned["normals"], -1, 0)
    return {**turned, "normals": np.stack([y, -x, z], axis=-1)}


def assert_same(got: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    for name, values in wanted.items():
        assert np.array_equal(got[name], values), name


def test_a_scene_depends_on_its_numbers_alone() -> None:
    first = {index: arrays(render_scene(seed=1, index=index, size=40)) for index in (0, 1, 2)}
    for index in (2, 0, 1):
        assert_same(arrays(render_scene(seed=1, index=index, size=40)), first[index])
    other_seed = render_scene(seed=2, index=0, size=40)
    assert not np.array_equal(first[0]["image"], other_seed.image)
    assert not np.array_equal(first[0]["image"], first[1]["image"])


@pytest.mark.parametrize("index", range(12))
def test_labels_agree_with_each_other(index: int) -> None:
    one = scene(index)
    assert (one.image.dtype, one.semseg.dtype, one.label_map.dtype) == (np.uint8, np.uint8, np.uint16)
    assert one.image.shape == (SIZE, SIZE, 3) and one.normals.shape == (SIZE, SIZE, 3)
    assert set(np.unique(one.saliency)) <= {0, 255} and set(np.unique(one.semseg)) <= set(range(21))
    assert ((one.parts > 0) == (one.semseg == VOC["person"])).all()
    assert one.has_person == (one.parts > 0).any()
    assert (one.semseg[one.saliency > 0] > 0).all()
    assert (one.label_map > 0).all()
    for name, voc in VOC.items():
        if voc:
            assert ((one.label_map == CONTEXT[name]) == (one.semseg == voc)).all(), name


@pytest.mark.parametrize("index", range(12))
def test_normals_are_unit_vectors_towards_the_viewer_where_pascal_has_them(index: int) -> None:
    one = scene(index)
    valid = np.isin(one.label_map, list(NORMALS_VALID))
    length = np.linalg.norm(one.normals, axis=-1)
    assert np.abs(length[valid] - 1).max(initial=0) < 1e-5
    assert not length[~valid].any()
    x, y = np.meshgrid(*[(np.arange(SIZE) + 0.5 - SIZE / 2) / SIZE * 1.2] * 2)  # at least as wide as any camera
    away = one.normals[..., 0] * x + one.normals[..., 1] * y - one.normals[..., 2]
    assert (away[valid] < 0.35).all()


@pytest.mark.parametrize("index", range(12))
def test_instances_are_the_labels_taken_apart(index: int) -> None:
    one = scene(index)
    semseg, parts = np.zeros_like(one.semseg), np.zeros_like(one.parts)
    for instance in one.instances:
        assert instance.mask.any() and VOC[instance.name] == instance.voc
        assert not semseg[instance.mask].any()
        semseg[instance.mask] = instance.voc
        for name, mask in instance.parts.items():
            assert mask.any() and not (mask & ~instance.mask).any()
            parts[mask] = PARTS[name]
    assert np.array_equal(semseg, one.semseg) and np.array_equal(parts, one.parts)


@pytest.mark.parametrize("index", range(6))
def test_a_mirrored_camera_gives_exactly_the_mirrored_scene(index: int) -> None:
    assert_same(arrays(scene(index, flip=True)), mirrored(scene(index)))


@pytest.mark.parametrize("index", range(6))
def test_a_quarter_turn_gives_exactly_the_turned_scene(index: int) -> None:
    assert_same(arrays(scene(index, roll=90.0)), quarter(arrays(scene(index))))
    assert_same(arrays(scene(index, roll=180.0)), quarter(quarter(arrays(scene(index)))))
    assert_same(arrays(scene(index, roll=-270.0, flip=True)), quarter(mirrored(scene(index))))


@pytest.mark.parametrize("degrees", [20.0, -35.0])
def test_any_roll_turns_picture_and_normals_counter_clockwise(degrees: float) -> None:
    upright, turned = scene(1), scene(1, roll=degrees)
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    y, x = np.mgrid[0:SIZE, 0:SIZE] - (SIZE - 1) / 2
    source_x, source_y = np.rint(c * x - s * y + (SIZE - 1) / 2), np.rint(s * x + c * y + (SIZE - 1) / 2)
    inside = (np.minimum(source_x, source_y) >= 0) & (np.maximum(source_x, source_y) < SIZE)
    i, j = source_y[inside].astype(int), source_x[inside].astype(int)
    assert (turned.label_map[inside] == upright.label_map[i, j]).mean() > 0.9
    nx, ny, nz = upright.normals[i, j].T
    wanted = np.stack([c * nx + s * ny, c * ny - s * nx, nz], axis=-1)
    same = np.abs(turned.normals[inside] - wanted).max(axis=-1) < 0.05
    assert same.mean() > 0.75


def test_all_classes_and_both_kinds_of_ground_occur() -> None:
    names: set[str] = set()
    for index in range(150):
        scenery = compose(np.random.default_rng([0, index]))
        names |= {thing.name for thing in scenery.things} | {scenery.world.kind}
    assert set(VOC) - {"background"} <= names
    assert {"room", "street", "meadow", "lake"} <= names


def ray_hit(shape: Any, start: np.ndarray, direction: np.ndarray) -> float:
    """The distance to the hit of one ray along a unit vector, by the renderer."""
    one = thing("chair", 1.0, 1.0)
    one.add(shape)
    axes = np.linalg.qr(np.column_stack([direction, np.eye(3)[:, :2]]))[0].T.astype(np.float32)
    grid = np.array([0.0, 1e-3], np.float32)  # of the four rays the first is looked at
    view = View(np.float32(start), axes[1], axes[2], np.float32(direction), grid, grid)
    return float(trace(pack([one]), view, np.full(4, np.inf, np.float32)).t[0])


def inside_round_cone(points: np.ndarray) -> np.ndarray:
    """Hull of spheres of radius 0.5 at 0 and 0.2 at (0, 1, 0): within one of the spheres between them."""
    inside = np.zeros(len(points), bool)
    for share in np.linspace(0, 1, 401):
        inside |= np.linalg.norm(points - [0, share, 0], axis=-1) <= 0.5 - 0.3 * share
    return inside


SOLIDS = {
    "ellipsoid": (ellipsoid((0, 0, 0), (0.5, 1.0, 0.25), GREY), lambda p: ((p / [0.5, 1.0, 0.25]) ** 2).sum(-1) <= 1),
    "box": (box((0, 0, 0), (0.5, 1.0, 0.25), GREY), lambda p: (np.abs(p) <= [0.5, 1.0, 0.25]).all(-1)),
    "frustum": (
        frustum((0, 0, 0), (0.5, 1.0, 0.5), GREY, top=0.4),
        lambda p: (np.abs(p[:, 1]) <= 1) & (np.hypot(p[:, 0], p[:, 2]) <= 0.5 * (0.7 - 0.3 * p[:, 1])),
    ),
    "round cone": (round_cone((0, 0, 0), (0, 1, 0), (0.5, 0.2), GREY), inside_round_cone),
}  # fmt: skip


@pytest.mark.parametrize("name", SOLIDS)
def test_rays_meet_a_solid_where_marching_along_them_does(name: str) -> None:
    shape, inside = SOLIDS[name]
    rng = np.random.default_rng(0)
    hit_count = 0
    for _ in range(25):
        start = rng.normal(size=3)
        start *= 3 / np.linalg.norm(start)
        aim = rng.uniform(-0.6, 0.6, 3)
        direction = (aim - start) / np.linalg.norm(aim - start)
        steps = np.linspace(1, 5, 4001)
        within = inside(start + steps[:, None] * direction)
        marched = steps[within.argmax()] if within.any() else np.inf
        got = ray_hit(shape, start, direction)
        if np.isfinite(marched) and np.isfinite(got):
            hit_count += 1
            assert abs(got - marched) < 0.003, (start, direction)
        elif np.isfinite(marched) != np.isfinite(got):  # a ray may graze the solid between two steps
            point = start + min(got, marched) * direction
            assert inside(np.stack([point * 0.99, point * 1.02])).tolist() == [True, False]
    assert hit_count > 8


@pytest.mark.parametrize(("wrong", "word"), [({"size": 4}, "size"), ({"seed": -1}, "seed"), ({"index": -1}, "index")])
def test_wrong_numbers_are_named(wrong: dict[str, int], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        render_scene(**{"seed": 0, "index": 0, "size": 32, **wrong})
