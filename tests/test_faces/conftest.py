"""Small detectors; ground truth and detections small and real."""

import os
import subprocess
import sys
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.io import savemat

collect_ignore = []
if find_spec('mmdet') is None:
    collect_ignore += ['test_head.py', 'test_voting.py', 'test_visualizer.py']

ROOT = Path(__file__).parents[2]
# What a machine without any of it lacks.
HEAVY = ('torch', 'mmengine', 'mmcv', 'mmdet', 'mmseg')
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


@pytest.fixture
def without_hosts(tmp_path):
    """Give a function that runs code where neither torch nor a host is.

    It takes the code, or the path of a tool and its arguments, runs it in
    ``tmp_path`` and gives what it prints.
    """

    def run(code, *args):
        if isinstance(code, Path):
            code = f"""
import runpy
runpy.run_path({str(code)!r}, run_name='__main__')
"""
        hide = f'import sys\nsys.modules.update(dict.fromkeys({HEAVY}))\n'
        done = subprocess.run(
            [sys.executable, '-c', hide + code, *args],
            cwd=tmp_path,
            env={**os.environ, 'PYTHONPATH': str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.fixture(scope='session')
def write():
    return SimpleNamespace(gt=write_gt, rows=write_rows)


@pytest.fixture
def three(tmp_path, write):
    """Vector 1: a find, a dropped one, doubles, a picture without kept."""
    pictures = {
        'a--A/A': (
            [(10, 10, 20, 20), (50, 10, 8, 8), (100, 100, 30, 40)],
            {'hard': [1, 3], 'medium': [1, 2, 3], 'easy': [2]},
            [
                (12, 10, 20, 20, 0.7),
                (10, 10, 20, 20, 0.9),
                (100, 104, 30, 40, 0.5),
                (50, 10, 8, 8, 0.8),
                (200, 200, 30, 30, 0.6),
            ],
        ),
        'b--B/B': ([(5, 5, 10, 10)], {s: [1] for s in SETTINGS}, []),
        'b--B/C': (
            [(5, 5, 9, 9)],
            {},
            [(5, 5, 9, 9, 0.4), (40, 40, 9, 9, 0.3)],
        ),
    }
    from polynl_mm.faces.files import load_wider_face_gt

    gt = load_wider_face_gt(write.gt(tmp_path / 'gt', pictures))
    return gt, {image: p[2] for image, p in pictures.items()}


@pytest.fixture(scope='session')
def real_gt():
    """The official ground truth of val; the test is skipped without it."""
    from polynl_mm.faces.files import load_wider_face_gt

    folder = os.environ.get('POLYNL_WIDER_GT')
    if not folder:
        pytest.skip('POLYNL_WIDER_GT does not say where the files are')
    return load_wider_face_gt(folder)


@pytest.fixture
def config():
    """Give a copy of a model's config by name, with changes to its head."""
    from detectors import DETECTORS
    from mmengine.config import ConfigDict

    def get(name, train_cfg=None, test_cfg=None, **head):
        cfg = ConfigDict(deepcopy(DETECTORS[name]))
        cfg.bbox_head.update(head)
        cfg.train_cfg.update(train_cfg or {})
        cfg.test_cfg.update(test_cfg or {})
        return cfg

    return get


@pytest.fixture
def build(config):
    """Build a model by name, with changes to its head; start from one seed."""
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules

    def get(name, **changes):
        register_all_modules()
        torch.manual_seed(0)
        model = MODELS.build(config(name, **changes))
        model.init_weights()
        return model

    return get
