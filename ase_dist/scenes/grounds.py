"""The look of flat ground and walls: floorboards, tiles, brickwork, grass, asphalt, water.

A shade gives colours [3, n] from the two coordinates of a plane in metres and the footprint of a pixel on it; detail
that is finer than the footprint is faded out, so that nothing flickers towards the horizon.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ase_dist.scenes.materials import Array, Rgb, cell_hash, column, f32, noise, smooth_step

Shade = Callable[[Array, Array, Array], Array]


def _fade(footprint: Array, feature: float) -> Array:
    """1 where a pixel is much smaller than ``feature`` metres, 0 where it is as large."""
    return f32(np.clip(np.float32(1.6) - footprint * np.float32(1.6 / feature), 0, 1))


def _line(x: Array, width: float) -> Array:
    """1 within ``width`` of a whole number."""
    return f32(np.abs(x - np.round(x)) < width / 2)


def planks(color: Rgb, width: float) -> Shade:
    """Floor boards."""

    def shade(x: Array, y: Array, footprint: Array) -> Array:
        row = np.floor(x / np.float32(width))
        length = y / np.float32(1.4) + cell_hash(row, row) * 7
        tone = np.float32(0.8) + np.float32(0.34) * cell_hash(row, np.floor(length))
        gap = np.maximum(_line(x / np.float32(width), 0.07), _line(length, 0.008)) * _fade(footprint, width * 0.25)
        grain = np.float32(0.05) * noise(x * 2, y * np.float32(0.14)) * _fade(footprint, 0.03)
        return f32(column(color) * (tone + grain - np.float32(0.45) * gap))

    return shade


def tiles(color: Rgb, other: Rgb, size: float) -> Shade:
    """Square tiles in two colours with joints."""

    def shade(x: Array, y: Array, footprint: Array) -> Array:
        x, y = x / np.float32(size), y / np.float32(size)
        i, j = np.floor(x), np.floor(y)
        contrast = _fade(footprint, size * 0.9)
        odd = (i + j - 2 * np.floor((i + j) / 2)) * contrast + np.float32(0.5) * (1 - contrast)
        joint = np.maximum(_line(x, 0.05), _line(y, 0.05)) * _fade(footprint, size * 0.12)
        tone = np.float32(0.94) + np.float32(0.12) * cell_hash(i, j) * contrast - np.float32(0.3) * joint
        return f32((column(color) + (column(other) - column(color)) * odd) * tone)

    return shade


def carpet(color: Rgb) -> Shade:
    """Speckled wall-to-wall carpet."""

    def shade(x: Array, y: Array, footprint: Array) -> Array:
        speckle = noise(x * np.float32(0.9), y * np.float32(0.9), "grain") * _fade(footprint, 0.03)
        return f32(column(color) * (1 + np.float32(0.09) * speckle + np.float32(0.05) * noise(x / 6, y / 6)))

    return shade


def plain(color: Rgb) -> Shade:
    """Paint with faint unevenness."""

    def shade(x: Array, y: Array, footprint: Array) -> Array:
        return f32(column(color) * (1 + np.float32(0.025) * noise(x / 5, y / 5)))

    return shade


def wallpaper(color: Rgb, other: Rgb, width: float) -> Shade:
    """Upright stripes."""

    def shade(x: Array, y: Array, footprint: Array) -> Array:
        x = x / np.float32(width)
        contrast = _fade(footprint, width / 2)
        share = (x - np.floor(x) < np.float32(0.4)) * contrast + np.float32(0.4) * (1 - contrast)
        return f32(column(color) + (column(other) - column(color)) * share)

    return shade


def bricks(color: Rgb, joint: Rgb) -> Shade:
    """Brickwork."""

    def shade(x: Array, y: Array, footprint: Array) -> Array:
        y = y / np.float32(0.085)
        row = np.floor(y)
        x = x / np.float32(0.25) + row * np.float32(0.5)
        near = _fade(footprint, 0.05)
        tone = np.float32(0.85) + np.float32(0.3) * cell_hash(np.floor(x), row) * near
        mortar = np.maximum(_line(x, 0.07), _line(y, 0.17)) * near
        return f32(column(color) * tone * (1 - mortar) + column(joint) * mortar)

    return shade


def dado(lower: Shade, upper: Shade, height: float, rail: Rgb) -> Shade:
    """Two kinds of wall, one above the other, with a rail between and a skirting board below."""

    def shade(x: Array, y: Array, footprint: Array) -> Array:
        colors = np.where(y < np.float32(height), lower(x, y, footprint), upper(x, y, footprint))
        edge = (np.abs(y - np.float32(height)) < np.float32(0.03)) | (y < np.float32(0.1))
        return f32(np.where(edge, column(rail), colors))

    return shade


def grass(color: Rgb) -> Shade:
    """Grass with lighter and darker patches."""
    dry = (min(1.0, color[0] * 1.35), color[1] * 1.08, color[2])

    def shade(x: Array, y: Array, footprint: Array) -> Array:
        share = smooth_step(-1.4, 1.6, noise(x / 22, y / 22))
        blades = noise(x * np.float32(0.8), y * np.float32(0.8), "grain") * _fade(footprint, 0.06)
        clumps = noise(x / 5, y / 5, "grain") * _fade(footprint, 0.3)
        tone = 1 + np.float32(0.12) * blades + np.float32(0.10) * clumps
        return f32((column(color) + (column(dry) - column(color)) * share) * tone)

    return shade


def gravel(color: Rgb, size: float = 1.0) -> Shade:
    """Asphalt, sand or earth: fine speckle and large stains."""

    def shade(x: Array, y: Array, footprint: Array) -> Array:
        speckle = noise(x * np.float32(0.4 / size), y * np.float32(0.4 / size), "grain") * _fade(footprint, 0.03 * size)
        return f32(column(color) * (1 + np.float32(0.10) * speckle + np.float32(0.06) * noise(x / 9, y / 9)))

    return shade


def ripples(color: Rgb) -> Shade:
    """Water with small waves across the view."""

    def shade(x: Array, y: Array, footprint: Array) -> Array:
        wave = noise(x / 14, y / 3, "grain") * _fade(footprint, 0.9) + np.float32(0.6) * noise(x / 60, y / 8)
        return f32(column(color) * (1 + np.float32(0.11) * wave))

    return shade
