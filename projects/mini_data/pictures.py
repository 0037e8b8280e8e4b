"""What pictures are composed of, and how they are written."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from . import UserError

# Half axes of the oval that is cut out of a patch, as shares of its side,
# and the share of the oval where the blend is still mostly the patch: the
# box is drawn around that.
OVAL = (0.42, 0.5)
OVAL_BOXED = 0.95


@dataclass
class Stamp:
    """What was blended into a canvas: box as floats, opaque pixels."""

    box: tuple
    opaque: np.ndarray  # (H, W) bool
    area: int  # opaque pixels, those outside the canvas included
    centre: tuple  # x, y
    size: float
    roll: float

    def to_canvas(self, points: np.ndarray) -> np.ndarray:
        """Take (n, 2) points from shares of the patch's side to the canvas.

        The inverse of what :func:`stamp` does to pixels: both count from the
        upper left corner of a pixel, not from its centre.
        """
        cos, sin = math.cos(self.roll), math.sin(self.roll)
        turn = np.array(((cos, -sin), (sin, cos)))
        return (points - 0.5) @ turn.T * self.size + self.centre


def stamp(canvas, patch, centre, size, roll) -> Stamp:
    """Blend a patch into a canvas as an oval with a soft edge.

    Args:
        canvas (ndarray): (H, W, 3) float32 in [0, 1], changed in place.
        patch (ndarray): (n, n, 3) float32 in [0, 1].
        centre (tuple[float, float]): x and y on the canvas, in pixels.
        size (float): Side of the patch on the canvas, in pixels.
        roll (float): Turn in radians.

    Returns:
        Stamp: Where it went.
    """
    n = len(patch)
    if size < n:
        # Drawing it smaller without this would alias.
        patch = cv2.GaussianBlur(patch, (0, 0), 0.45 * n / size)
    height, width = canvas.shape[:2]
    reach = math.ceil(size)
    x0, y0 = math.floor(centre[0]) - reach, math.floor(centre[1]) - reach
    side = np.arange(2 * reach + 1, dtype=np.float32)
    dx = side[None] + (x0 + 0.5 - centre[0])
    dy = side[:, None] + (y0 + 0.5 - centre[1])
    u, v = in_patch(dx, dy, size, roll)
    pixels = look_up(patch, u, v, cv2.BORDER_REFLECT)
    radius = np.hypot(u / OVAL[0], v / OVAL[1])
    ramp = np.clip((1.02 - radius) / 0.17, 0, 1)
    alpha = ramp * ramp * (3 - 2 * ramp)

    rows = slice(max(y0, 0), min(y0 + len(side), height))
    cols = slice(max(x0, 0), min(x0 + len(side), width))
    inside = (
        slice(rows.start - y0, max(rows.stop - y0, 0)),
        slice(cols.start - x0, max(cols.stop - x0, 0)),
    )
    part = alpha[inside][..., None]
    canvas[rows, cols] += part * (pixels[inside] - canvas[rows, cols])
    opaque = np.zeros((height, width), bool)
    opaque[rows, cols] = alpha[inside] > 0.5

    cos, sin = math.cos(roll), math.sin(roll)
    half_w = size * OVAL_BOXED * math.hypot(OVAL[0] * cos, OVAL[1] * sin)
    half_h = size * OVAL_BOXED * math.hypot(OVAL[0] * sin, OVAL[1] * cos)
    x, y = centre
    box = (x - half_w, y - half_h, x + half_w, y + half_h)
    area = int((alpha > 0.5).sum())
    return Stamp(box, opaque, area, centre, size, roll)


def in_patch(dx, dy, size, roll) -> tuple:
    """Take offsets from a patch's centre to u and v, shares of its side."""
    cos, sin = math.cos(roll), math.sin(roll)
    return (dx * cos + dy * sin) / size, (dy * cos - dx * sin) / size


def look_up(patch, u, v, border) -> np.ndarray:
    """Pixels of a patch (n, n[, 3]) at u and v from its centre."""
    n = len(patch)
    return cv2.remap(
        patch,
        ((u + 0.5) * n - 0.5).astype(np.float32),
        ((v + 0.5) * n - 0.5).astype(np.float32),
        cv2.INTER_CUBIC,
        borderMode=border,
    )


def background(rng, photo, height, width) -> np.ndarray:
    """A random crop of a photograph, (height, width, 3) float32 in [0, 1]."""
    rows, cols = photo.shape[:2]
    crop_w = min(cols, rows * width / height) * rng.uniform(0.6, 1)
    crop_h = crop_w * height / width
    x = rng.uniform(0, cols - crop_w)
    y = rng.uniform(0, rows - crop_h)
    crop = photo[
        round(y) : max(round(y + crop_h), round(y) + 1),
        round(x) : max(round(x + crop_w), round(x) + 1),
    ]
    shrink = crop.shape[1] > width
    crop = cv2.resize(
        crop,
        (width, height),
        interpolation=cv2.INTER_AREA if shrink else cv2.INTER_CUBIC,
    )
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    light = rng.uniform(0.8, 1.15)
    return np.clip(crop.astype(np.float32) / 255 * light, 0, 1)


def free_place(rng, stamps, height, width, size, crowded):
    """A centre for a stamp that covers little of the others, or None.

    Stamps have ``opaque`` and ``area``; ``crowded`` lets it cover more of
    them.
    """
    limit = 0.75 if crowded else 0.08
    margin = (0.25 if crowded else 0.4) * size
    for _ in range(30):
        x = rng.uniform(margin, width - margin)
        y = rng.uniform(margin, height - margin)
        half = 0.5 * size
        rows = slice(max(int(y - half), 0), int(y + half) + 1)
        cols = slice(max(int(x - half), 0), int(x + half) + 1)
        if all(
            s.opaque[rows, cols].sum() <= limit * max(s.area, 1)
            for s in stamps
        ):
            return x, y
    return None


def write_picture(file: Path, image: np.ndarray) -> None:
    """Write a (H, W, 3) uint8 BGR picture, making its folder.

    What the name ends in says how: ``.jpg``, or ``.png`` without loss.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    options = [cv2.IMWRITE_JPEG_QUALITY, 92] if file.suffix == '.jpg' else []
    done, data = cv2.imencode(file.suffix, image, options)
    if not done:
        raise UserError(f'OpenCV cannot encode {file.name}')
    file.write_bytes(data.tobytes())
