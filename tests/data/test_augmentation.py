"""Presets draw what they say from seed, epoch and image alone, and zoomed depth and normals are of one surface."""

import colorsys
import logging
import math
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from scipy.ndimage import maximum_filter, minimum_filter, uniform_filter

from ase_dist.data import augmentation
from ase_dist.data.augmentation import Augmentation, Warp
from ase_dist.data.batch import Record
from ase_dist.data.labels import codes_from_normals, normals_from_codes
from ase_dist.data.loader import build_train_loader
from ase_dist.data.nyud import NYUD
from ase_dist.data.transforms import Transform, normalise
from ase_dist.image_size import ImageSize
from ase_dist.read_config import build_settings, load_settings, shipped_configs
from ase_dist.registries import AUGMENTATIONS
from ase_dist.seeding import generator
from ase_dist.tasks import NYUD_TASKS, select_tasks

pytestmark = pytest.mark.single_gpu

SHAPE, FOCAL = (480, 640), 500.0
PRESETS = ("eigen", "astmt", "atrc", "mtan", "none")
GEOMETRY = (NYUD_TASKS["depth"], NYUD_TASKS["normals"])


def draw(preset, *, seed=0, epoch=0, index=0, labels=None, shape=(30, 40)):
    record = Record(index, "a", np.zeros((*shape, 3), np.uint8), labels or {})
    return AUGMENTATIONS[preset].draw(record, generator(seed, "augment", epoch, index))


# --- depth and normals -----------------------------------------------------------------------------------------------


def camera_rays(points_2HW):
    return np.stack([points_2HW[0] / FOCAL, points_2HW[1] / FOCAL, np.ones(points_2HW.shape[1:])])


def seen_surface(kind):
    """(depth [H, W], normals [3, H, W]) of a tilted plane or a ball before a camera; zero where there is none."""
    height, width = SHAPE
    x, y = np.meshgrid(np.arange(width) + 0.5 - width / 2, np.arange(height) + 0.5 - height / 2)
    rays = camera_rays(np.stack([x, y]))
    if kind == "plane":
        normal = np.array([0.55, -0.35, -1.0]) / np.linalg.norm([0.55, -0.35, -1.0])
        depth = normal[2] * 3.0 / np.tensordot(normal, rays, 1)
        normals = np.broadcast_to(normal[:, None, None], rays.shape)
        return depth, normals
    centre, radius = np.array([0.2, -0.1, 4.0])[:, None, None], 1.6
    a, b, c = (rays**2).sum(0), (rays * centre).sum(0), (centre**2).sum() - radius**2
    inside = b * b - a * c
    depth = np.where(inside > 0, (b - np.sqrt(np.maximum(inside, 0))) / a, 0)
    normals = np.where(inside > 0, (rays * depth - centre) / radius, 0)
    return depth, normals


def normals_of_depth(depth_SS, warp, *, shape=SHAPE, focal=FOCAL):
    """Unit vectors towards the camera by central differences of the points that the same camera places there.

    The picture was resized to a square, so the focal length differs along x and y; the principal point is where the
    warp has moved the centre of the image to.
    """
    size = len(depth_SS)
    matrix, offset = warp.source(shape, ImageSize(size, size))
    principal = np.linalg.solve(matrix, np.array([shape[1] / 2, shape[0] / 2]) - offset)
    x, y = np.meshgrid(np.arange(size) + 0.5, np.arange(size) + 0.5)
    points = np.stack([
        depth_SS * (x - principal[0]) / (focal * size / shape[1]),
        depth_SS * (y - principal[1]) / (focal * size / shape[0]),
        depth_SS,
    ])  # fmt: skip
    along_x, along_y = points[:, 1:-1, 2:] - points[:, 1:-1, :-2], points[:, 2:, 1:-1] - points[:, :-2, 1:-1]
    normals = np.cross(along_y, along_x, axis=0)
    return normals / np.maximum(np.linalg.norm(normals, axis=0), 1e-9)


def disagreement(sample, warp):
    """Degrees between the label's normals and those of the label's depth, away from the rim of what is seen."""
    depth, label = sample.labels["depth"][0].numpy().astype(np.float64), sample.labels["normals"].numpy()
    found = normals_of_depth(depth, warp)
    known = depth > 0
    inner = known[1:-1, 1:-1] & known[1:-1, 2:] & known[1:-1, :-2] & known[2:, 1:-1] & known[:-2, 1:-1]
    inner &= (np.abs(found[2]) > 0.35) & (np.linalg.norm(label, axis=0)[1:-1, 1:-1] > 0)
    angles = np.degrees(np.arccos(np.clip((found * label[:, 1:-1, 1:-1]).sum(0), -1, 1)))
    assert inner.sum() > 300
    return angles[inner]


