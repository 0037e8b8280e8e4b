"""A small data set in folders."""

import cv2
import numpy as np
import pytest


@pytest.fixture
def folders(tmp_path):
    """train and val with classes a, b, c; val has 2, 3 and 2 pictures."""
    rng = np.random.default_rng(0)
    for split, counts in (('train', (2, 2, 2)), ('val', (2, 3, 2))):
        for name, count in zip('abc', counts):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                picture = rng.integers(0, 255, (20, 24, 3), np.uint8)
                assert cv2.imwrite(str(folder / f'{name}{i}.png'), picture)
    return tmp_path


@pytest.fixture
def flat(folders):
    """The pictures of val in one folder, v0.png to v6.png."""
    paths = sorted((folders / 'val').glob('*/*'))
    for i, path in enumerate(paths):
        path.rename(folders / 'val' / f'v{i}.png')
    for name in 'abc':
        (folders / 'val' / name).rmdir()
    (folders / 'meta').mkdir()
    return folders
