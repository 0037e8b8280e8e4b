"""Digits and patches as they are, in one folder for each class."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from . import SPLITS, UserError
from .coco import digit_table
from .lfw import patch_pool
from .pictures import write_picture


def digits(out: Path, seed: int, sizes: dict) -> None:
    """Write the handwritten digits: ``{train,val}/{0 to 9}/<index>.png``.

    8 x 8 pixels, grey; the index is that in scikit-learn's file. Half of
    every class can be in train and the other half in val, and each split has
    as many of every class, up to one.
    """
    ink, labels = digit_table()
    _write(out, seed, sizes, ink, [str(label) for label in labels])


def lfw_patches(out: Path, seed: int, sizes: dict) -> None:
    """Write the patches of LFW: ``{train,val}/{face,other}/<index>.png``.

    25 x 25 pixels, grey; the index is that in scikit-image's file. Half of
    either class can be in train and the other half in val. Noise is added,
    of a standard deviation of 0.3 where white is 1: without it, a few of
    them are enough to tell all the others.
    """
    patches = patch_pool()
    noise = np.random.default_rng([seed, 1]).normal(0, 0.3, patches.shape)
    patches = np.clip(patches + noise, 0, 1)
    _write(out, seed, sizes, patches, ['face'] * 100 + ['other'] * 100)


def _write(
    out: Path, seed: int, sizes: dict, pictures: np.ndarray, names: list
) -> None:
    """Write (n, H, W) pictures in [0, 1] below the names of their classes."""
    rng = np.random.default_rng([seed, 0])
    classes = sorted(set(names))
    shuffled = {
        name: rng.permutation(np.flatnonzero(np.array(names) == name))
        for name in classes
    }
    most = len(classes) * min(len(ids) // 2 for ids in shuffled.values())
    for number, split in enumerate(SPLITS):
        size = sizes[split]
        if not len(classes) <= size <= most:
            raise UserError(
                f'--{split} {size}: expected {len(classes)} to {most}, for '
                f'{len(classes)} classes'
            )
        for k, name in enumerate(classes):
            ids = shuffled[name]
            # From either end: those of one split are never in the other.
            ids = ids if number == 0 else ids[::-1]
            share = size // len(classes) + (k < size % len(classes))
            for i in ids[:share]:
                write_picture(
                    out / split / name / f'{i:04}.png',
                    np.round(pictures[i] * 255).astype(np.uint8),
                )
