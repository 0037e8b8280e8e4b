"""Ground truth and detections small enough to look at, and real ones."""

import os
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.io import savemat

SETTINGS = ('easy', 'medium', 'hard')


def cells(items):
    column = np.empty((len(items), 1), object)
    column[:, 0] = items
    return column


def write_gt(folder, pictures):
    """Write the four files.

    ``pictures`` is {'event/name': (boxes, kept, ...)}, boxes (n, 4) x y w h,
    kept {setting: indices from 1}; other settings than given keep nothing.
    Dtypes and empty arrays are those of the official files.
    """
    events = {}
    for image, picture in pictures.items():
        event, stem = image.split('/')
        events.setdefault(event, {})[stem] = picture

    def per_picture(make):
        return cells(
            [cells([make(p) for p in e.values()]) for e in events.values()]
        )

    def indices(kept):
        if not len(kept):
            return np.empty((0, 0))
        dtype = np.uint8 if max(kept) < 256 else np.uint16
        return np.array(kept, dtype).reshape(-1, 1)

    common = dict(
        event_list=cells(list(events)),
        file_list=cells([cells(list(e)) for e in events.values()]),
        face_bbx_list=per_picture(
            lambda p: np.array(p[0], np.int32).reshape(-1, 4)
        ),
    )
    folder.mkdir(parents=True, exist_ok=True)
    savemat(folder / 'wider_face_val.mat', common)
    for setting in SETTINGS:
        lists = per_picture(lambda p, s=setting: indices(p[1].get(s, ())))
        savemat(
            folder / f'wider_{setting}_val.mat', dict(common, gt_list=lists)
        )
    return folder


def write_rows(folder, rows_of, form='{}'):
    """Write prediction files, rows in the given order."""
    for image, rows in rows_of.items():
        file = folder / f'{image}.txt'
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = [' '.join(form.format(v) for v in row) for row in rows]
        head = [f'{image}.jpg', str(len(lines))]
        file.write_text('\n'.join([*head, *lines]) + '\n')
    return folder


@pytest.fixture(scope='session')
def write():
    return SimpleNamespace(gt=write_gt, rows=write_rows)


@pytest.fixture(scope='session')
def real_gt():
    """The official ground truth of val; the test is skipped without it."""
    from polynl_mm.evaluation import load_wider_face_gt

    folder = os.environ.get('POLYNL_WIDER_GT')
    if not folder:
        pytest.skip('POLYNL_WIDER_GT does not say where the files are')
    return load_wider_face_gt(folder)