def surface_record(kind):
    depth, normals = seen_surface(kind)
    labels = {"depth": depth.astype(np.float32), "normals": codes_from_normals(normals)}
    return Record(0, kind, np.zeros((*SHAPE, 3), np.uint8), labels)


@pytest.mark.parametrize("kind", ["plane", "ball"])
def test_normals_of_the_augmented_depth_are_the_augmented_normals(kind):
    """At every zoom, angle, mirroring and crop; left as they are, normals are up to 17 degrees off."""
    record = surface_record(kind)
    transform = Transform(64, tasks=GEOMETRY, augmentation="eigen")
    published = Transform(64, tasks=GEOMETRY, augmentation="astmt")
    for flip in (False, True):
        for scale, degrees, center in (
            (1.0, 0, (0.5, 0.5)), (0.75, -20, (0.5, 0.5)), (1.25, 13, (0.5, 0.5)), (0.5, 20, (0.5, 0.5)),
            (2.0, -7, (0.5, 0.5)), (1.5, 0, (0.4, 0.6)), (1.2, 0, (0.55, 0.45)),
        ):  # fmt: skip
            warp = Warp(flip=flip, scale=scale, angle=math.radians(degrees), center=center)
            angles = disagreement(transform.warped_sample(record, warp), warp)
            assert np.median(angles) < 1.2 and np.quantile(angles, 0.95) < 3.5, warp
            if scale in (0.75, 1.25):
                assert np.median(disagreement(published.warped_sample(record, warp), warp)) > 4


def test_zoomed_normals_stay_unit_vectors_and_zero_stays_zero():
    codes = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    codes[:3] = 128
    plain, zoomed = normals_from_codes(codes), normals_from_codes(codes, zoom=0.6)
    assert not zoomed[:, :3].any()
    np.testing.assert_allclose(np.linalg.norm(zoomed[:, 3:], axis=0), 1, atol=1e-6)
    wanted = (plain * np.array([1, 1, 0.6])[:, None, None])[:, 3:]
    np.testing.assert_allclose(zoomed[:, 3:], wanted / np.linalg.norm(wanted, axis=0), atol=1e-6)
    np.testing.assert_array_equal(normals_from_codes(codes, zoom=1.0), plain)


# --- draws -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_a_sample_depends_on_seed_epoch_and_index_alone(preset):
    rng = np.random.default_rng(0)
    labels = {"semseg": rng.integers(0, 5, (30, 40), dtype=np.uint8)}
    image = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
    transform = Transform(20, tasks=select_tasks("scenes", ["semseg"]), augmentation=preset)

    def sample(seed, epoch, index):
        return transform.train_sample(Record(index, "a", image, labels), seed=seed, epoch=epoch)

    torch.manual_seed(1)
    first = sample(1, 2, 3)
    state = torch.random.get_rng_state()
    torch.manual_seed(9)
    again = sample(1, 2, 3)
    assert torch.equal(first.image, again.image) and torch.equal(first.labels["semseg"], again.labels["semseg"])
    torch.manual_seed(1)
    assert torch.equal(torch.random.get_rng_state(), state)
    others = [sample(*key) for key in ((2, 2, 3), (1, 3, 3), (1, 2, 4), (3, 2, 1))]
    alike = sum(torch.equal(first.image, other.image) for other in others)
    assert alike == 4 if preset == "none" else alike <= (1 if preset == "mtan" else 0)  # whose first zoom is none


def test_the_draws_of_astmt_are_as_they_were():
    """Written down with the version before presets; eigen draws the same."""
    wanted = {
        (1, 2, 3): (False, 0.8135220998621031, 0.05502561799283138),
        (0, 0, 0): (True, 0.8553528540900888, -0.22268950217204697),
        (7, 31, 4997): (False, 0.7728494140273718, -0.08940613787756962),
    }
    for (seed, epoch, index), (flip, scale, angle) in wanted.items():
        for preset in ("astmt", "eigen"):
            assert draw(preset, seed=seed, epoch=epoch, index=index) == Warp(flip=flip, scale=scale, angle=angle)


