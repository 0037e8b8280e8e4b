"""Photographs that installed packages ship, dealt out to train and val."""

from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from . import UserError


class Photo(NamedTuple):
    """A photograph that a package ships, and the part without human faces.

    ``window`` is (top, bottom, left, right) as shares of the sides.
    """

    package: str
    path: str
    window: tuple = (0.0, 1.0, 0.0, 1.0)


PHOTOS = {
    'Astronaut': Photo('skimage', 'data/astronaut.png', (0.42, 1, 0, 1)),
    'Brick': Photo('skimage', 'data/brick.png'),
    'Chelsea': Photo('skimage', 'data/chelsea.png'),
    'China': Photo('sklearn', 'datasets/images/china.jpg'),
    'Coffee': Photo('skimage', 'data/coffee.png'),
    'Flower': Photo('sklearn', 'datasets/images/flower.jpg'),
    'Grass': Photo('skimage', 'data/grass.png'),
    'Gravel': Photo('skimage', 'data/gravel.png'),
    'Motorcycle': Photo('skimage', 'data/motorcycle_left.png'),
    'Rocket': Photo('skimage', 'data/rocket.jpg'),
}
# Share of a photograph's width, from the left, that belongs to train.
TRAIN_SHARE = 0.6


def package_file(package: str, path: str) -> Path:
    """Path of a file that an installed package ships."""
    spec = find_spec(package)
    if spec is None:
        dist = {'skimage': 'scikit-image', 'sklearn': 'scikit-learn'}[package]
        raise UserError(f'{dist} is not installed; its {path} is needed')
    file = Path(spec.origin).parent / path
    if not file.is_file():
        raise UserError(f'{package} does not ship {path}: no file {file}')
    return file


def load_photo(name: str, split: str) -> np.ndarray:
    """Part of a named photograph that belongs to a split."""
    return load_part(PHOTOS[name], split)


def load_part(photo: Photo, split: str) -> np.ndarray:
    """Part of a photograph that belongs to a split, (H, W, 3) uint8 BGR."""
    file = package_file(photo.package, photo.path)
    image = cv2.imdecode(np.fromfile(file, np.uint8), cv2.IMREAD_COLOR)
    if image is None:
        raise UserError(f'{file} is not a readable picture')
    height, width = image.shape[:2]
    top, bottom, left, right = photo.window
    cut = left + TRAIN_SHARE * (right - left)
    left, right = (left, cut) if split == 'train' else (cut, right)
    rows = slice(round(top * height), round(bottom * height))
    return image[rows, round(left * width) : round(right * width)]


def deal(ids: np.ndarray, split: str) -> np.ndarray:
    """The share of shuffled indices that belongs to a split."""
    cut = round(0.75 * len(ids))
    return ids[:cut] if split == 'train' else ids[cut:]
