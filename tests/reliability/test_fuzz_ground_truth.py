"""A damaged .mat file of the ground truth is refused, or gives numbers.

FUZZ=100000 python -m pytest --basetemp=/dev/shm/fuzz \
    tests/reliability/test_fuzz_ground_truth.py
"""

import shutil

import numpy as np
import pytest
from fuzzing import COUNT, Stumbled, fuzz, mutate
from mini_data.wider_face import Face
from mini_data.wider_face_files import write_wider_mats
from scipy.io import loadmat, savemat

from polynl_mm.faces import files


@pytest.fixture
def truth(tmp_path):
    """A ground truth of three pictures, not compressed."""
    faces = [Face(3, 4, 20, h, *[0] * 6) for h in (50, 25, 11)]
    events = {'0--A': {'x': faces, 'y': []}, '1--B': {'z': faces[:1]}}
    write_wider_mats(tmp_path, events)
    for file in tmp_path.glob('*.mat'):
        content = loadmat(file)
        names = [name for name in content if not name.startswith('__')]
        savemat(file, {name: content[name] for name in names})
    return tmp_path


def read(file, key):
    images, arrays = files._read_cells(str(file), key)
    try:
        # As the evaluation goes on with them.
        for array in arrays:
            array.astype(np.float64).sum()
        assert len(images) == len(arrays)
        assert all(isinstance(image, str) for image in images)
    except Exception as error:
        raise Stumbled(f'{images} taken, but then {error!r}') from error


@pytest.mark.parametrize(
    'name, key', [('face', 'face_bbx_list'), ('hard', 'gt_list')]
)
def test_damaged_ground_truth(truth, name, key, capsys):
    file = truth / f'wider_{name}_val.mat'
    whole = file.read_bytes()

    def production(damaged):
        shutil.copy(damaged, file)
        files.load_wider_face_gt(truth)

    found = fuzz(
        lambda rng: mutate(whole, rng),
        lambda path: read(path, key),
        truth / 'damaged.mat',
        production,
    )
    with capsys.disabled():
        print(f' {name}: {dict(found)}', end='')
    assert found['read'] and found['refused']
    assert sum(found.values()) == COUNT


def test_damaged_compressed_ground_truth(truth):
    file = truth / 'wider_face_val.mat'
    content = loadmat(file)
    savemat(
        file,
        {name: content[name] for name in content if name[0] != '_'},
        do_compression=True,
    )
    whole = file.read_bytes()
    found = fuzz(
        lambda rng: mutate(whole, rng),
        lambda path: read(path, 'face_bbx_list'),
        truth / 'damaged.mat',
        lambda damaged: files._load_cells(
            str(damaged), 'face_bbx_list', 2**30
        ),
    )
    assert sum(found.values()) == COUNT