@pytest.mark.parametrize("preset", ["astmt", "eigen"])
def test_zooms_and_angles_fill_their_ranges(preset):
    warps = [draw(preset, index=i) for i in range(1500)]
    assert np.mean([warp.flip for warp in warps]) == pytest.approx(0.5, abs=0.05)
    for values, low, high in (
        ([warp.scale for warp in warps], 0.75, 1.25),
        ([math.degrees(warp.angle) for warp in warps], -20, 20),
    ):
        assert low <= min(values) < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < max(values) <= high
        assert np.mean(values) == pytest.approx((low + high) / 2, abs=0.03 * (high - low))


def test_atrc_crops_within_the_picture_and_pads_round_it():
    warps = [draw("atrc", index=i) for i in range(1500)]
    scales = np.array([warp.scale for warp in warps])
    assert 0.5 <= scales.min() < 0.53 and 1.97 < scales.max() <= 2 and scales.mean() == pytest.approx(1.25, abs=0.04)
    assert np.mean([warp.flip for warp in warps]) == pytest.approx(0.5, abs=0.05)
    centers = np.array([warp.center for warp in warps])
    half = 0.5 / scales[:, None]
    smaller = scales <= 1
    assert (centers[smaller] == 0.5).all() and not any(warp.angle for warp in warps)
    assert (centers[~smaller] >= half[~smaller] - 1e-9).all() and (centers[~smaller] <= 1 - half[~smaller] + 1e-9).all()
    places = ((centers - half) / (1 - 2 * half))[scales > 1.2]  # 0: at one rim, 1: at the other
    assert places.min() < 0.02 and places.max() > 0.98 and places.mean() == pytest.approx(0.5, abs=0.03)


def test_atrc_avoids_crops_of_one_class():
    """A quarter of the picture has other classes: nearly every crop that could show it does."""
    ids = np.zeros((90, 120), np.uint8)
    ids[:, 80:] = np.arange(40)[None] // 10
    counted = []
    for labels in ({"semseg": ids}, {}):
        largest = []
        for i in range(300):
            warp = draw("atrc", index=i, labels=labels, shape=ids.shape)
            if warp.scale > 1.3:
                record = Record(i, "a", np.zeros((*ids.shape, 3), np.uint8), {"semseg": ids})
                task = select_tasks("scenes", ["semseg"])
                seen = Transform(60, tasks=task, augmentation="atrc").warped_sample(record, warp).labels["semseg"]
                largest.append(np.bincount(seen.reshape(-1).numpy()).max() / seen.numel())
        counted.append(np.mean(np.array(largest) > 0.77))
    assert counted[0] < 0.1 and counted[1] > 0.4


def test_mtan_takes_whole_pixels_of_libmtls_pictures():
    """288 x 384: crops of 288 x 384, 240 x 320 and 192 x 256 pixels at every place, the first and the last included."""
    warps = [draw("mtan", index=i, shape=(288, 384)) for i in range(3000)]
    for scale, (height, width) in {1.0: (288, 384), 1.2: (240, 320), 1.5: (192, 256)}.items():
        chosen = [warp for warp in warps if warp.scale == scale]
        assert len(chosen) == pytest.approx(1000, abs=120)
        for axis, length, window in ((0, 384, width), (1, 288, height)):
            starts = np.array([warp.center[axis] * length - window / 2 for warp in chosen])
            np.testing.assert_allclose(starts, np.rint(starts), atol=1e-9)
            assert starts.min() == pytest.approx(0, abs=1.5) and starts.max() == pytest.approx(length - window, abs=1.5)


