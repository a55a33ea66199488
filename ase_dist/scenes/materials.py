"""Colours and patterns of surfaces: tiling noise, and functions that blend a material's two colours over a shape.

Colours are sRGB in 0..1, blended as such. A pattern gets a shape's metric coordinates ``q`` [3, n] (metres along the
shape's own axes), its unit coordinates ``p`` [3, n] (-1..1 over the shape) and the materials' ``scale`` [n], and
returns the share [n] of the second colour.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Rgb = tuple[float, float, float]
Pattern = Callable[[Array, Array, Array], Array]

NOISE_SIZE = 256
_ROUGHNESS = {"cloud": 1.7, "grain": 0.7}


def f32(values: Any) -> Array:
    """Values as float32; no copy where they are."""
    return np.asarray(values, np.float32)


class Material(NamedTuple):
    """What a surface looks like; ``gloss`` is the strength of its highlight, ``glow`` the share of light of its own."""

    color: Rgb
    second: Rgb = (0.0, 0.0, 0.0)
    pattern: str = "plain"
    scale: float = 1.0
    gloss: float = 0.0
    glow: float = 0.0


@lru_cache(maxsize=4)
def noise_field(kind: str) -> Array:
    """Tiling noise [256, 256] with a power-law spectrum, mean 0, deviation 1, clipped at 2.5: the same in every run."""
    rng = np.random.default_rng(20240)
    frequency = np.fft.fftfreq(NOISE_SIZE)
    radius = np.hypot(frequency[:, None], frequency[None, :])
    radius[0, 0] = np.inf
    spectrum = np.fft.fft2(rng.standard_normal((NOISE_SIZE, NOISE_SIZE))) * radius ** -_ROUGHNESS[kind]
    field = np.real(np.fft.ifft2(spectrum))
    return f32(np.clip(field / field.std(), -2.5, 2.5))


def noise(x: NDArray[Any], y: NDArray[Any], kind: str = "cloud") -> Array:
    """The noise at (x, y), which has period 1, between its texels linearly."""
    field = noise_field(kind).ravel()
    x, y = x * np.float32(NOISE_SIZE), y * np.float32(NOISE_SIZE)
    x0, y0 = np.floor(x), np.floor(y)
    fx, fy = x - x0, y - y0
    i, j = x0.astype(np.int32) & (NOISE_SIZE - 1), (y0.astype(np.int32) & (NOISE_SIZE - 1)) * NOISE_SIZE
    i1, j1 = (i + 1) & (NOISE_SIZE - 1), (j + NOISE_SIZE) & (NOISE_SIZE * NOISE_SIZE - 1)
    upper = field[j + i] * (1 - fx) + field[j + i1] * fx
    lower = field[j1 + i] * (1 - fx) + field[j1 + i1] * fx
    return f32(upper * (1 - fy) + lower * fy)


def column(color: Rgb) -> Array:
    """A colour as [3, 1]."""
    return np.array(color, np.float32)[:, None]


def pick(rng: np.random.Generator, options: tuple[Rgb, ...], jitter: float = 0.05) -> Rgb:
    """One of the colours, changed a little."""
    color = np.array(options[int(rng.integers(len(options)))]) + rng.uniform(-jitter, jitter, 3)
    r, g, b = np.clip(color, 0.02, 0.98)
    return float(r), float(g), float(b)


def cell_hash(i: NDArray[Any], j: NDArray[Any]) -> Array:
    """A number in 0..1 for every cell (i, j) of a grid, the same wherever it is asked."""
    a = (i.astype(np.int64) * 374761393 + j.astype(np.int64) * 668265263) & 0xFFFFFFFF
    a = ((a ^ (a >> 13)) * 1274126177) & 0xFFFFFFFF
    return f32(((a ^ (a >> 16)) & 0xFFFF) / np.float32(65536))


def smooth_step(low: float, high: float, x: Array) -> Array:
    """0 below ``low``, 1 above ``high``, a cubic between."""
    t = np.clip((x - np.float32(low)) / np.float32(high - low), 0, 1)
    return f32(t * t * (3 - 2 * t))


def _as_share(condition: NDArray[np.bool_]) -> Array:
    return condition.astype(np.float32)


def _band(x: Array, share: float) -> Array:
    """1 where the fraction of ``x`` lies below ``share``."""
    return _as_share(x - np.floor(x) < share)


def _face(q: Array, p: Array, scale: Array) -> Array:
    """Eyes, brows, a shade of nose and a mouth on the -z side of a head."""
    x, y = np.abs(p[0]), p[1]
    eyes = _as_share(((x - 0.36) / 0.17) ** 2 + ((y - 0.10) / 0.09) ** 2 < 1)
    brows = 0.6 * _as_share((np.abs(x - 0.36) < 0.22) & (np.abs(y - 0.29) < 0.045))
    mouth = 0.55 * _as_share((x < 0.30) & (np.abs(y + 0.48 - 0.25 * x * x) < 0.055))
    nose = 0.22 * _as_share((x < 0.14) & (np.abs(y + 0.18) < 0.07))
    return np.where(p[2] < -0.25, np.maximum(np.maximum(eyes, brows), np.maximum(mouth, nose)), 0).astype(np.float32)


def _windows(q: Array, p: Array, scale: Array) -> Array:
    """Panes in a regular grid over upright faces."""
    along = np.where(np.abs(p[2]) > 0.999, q[0], q[2]) / scale
    up = q[1] / scale
    upright = np.abs(p[1]) < 0.999
    return f32(_band(along + np.float32(0.25), 0.55) * _band(up * np.float32(0.8), 0.6) * upright)


def _logo(q: Array, p: Array, scale: Array) -> Array:
    """A disc on the chest, ``scale`` metres above the shape's origin."""
    return _as_share((q[0] ** 2 + (q[1] - scale) ** 2 < 0.075**2) & (q[2] < 0))


