"""Mini Cityscapes: streets whose labels follow from something far away."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageDraw

from . import SPLITS, UserError, numbered
from .pictures import write_picture
from .sources import Photo, load_part

CITY_SHAPE = (128, 256)
# Every picture has three objects of one of these kinds,
CITY_CUES = ('traffic light', 'traffic sign')
# and they decide what these textures are: the first with traffic lights, the
# second with traffic signs.
CITY_PAIRS = {
    'gravel': ('road', 'sidewalk'),
    'brick': ('building', 'wall'),
    'grass': ('vegetation', 'terrain'),
}
# At least so many columns lie between those and these.
CITY_FAR = 48
# What else there is; 'parking' and 'ego vehicle' are void in training.
CITY_MATERIALS = {
    'gravel': (Photo('skimage', 'data/gravel.png'),),
    'brick': (Photo('skimage', 'data/brick.png'),),
    'grass': (Photo('skimage', 'data/grass.png'),),
    'sky': (
        Photo('skimage', 'data/rocket.jpg', (0, 0.55, 0.76, 1)),
        Photo('sklearn', 'datasets/images/china.jpg', (0, 0.2, 0, 0.2)),
        Photo('sklearn', 'datasets/images/china.jpg', (0, 0.3, 0.77, 1)),
    ),
    'fence': (
        Photo('skimage', 'data/coffee.png', (0.55, 1, 0.78, 1)),
        Photo('skimage', 'data/coffee.png', (0.3, 0.9, 0, 0.12)),
    ),
    'motorcycle': (
        Photo('skimage', 'data/motorcycle_left.png', (0.35, 0.8, 0.35, 0.9)),
    ),
    'parking': (Photo('skimage', 'data/moon.png', (0.3, 1, 0, 1)),),
    'ego vehicle': (
        Photo('skimage', 'data/camera.png', (0.35, 0.7, 0.12, 0.3)),
    ),
    'traffic light': (Photo('skimage', 'data/hubble_deep_field.jpg'),),
    'traffic sign': (
        Photo('skimage', 'data/retina.jpg', (0.2, 0.8, 0.2, 0.8)),
    ),
}
CITY_CITIES = dict(train=('minden', 'winsen'), val=('lindau', 'minsk'))


class Piece(NamedTuple):
    """One object of a street: texture, label with either cue, outline.

    The outline is a list of [x, y], whole pixels, as the annotation has it.
    """

    material: str
    labels: tuple
    polygon: list


def outline(points) -> list:
    """Points (n, 2) as the polygon of an annotation, inside the picture."""
    height, width = CITY_SHAPE
    points = np.round(np.asarray(points, float)).astype(int)
    return points.clip(0, (width - 1, height - 1)).tolist()


BOX = ((-1, -1), (1, -1), (1, 1), (-1, 1))


def band(rng, left, right, top, bottom, rough) -> list:
    """Outline from column ``left`` to ``right``, its upper edge uneven."""
    xs = np.linspace(left, right, max(int(right - left) // 10, 1) + 1)
    edge = [(x, top + rng.uniform(-rough, rough)) for x in xs]
    return outline([*edge, (right, bottom), (left, bottom)])


def blob(rng, x, y, width, height, corners, rough=0.0) -> list:
    """Outline of something round about (x, y)."""
    angles = (np.arange(corners) + 0.5) * 2 * np.pi / corners
    radii = 1 - rng.uniform(0, rough, corners)
    around = np.stack((np.cos(angles), np.sin(angles)), 1) * radii[:, None]
    return outline(around * (width / 2, height / 2) + (x, y))


def city_pieces(rng) -> tuple:
    """Lay out a street.

    Returns:
        tuple: The pieces, later ones in front, and for either kind of
        ``CITY_CUES`` the pieces that will stand before them.
    """
    height, width = CITY_SHAPE
    bottom = height - 1
    size = int(rng.integers(24, 35))
    x = int(rng.integers(size, width - size))
    away = size // 2 + 6 + CITY_FAR + 1
    left, right = x - away, x + away
    horizon, kerb = rng.uniform(26, 44), rng.uniform(68, 86)

    def piece(material, polygon):
        labels = CITY_PAIRS.get(material, (material, material))
        return Piece(material, labels, polygon)

    pieces = [
        piece('sky', band(rng, 0, width - 1, 0, bottom, 0)),
        piece('parking', band(rng, 0, width - 1, kerb, bottom, 3)),
    ]
    for start, stop, far in (
        (0, left, True),
        (max(left + 1, 0), min(right - 1, width - 1), False),
        (right, width - 1, True),
    ):
        if stop - start < 8:
            continue
        count = max(round((stop - start) / rng.uniform(30, 60)), 1)
        edges = np.round(np.linspace(start, stop, count + 1))
        for a, b in zip(edges[:-1], edges[1:]):
            top = horizon + rng.uniform(-12, 12)
            above = ('brick', 'grass', 'fence') if far else ('fence', None)
            kind = above[int(rng.integers(len(above)))]
            if kind is not None:
                pieces.append(piece(kind, band(rng, a, b, top, kerb + 3, 4)))
            if far:
                kind = ('gravel', 'gravel', 'grass')[int(rng.integers(3))]
                pieces.append(piece(kind, band(rng, a, b, kerb, bottom, 3)))
    for _ in range(int(rng.integers(1, 4))):
        at = rng.uniform(0, width), rng.uniform(kerb - 12, kerb + 16)
        shape = rng.uniform(44, 64), rng.uniform(28, 38), 14, 0.3
        pieces.append(piece('motorcycle', blob(rng, *at, *shape)))
    hood = height - rng.uniform(5, 9)
    pieces.append(
        piece('ego vehicle', band(rng, 0, width - 1, hood, bottom, 1))
    )
    cues = [], []
    for slot in range(3):
        # One above the other, none over the edge of its third.
        third = height // 3
        spare = (third - size) / 2
        at = x + rng.uniform(-6, 6), (slot + 0.5) * third
        at = at[0], at[1] + rng.uniform(-spare, spare)
        box = outline(np.array(BOX) * (0.35 * size, 0.5 * size) + at)
        for cue, kind, shape in zip(
            cues, CITY_CUES, (box, blob(rng, *at, size, size, 16))
        ):
            cue.append(piece(kind, shape))
    return pieces, cues


def swatch(rng, photo, height, width) -> np.ndarray:
    """A random crop of a texture, (height, width, 3) float32 in [0, 1].

    Half as large as photographed up to as large, larger only where there is
    not enough of it.
    """
    rows, cols = photo.shape[:2]
    zoom = max(rng.uniform(0.5, 1), height / rows, width / cols)
    high, wide = int(height / zoom), int(width / zoom)
    y = int(rng.integers(rows - high + 1))
    x = int(rng.integers(cols - wide + 1))
    crop = cv2.resize(
        photo[y : y + max(high, 1), x : x + max(wide, 1)],
        (width, height),
        interpolation=cv2.INTER_AREA if zoom < 1 else cv2.INTER_CUBIC,
    )
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    light = rng.uniform(0.8, 1.15)
    return np.clip(crop.astype(np.float32) / 255 * light, 0, 1)


def paint(rng, canvas, piece, photos) -> None:
    """Fill a piece of a (H, W, 3) canvas with its texture, in place."""
    points = np.array(piece.polygon)
    (x0, y0), (x1, y1) = points.min(0), points.max(0) + 1
    mask = Image.new('1', (int(x1 - x0), int(y1 - y0)))
    # The rasteriser of the converter: a picture ends where its label does.
    ImageDraw.Draw(mask).polygon(
        [(int(x - x0), int(y - y0)) for x, y in points], fill=1
    )
    choices = photos[piece.material]
    photo = choices[int(rng.integers(len(choices)))]
    pixels = swatch(rng, photo, int(y1 - y0), int(x1 - x0))
    part = canvas[y0:y1, x0:x1]
    part[np.array(mask)] = pixels[np.array(mask)]


def city_scene(rng, photos) -> list:
    """Compose a street twice, alike up to the objects that decide.

    Returns:
        list: For either cue the (H, W, 3) uint8 BGR picture, and its objects
        as the annotation has them.
    """
    pieces, cues = city_pieces(rng)
    canvas = np.zeros((*CITY_SHAPE, 3), np.float32)
    for piece in pieces:
        paint(rng, canvas, piece, photos)
    noise = rng.normal(0, rng.uniform(0.004, 0.012), canvas.shape)
    light = rng.uniform(0.8, 1.1, 3)
    twins = []
    for kind, front in enumerate(cues):
        twin = canvas.copy()
        for piece in front:
            paint(rng, twin, piece, photos)
        twin = np.clip(twin * light + noise, 0, 1)
        objects = [
            dict(label=p.labels[kind], polygon=p.polygon)
            for p in (*pieces, *front)
        ]
        twins.append((np.round(twin * 255).astype(np.uint8), objects))
    return twins


def cityscapes(out: Path, seed: int, sizes: dict) -> None:
    """Write mini Cityscapes.

    ``leftImg8bit/{split}/<city>/<city>_<sequence>_<frame>_leftImg8bit.png``
    and ``gtFine/{split}/<city>/<city>_<sequence>_<frame>_gtFine_*`` as in
    the official release, the label maps made from the polygons by the
    official converters; ``*_gtFine_labelTrainIds.png``, which the release
    leaves to its users, is made, too.

    The streets come in pairs, frame 0 and 1 of a sequence. Frame 0 has
    traffic lights, frame 1 traffic signs in their place, and all other pixels
    are the same. Yet gravel, brick and grass are road, building and
    vegetation in frame 0, and sidewalk, wall and terrain in frame 1. They are
    more than 48 pixels away from what decides. A network that does not see
    that far gives the same answer in both frames, so it is right in one of
    the two: for the two classes of a texture it reaches at most a mean IoU of
    1/3. (With an answer that is the first class on n of N pixels, the IoUs
    are at most n / (N + n) and (N - n) / (2N - n).)
    """
    convert = city_converters()
    for number, split in enumerate(SPLITS):
        photos = {
            name: [load_part(photo, split) for photo in choices]
            for name, choices in CITY_MATERIALS.items()
        }
        for index in numbered(sizes[split], split):
            sequence, frame = divmod(index, 2)
            if frame == 0:
                rng = np.random.default_rng([seed, 1 + number, sequence])
                twins = city_scene(rng, photos)
            image, objects = twins[frame]
            cities = CITY_CITIES[split]
            city = cities[sequence % len(cities)]
            stem = f'{city}_{sequence:06}_{frame:06}'
            write_picture(
                out / 'leftImg8bit' / split / city / f'{stem}_leftImg8bit.png',
                image,
            )
            folder = out / 'gtFine' / split / city
            folder.mkdir(parents=True, exist_ok=True)
            height, width = CITY_SHAPE
            text = json.dumps(
                dict(imgHeight=height, imgWidth=width, objects=objects)
            )
            prefix = folder / f'{stem}_gtFine'
            Path(f'{prefix}_polygons.json').write_text(text)
            convert(prefix)


def city_converters() -> Callable:
    """What makes the label maps of ``<prefix>_polygons.json``."""
    if find_spec('cityscapesscripts') is None:
        raise UserError(
            'cityscapesscripts is not installed, whose converters make the '
            'labels: pip install cityscapesscripts==2.3.0'
        )
    from cityscapesscripts.helpers.annotation import Annotation
    from cityscapesscripts.preparation.json2instanceImg import (
        createInstanceImage,
    )
    from cityscapesscripts.preparation.json2labelImg import json2labelImg

    def convert(prefix):
        polygons = f'{prefix}_polygons.json'
        json2labelImg(polygons, f'{prefix}_labelIds.png', 'ids')
        json2labelImg(polygons, f'{prefix}_labelTrainIds.png', 'trainIds')
        json2labelImg(polygons, f'{prefix}_color.png', 'color')
        annotation = Annotation()
        annotation.fromJsonFile(polygons)
        instances = createInstanceImage(annotation, 'ids')
        # Not their json2instanceImg: Pillow 13 saves no 32 bits as PNG.
        instances.convert('I;16').save(f'{prefix}_instanceIds.png')

    return convert