@pytest.mark.parametrize("preset", PRESETS)
def test_nothing_but_known_values_at_the_borders(preset):
    """All tasks of all presets: outside is ignored, depth and normals are finite, class ids those of the picture."""
    rng = np.random.default_rng(0)
    shape = (33, 47)
    labels = {
        "semseg": rng.integers(0, 4, shape, dtype=np.uint8),
        "depth": rng.uniform(1, 5, shape).astype(np.float32),
        "normals": rng.integers(0, 256, (*shape, 3), dtype=np.uint8),
        "edge": rng.integers(0, 2, shape, dtype=np.uint8),
    }
    record = Record(0, "a", rng.integers(0, 256, (*shape, 3), dtype=np.uint8), labels)
    transform = Transform(24, tasks=select_tasks("nyud"), augmentation=preset)
    padded = 0
    for epoch in range(12):
        sample = transform.train_sample(record, seed=0, epoch=epoch)
        outside = sample.labels["semseg"] == 255
        padded += bool(outside.any())
        assert set(sample.labels["semseg"].unique().tolist()) <= {0, 1, 2, 3, 255}
        assert torch.equal(sample.labels["edge"] == 255, outside) and torch.equal(
            sample.labels["depth"][0] == 0, outside
        )
        assert sample.labels["normals"].isfinite().all() and not sample.labels["normals"][:, outside].any()
        gone = sample.image[:, outside]
        assert gone.numel() == 0 or gone.abs().max() < 0.02  # the mean colour, also where colours are distorted
    assert (padded > 0) == (preset in ("eigen", "astmt", "atrc"))


# --- colours ---------------------------------------------------------------------------------------------------------


def test_saturation_is_hsvs():
    pixels = np.random.default_rng(0).integers(0, 256, (1, 200, 3), dtype=np.uint8)
    pixels[0, :2] = ((0, 0, 0), (9, 9, 9))
    for factor in (0.5, 0.8, 1.4):
        found = augmentation._saturated(pixels, factor)
        for before, after in zip(pixels[0], found[0], strict=True):
            hue, saturation, value = colorsys.rgb_to_hsv(*(before / 255))
            wanted = 255 * np.array(colorsys.hsv_to_rgb(hue, min(1, saturation * factor), value))
            np.testing.assert_allclose(after, wanted, atol=0.51)


def test_atrc_changes_colours_by_the_image_and_others_do_not():
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    seen = [augmentation.distort_colors(image, generator(0, "c", i)) for i in range(200)]
    unchanged = sum(np.array_equal(one, image) for one in seen)
    assert unchanged == pytest.approx(200 / 16, abs=10)  # none of the four steps was chosen
    assert all(one.dtype == np.uint8 and one.shape == image.shape for one in seen)
    np.testing.assert_array_equal(seen[3], augmentation.distort_colors(image, generator(0, "c", 3)))
    shifts = [int(one.mean()) - int(image.mean()) for one in seen]
    assert min(shifts) < -20 and max(shifts) > 20
    assert [name for name in PRESETS if AUGMENTATIONS[name].recolor is not None] == ["atrc"]


# --- settings --------------------------------------------------------------------------------------------------------


def test_the_old_switch_still_means_what_it_meant():
    for value, preset in (("true", "astmt"), ("false", "none"), ("off", "none")):
        assert load_settings(None, [f"data.augment={value}"]).data.augmentation == preset
    assert build_settings({"data": {"name": "pascal_context"}}).data.augmentation == "eigen"


@pytest.mark.parametrize("config", shipped_configs())
def test_configs_of_published_protocols_keep_their_augmentation(config):
    of_atrc = ("nyud_ase_16_3_1_4", "pascal_ase_16_3_1_4_512")  # its sizes
    wanted = "atrc" if config in of_atrc else "astmt" if config.startswith("pascal_") else "none"
    assert load_settings(config).data.augmentation == ("eigen" if config == "scenes_pretrain" else wanted)


def test_a_program_adds_a_preset(monkeypatch, pascal, caplog):
    """It is known to the settings, reaches the samples, and what leaves normals says so at the start."""
    quarter = Augmentation(lambda record, draws: Warp(angle=math.pi / 2), zooms_normals=False)
    monkeypatch.setitem(AUGMENTATIONS._entries, "quarter", quarter)
    pascal.add("train_0", shape=(12, 12))
    tree = {"data": {"name": "pascal_context", "root": str(pascal.root), "size": 16, "augmentation": "quarter"}}
    settings, tasks = build_settings({**tree, "train": {"batch_size": 1}}), select_tasks("pascal_context")
    with caplog.at_level(logging.INFO, logger="ase_dist"):
        loader = build_train_loader(settings, tasks, rank=0, world_size=1)
    batch, record = next(loader), loader.dataset[0]
    loader.close()
    plain = Transform(16, tasks=tasks, augmentation="none").train_sample(record, seed=0, epoch=0)
    assert torch.equal(batch.labels["semseg"][0], plain.labels["semseg"].rot90(-1))
    assert "data.augmentation=quarter leaves normals as they are" in caplog.text