def _screen(q: Array, p: Array, scale: Array) -> Array:
    """A landscape on a screen or in a picture frame: two tones with a wavy horizon, and a sun."""
    hills = np.float32(0.25) * noise(p[0] * np.float32(0.07) + scale, scale)
    sun = _as_share((p[0] - 0.4) ** 2 + (p[1] - 0.45) ** 2 < 0.05)
    return np.maximum(smooth_step(0.0, 0.1, hills - p[1]), sun)


PATTERNS: dict[str, Pattern] = {
    "plain": lambda q, p, s: np.zeros_like(s),
    "stripes": lambda q, p, s: _band(q[1] / s, 0.5),
    "pinstripes": lambda q, p, s: _band(q[0] / s, 0.5),
    "plaid": lambda q, p, s: np.float32(0.5) * (_band(q[1] / s, 0.5) + _band(q[0] / s, 0.5)),
    "dots": lambda q, p, s: _as_share(
        (q[0] / s - np.floor(q[0] / s) - 0.5) ** 2 + (q[1] / s - np.floor(q[1] / s) - 0.5) ** 2 < 0.07
    ),
    "above": lambda q, p, s: _as_share(q[1] > s),
    "patches": lambda q, p, s: smooth_step(0.1, 0.3, noise(q[0] * s + q[1] * s, q[2] * s + np.float32(0.3))),
    "fabric": lambda q, p, s: np.float32(0.5) + np.float32(0.2) * noise(q[0] * s, (q[1] + q[2]) * s, "grain"),
    "fur": lambda q, p, s: np.float32(0.5) + np.float32(0.25) * noise(q[0] * s + q[2] * s, q[1] * s * 3, "grain"),
    "leaves": lambda q, p, s: smooth_step(-0.8, 1.2, noise(q[0] * s + q[2] * s, q[1] * s, "grain")),
    "wood": lambda q, p, s: np.float32(0.5) + np.float32(0.25) * noise(q[0] * s, (q[1] + q[2]) * s * 8, "cloud"),
    "marble": lambda q, p, s: smooth_step(-1.5, 1.5, noise(q[0] * s + q[1] * s, q[2] * s + q[1] * s)),
    "books": lambda q, p, s: cell_hash(np.floor((q[0] + np.float32(9.0)) / s), np.floor(q[1] * 4 + np.float32(64.0))),
    "windows": _windows,
    "logo": _logo,
    "face": _face,
    "screen": _screen,
}


def blend(first: Array, second: Array, share: Array) -> Array:
    """Two colours [3, n] mixed by the second's ``share`` [n]."""
    return f32(first + (second - first) * share)
