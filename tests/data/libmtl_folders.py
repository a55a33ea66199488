"""Small folders in the layout of LibMTL's and MTAN's benchmarks, as their archives have them."""

import numpy as np

CLASSES = {"nyuv2_13": 13, "cityscapes": 7}


def arrays(data, seed, *, shape=(18, 24)):
    """The arrays of one image: a ramp with unlabelled pixels in every label, float32 and float64 as found there."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: shape[0], : shape[1]] / np.array(shape)[:, None, None]
    label = np.floor((x + y) / 2 * CLASSES[data])
    depth = (1 + 4 * x + rng.uniform(0, 1)) if data == "nyuv2_13" else 0.05 + 0.4 * y
    normal = np.stack((x - 0.5, y - 0.5, np.full(shape, 0.7)), axis=-1)
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    label[:2], depth[:, :2], normal[-2:] = -1, 0, 0
    image = np.clip(np.stack((x, y, label / CLASSES[data]), axis=-1) + rng.uniform(0, 0.1, (*shape, 3)), 0, 1)
    found = {
        "image": image,
        "label": label.astype(np.float32),
        "depth": depth[..., None].astype(np.float32),
        "normal": normal.astype(np.float32),
    }
    if data == "cityscapes":
        del found["normal"]
    return found


def write_libmtl(root, data, *, train=4, val=2, **options):
    """``root`` with images numbered from 0 in each split; returns it."""
    for split, count in (("train", train), ("val", val)):
        for number in range(count):
            for kind, array in arrays(data, number if split == "train" else 100 + number, **options).items():
                (root / split / kind).mkdir(parents=True, exist_ok=True)
                np.save(root / split / kind / f"{number}.npy", array)
    return root