# --- real pictures ---------------------------------------------------------------------------------------------------


def fitted_normals(depth_HW, *, focal, radius=3):
    """[H, W, 3] z towards the viewer, by planes a x + b y + c = 1 / Z fitted to windows; and where they are smooth."""
    height, width = depth_HW.shape
    x, y = np.meshgrid(
        (np.arange(width) + 0.5 - width / 2) / focal[0], (np.arange(height) + 0.5 - height / 2) / focal[1]
    )
    side, known = 2 * radius + 1, depth_HW > 0
    terms, inverse = (x, y, np.ones_like(x)), np.divide(1, depth_HW, out=np.zeros_like(depth_HW), where=known)

    def mean(values):
        return uniform_filter(values * known, side, mode="constant")

    lowest = minimum_filter(np.where(known, depth_HW, 0), side, mode="constant")
    smooth = (lowest > 0) & (maximum_filter(depth_HW, side) - lowest < 0.05 * depth_HW)
    left = np.array([[mean(a * b)[smooth] for b in terms] for a in terms]).transpose(2, 0, 1)
    right = np.array([mean(inverse * a)[smooth] for a in terms]).transpose(1, 0)
    normals = np.zeros((height, width, 3))
    normals[smooth] = np.linalg.solve(left, right[..., None])[..., 0] * (-1, -1, 1)
    return normals / np.maximum(np.linalg.norm(normals, axis=-1, keepdims=True), 1e-9), smooth


@pytest.mark.shared_data
def test_normals_of_a_kinects_zoomed_depth_are_the_zoomed_normals(shared_data):
    """As first measured: 2 degrees of noise unzoomed, 3 zoomed; 7 to 8 with normals left as they are."""
    pictures = NYUD(shared_data / "data" / "rgbd" / "nyud", "val", GEOMETRY)
    off = {}
    for preset in ("eigen", "astmt"):
        transform = Transform(240, tasks=GEOMETRY, augmentation=preset)
        for scale in (0.75, 1.0, 1.25):
            means = []
            for i in range(0, len(pictures), 6):
                sample = transform.warped_sample(pictures[i], Warp(scale=scale))
                label = sample.labels["normals"].numpy().transpose(1, 2, 0)
                height, width = pictures[i].image.shape[:2]
                focal = (262.5 * 240 / width, 262.5 * 240 / height)  # of the sensor at 320 x 240
                found, smooth = fitted_normals(sample.labels["depth"][0].numpy().astype(np.float64), focal=focal)
                both = smooth & (np.linalg.norm(label, axis=-1) > 0)
                means.append(np.degrees(np.arccos(np.clip((found * label).sum(-1)[both], -1, 1))).mean())
            off[preset, scale] = np.mean(means)
    assert off["eigen", 1.0] == off["astmt", 1.0] < 3
    assert off["eigen", 0.75] < 4.5 and off["eigen", 1.25] < 4.5
    assert off["astmt", 0.75] > 6 and off["astmt", 1.25] > 5.5


# --- docs/augmentation.md --------------------------------------------------------------------------------------------

PAGE = (Path(__file__).parents[2] / "docs" / "augmentation.md").read_text(encoding="utf-8")


def test_the_page_names_every_preset_and_its_commands_are_right(capsys):
    from ase_dist.commands.main import main

    rows = re.findall(r"^\| `(\w+)`", PAGE, re.M)
    assert rows == [*PRESETS]
    commands = [line for block in re.findall(r"^```bash\n(.*?)^```$", PAGE, re.M | re.S) for line in block.splitlines()]
    shown = []
    for command in commands:
        assert main([*shlex.split(command)[3:], "--print-config"]) == 0
        shown.append(yaml.safe_load(capsys.readouterr().out))
    assert [tree["data"]["augmentation"] for tree in shown] == ["atrc", "eigen"]
    assert shown[1]["tasks"] == ["semseg", "normals", "depth"]


def test_the_pages_own_preset_turns_the_picture(monkeypatch):
    monkeypatch.setattr(AUGMENTATIONS, "_entries", dict(AUGMENTATIONS._entries))
    exec(re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)[0], {})
    image = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    sample = Transform(9, tasks=(), augmentation="upside_down").train_sample(Record(0, "a", image, {}), seed=0, epoch=0)
    torch.testing.assert_close(sample.image, normalise(image).flip(1, 2), atol=0.05, rtol=0)
