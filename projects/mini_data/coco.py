"""Mini COCO: handwritten digits on photographs, with their masks."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from . import REVISION, SPLITS, UserError, numbered
from .pictures import background, free_place, in_patch, look_up, write_picture
from .sources import PHOTOS, deal, load_photo, package_file

COCO_WIDTH = 160
COCO_HEIGHTS = (128, 160)
# Height of a digit in pixels, and in a crowd.
DIGIT_SIZES = (18, 64)
CROWD_SIZES = (9, 13)
# Where a digit begins, as a share of full ink.
INK = 0.4
# Least distance of a digit's colour from what it covers, in units of RGB.
CONTRAST = 0.45
# Of a digit, this share and so many pixels must be seen.
LEAST_SEEN = (0.3, 12)
# One picture in so many, beginning with the second and the third.
COCO_EMPTY_EVERY = 20
COCO_CROWD_EVERY = 10
COCO_LICENSES = [
    dict(
        id=1,
        name='Public domain or CC0',
        url='https://creativecommons.org/publicdomain/zero/1.0/',
    ),
    dict(
        id=2,
        name='Attribution License',
        url='https://creativecommons.org/licenses/by/2.0/',
    ),
]


class Digits(NamedTuple):
    """Handwritten digits of one split.

    ``ink`` is (n, 8, 8) float32 in [0, 1], ``labels`` (n,) int from 0 to 9,
    ``ids`` the index of each in scikit-learn's file.
    """

    ink: np.ndarray
    labels: np.ndarray
    ids: np.ndarray


def digit_table() -> tuple[np.ndarray, np.ndarray]:
    """Read all digits: ink, (1797, 8, 8) float32 in [0, 1], and labels."""
    file = package_file('sklearn', 'datasets/data/digits.csv.gz')
    table = np.loadtxt(file, np.float32, delimiter=',')
    if table.shape != (1797, 65):
        raise UserError(
            f'{file}: shape {table.shape}, (1797, 65) was expected'
        )
    return table[:, :-1].reshape(-1, 8, 8) / 16, table[:, -1].astype(int)


def load_digits(split: str, seed: int) -> Digits:
    """Read the handwritten digits that the seed deals to a split."""
    ink, labels = digit_table()
    shuffled = np.random.default_rng([seed, 0]).permutation(len(ink))
    ids = deal(shuffled, split)
    return Digits(ink[ids], labels[ids], ids)


@dataclass
class Layer:
    """A digit of a picture, before others cover it.

    ``ink`` and ``alpha`` are (H, W) float32 in [0, 1]: pressure of the pen,
    and the share of a pixel that the digit covers.
    """

    digit: int  # index in scikit-learn's file
    label: int
    ink: np.ndarray
    alpha: np.ndarray
    crowd: bool = False

    @property
    def opaque(self) -> np.ndarray:
        """Pixels of which the digit covers half or more, (H, W) bool."""
        return self.alpha >= 0.5

    @property
    def area(self) -> int:
        """Number of these pixels."""
        return int(self.opaque.sum())


def digit_layer(rng, digits, k, centre, size, shape, **kwargs) -> Layer:
    """Draw digit ``k`` of a split on an empty canvas of a shape (H, W)."""
    height, width = shape
    dx = np.arange(width, dtype=np.float32)[None] + (0.5 - centre[0])
    dy = np.arange(height, dtype=np.float32)[:, None] + (0.5 - centre[1])
    u, v = in_patch(dx, dy, size, rng.normal(0, 0.12))
    ink = look_up(digits.ink[k], u, v, cv2.BORDER_CONSTANT)
    # Ink rises by about 1 within a pixel of the digit: the edge is one pixel
    # of the picture wide.
    slope = size / len(digits.ink[k])
    alpha = np.clip((ink - INK) * slope + 0.5, 0, 1)
    label, digit = int(digits.labels[k]), int(digits.ids[k])
    return Layer(digit, label, np.clip(ink, 0, 1), alpha, **kwargs)


def coco_layers(rng, digits, shape, with_crowd) -> list:
    """Digits of a picture from bottom to top, hidden ones included."""
    layers = []
    if with_crowd:
        layers += crowd_layers(rng, digits, shape)
    for _ in range(rng.integers(3, 8)):
        size = math.exp(rng.uniform(*np.log(DIGIT_SIZES)))
        crowded = rng.random() < 0.4
        centre = free_place(rng, layers, *shape, size, crowded)
        k = int(rng.integers(len(digits.ids)))
        if centre is not None:
            layers.append(digit_layer(rng, digits, k, centre, size, shape))
    return layers


def crowd_layers(rng, digits, shape) -> list:
    """A heap of small digits of one kind."""
    height, width = shape
    kind = np.nonzero(digits.labels == rng.integers(10))[0]
    middle = rng.uniform(0.25, 0.75, 2) * (width, height)
    layers = []
    count = min(rng.integers(12, 25), len(kind))
    for k in rng.choice(kind, count, replace=False):
        centre = middle + rng.normal(0, (11, 8))
        size = rng.uniform(*CROWD_SIZES)
        layers.append(
            digit_layer(rng, digits, k, centre, size, shape, crowd=True)
        )
    return layers


def seen_layers(layers) -> list:
    """Pairs of a layer and its pixels (H, W) bool that none above covers.

    A layer of which too little is seen is left out, and covers nothing.
    """
    share, least = LEAST_SEEN
    pairs, covered = [], False
    for layer in reversed(layers):
        seen = layer.opaque & ~np.asarray(covered)
        if seen.sum() >= max(share * layer.area, least):
            pairs.append((layer, seen))
            covered = covered | layer.opaque
    return pairs[::-1]


def draw_layer(rng, canvas, layer) -> None:
    """Blend a digit into a canvas (H, W, 3), in a colour that stands out."""
    around = canvas[layer.opaque].mean(0)
    colour = around
    while np.linalg.norm(colour - around) < CONTRAST:
        colour = rng.uniform(0, 1, 3)
    pixels = (0.75 + 0.25 * layer.ink[..., None]) * colour
    canvas += layer.alpha[..., None] * (pixels - canvas)


def coco_scene(rng, photo, digits, with_digits, with_crowd):
    """Compose one picture.

    Returns:
        tuple: (H, W, 3) uint8 BGR and what :func:`seen_layers` gives for it.
    """
    shape = int(rng.integers(COCO_HEIGHTS[0], COCO_HEIGHTS[1] + 1)), COCO_WIDTH
    canvas = background(rng, photo, *shape)
    pairs = []
    if with_digits:
        pairs = seen_layers(coco_layers(rng, digits, shape, with_crowd))
    for layer, _ in pairs:
        draw_layer(rng, canvas, layer)
    canvas += rng.normal(0, rng.uniform(0.004, 0.012), canvas.shape)
    return np.round(np.clip(canvas, 0, 1) * 255).astype(np.uint8), pairs


def coco_annotations(pairs) -> list:
    """Annotations of a picture, still without ids.

    ``digits`` is not COCO's: the indices in scikit-learn's file.
    """
    groups = {}
    for i, (layer, seen) in enumerate(pairs):
        groups.setdefault('crowd' if layer.crowd else i, []).append(
            (layer, seen)
        )
    return [
        coco_annotation(
            np.logical_or.reduce([seen for _, seen in group]),
            category_id=1 + group[0][0].label,
            iscrowd=int(group[0][0].crowd),
            digits=[layer.digit for layer, _ in group],
        )
        for group in groups.values()
    ]


def coco_annotation(mask, **keys) -> dict:
    """Annotation of a mask (H, W) bool.

    Its run lengths are compressed, since digits have holes, which polygons
    have not; those of a crowd are not, as in the official release.
    """
    from pycocotools import mask as coco_mask

    rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    area, box = int(coco_mask.area(rle)), coco_mask.toBbox(rle).tolist()
    rle['counts'] = rle['counts'].decode()
    if keys['iscrowd']:
        # Column by column, beginning with the run of what is not in it.
        flat = np.concatenate(([False], mask.ravel('F')))
        edges = np.flatnonzero(flat[1:] != flat[:-1])
        runs = np.diff(edges, prepend=0, append=mask.size)
        rle['counts'] = runs.tolist()
    return dict(segmentation=rle, area=area, bbox=box, **keys)


def coco(out: Path, seed: int, sizes: dict) -> None:
    """Write mini COCO.

    ``{split}2017/*.jpg`` and ``annotations/instances_{split}2017.json`` as in
    the official release: ten categories, the digits 0 to 9, with masks of
    what is to be seen of each. A few pictures have no digit, and a few have
    a crowd, a heap of small digits of one kind. ``photo`` of a picture and
    ``digits`` of an annotation say where they come from. Ids start at 1 in
    each split.
    """
    if find_spec('pycocotools') is None:
        raise UserError(
            'pycocotools is not installed, which encodes the masks: pip '
            'install pycocotools'
        )
    categories = [
        dict(supercategory='digit', id=1 + k, name=str(k)) for k in range(10)
    ]
    for number, split in enumerate(SPLITS):
        digits = load_digits(split, seed)
        photos = {name: load_photo(name, split) for name in PHOTOS}
        images, annotations = [], []
        for index in numbered(sizes[split], split):
            # An own generator per picture: more pictures change none.
            rng = np.random.default_rng([seed, 1 + number, index])
            name = list(PHOTOS)[int(rng.integers(len(PHOTOS)))]
            image, pairs = coco_scene(
                rng,
                photos[name],
                digits,
                with_digits=index % COCO_EMPTY_EVERY != 1,
                with_crowd=index % COCO_CROWD_EVERY == 2,
            )
            file = f'{index + 1:012}.jpg'
            write_picture(out / f'{split}2017' / file, image)
            images.append(
                dict(
                    license=1 + (PHOTOS[name].package == 'sklearn'),
                    file_name=file,
                    height=image.shape[0],
                    width=image.shape[1],
                    id=index + 1,
                    photo=name,
                )
            )
            for keys in coco_annotations(pairs):
                keys.update(image_id=index + 1, id=len(annotations) + 1)
                annotations.append(keys)
        content = dict(
            info=dict(
                description='mini COCO: handwritten digits (Alpaydin and '
                'Kaynak, UCI, CC BY 4.0) on photographs',
                version=str(REVISION),
            ),
            licenses=COCO_LICENSES,
            images=images,
            annotations=annotations,
            categories=categories,
        )
        file = out / 'annotations' / f'instances_{split}2017.json'
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content) + '\n')
