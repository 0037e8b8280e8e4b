"""The official scripts and mmseg's metric agree on saved predictions."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip('mmseg')
pytest.importorskip('cityscapesscripts')

from mmseg.datasets import CityscapesDataset
from mmseg.evaluation import CityscapesMetric, IoUMetric

ROOT = Path(__file__).parents[2]
TOOL = ROOT / 'tools' / 'eval_cityscapes.py'
CLASSES = CityscapesDataset.METAINFO['classes']
# By train id.
LABEL_IDS = [7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33]


@pytest.fixture(scope='module')
def city(tmp_path_factory):
    out = tmp_path_factory.mktemp('made') / 'city'
    subprocess.run(
        [sys.executable, str(ROOT / 'tools/make_mini_data.py'), 'cityscapes']
        + ['--out', str(out), '--seed', '5', '--train', '2', '--val', '6'],
        check=True,
    )
    return out


def predictions(city):
    """Truth, moved and with random classes here and there, as mmseg has it.

    All 19 classes are predicted, so some that do not occur, and void is
    predicted as something everywhere.
    """
    rng = np.random.default_rng(0)
    files = sorted(city.glob('gtFine/val/*/*_labelTrainIds.png'))
    assert len(files) == 6
    for file in files:
        truth = np.array(Image.open(file))
        guess = np.roll(truth, (2, 5), (0, 1))
        noise = rng.integers(0, 19, guess.shape)
        replace = (guess == 255) | (rng.random(guess.shape) < 0.1)
        guess = np.where(replace, noise, guess)
        image = str(file).replace('gtFine', 'leftImg8bit', 1)
        yield dict(
            img_path=image.replace('gtFine_labelTrainIds', 'leftImg8bit'),
            seg_map_path=str(file),
            pred_sem_seg=dict(data=torch.from_numpy(guess)[None]),
            gt_sem_seg=dict(data=torch.from_numpy(truth)[None].long()),
        )


@pytest.fixture(scope='module')
def saved(city, tmp_path_factory):
    """Predictions as mmseg saves them for the test server, and its metric."""
    out = tmp_path_factory.mktemp('pred')
    official = CityscapesMetric(
        output_dir=str(out), format_only=True, keep_results=True
    )
    metric = IoUMetric()
    for each in (official, metric):
        each.dataset_meta = CityscapesDataset.METAINFO
        each.process({}, list(predictions(city)))
    return out, metric


def run(*args):
    return subprocess.run(
        [sys.executable, str(TOOL), *map(str, args)],
        capture_output=True,
        text=True,
    )


def test_official_figures_are_those_of_mmseg(city, saved, tmp_path):
    folder, metric = saved
    done = run(folder, city / 'gtFine/val', '--json', tmp_path / 'a/iou.json')
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert json.loads((tmp_path / 'a/iou.json').read_text()) == result
    assert tuple(result) == ('mIoU', *CLASSES)

    areas = [sum(each) for each in zip(*metric.results)]
    iou = IoUMetric.total_area_to_metrics(*areas, ['mIoU'])['IoU']
    for name, value in zip(CLASSES, iou):
        assert result[name] == pytest.approx(value, abs=1e-6)
    # As printed, too.
    printed = metric.compute_metrics(metric.results)['mIoU']
    assert round(100 * result['mIoU'], 2) == pytest.approx(printed, abs=1e-9)
    assert 30 < printed < 60
    assert f'Score Average : {result["mIoU"]:.3f}' in done.stdout


def test_a_class_that_is_nowhere_is_null(city, saved, tmp_path):
    for truth in city.glob('gtFine/val/*/*_labelIds.png'):
        name = truth.name.replace('_gtFine_labelIds', '_leftImg8bit')
        Image.open(truth).save(tmp_path / name)
    done = run(tmp_path, city / 'gtFine/val')
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result['mIoU'] == result['road'] == 1 and result['bus'] is None


def test_train_ids_are_given_away_by_what_is_never_evaluated(
    city, saved, tmp_path
):
    for file in saved[0].iterdir():
        ids = np.asarray(Image.open(file))
        train = np.searchsorted(LABEL_IDS, ids).astype(np.uint8)
        Image.fromarray(train).save(tmp_path / file.name)
    done = run(tmp_path, city / 'gtFine/val')
    assert (done.returncode, done.stdout) == (2, '')
    assert done.stderr == (
        f'eval_cityscapes.py: error: {tmp_path}: the ids are 0 to 18, and of '
        'them [0, 1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 16, 18] are never '
        'evaluated: train ids, expected label ids (road is 7, not 0)\n'
    )
    # Some void among others may be meant.
    ids = np.array(Image.open(file))
    ids[:2] = 4
    for other in saved[0].iterdir():
        (tmp_path / other.name).write_bytes(other.read_bytes())
    Image.fromarray(ids).save(tmp_path / file.name)
    done = run(tmp_path, city / 'gtFine/val')
    assert done.returncode == 0 and json.loads(done.stdout.splitlines()[-1])
    assert done.stderr == (
        f'eval_cityscapes.py: warning: {tmp_path} has pixels of the ids [4], '
        'which are never evaluated: each counts as wrong\n'
    )


@pytest.mark.parametrize(
    'spoil, message',
    (
        (lambda f: f.unlink(), 'has 0 predictions lindau_000000_000000*.png'),
        (
            lambda f: f.with_name(f'{f.stem}_2.png').write_bytes(
                f.read_bytes()
            ),
            'has 2 predictions lindau_000000_000000*.png',
        ),
        (
            lambda f: Image.new('L', (256, 127), 7).save(f),
            'width and height (256, 127)',
        ),
        (lambda f: Image.new('RGB', (256, 128)).save(f), 'mode RGB'),
        (
            lambda f: Image.new('L', (256, 128), 255).save(f),
            'values [255] are no label ids',
        ),
    ),
)
def test_bad_predictions(city, saved, tmp_path, spoil, message):
    for file in saved[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    spoil(tmp_path / 'lindau_000000_000000_leftImg8bit.png')
    done = run(tmp_path, city / 'gtFine/val')
    assert done.returncode == 2
    assert message in done.stderr and done.stderr.count('\n') == 1


def test_folders_that_are_none(city, saved, tmp_path):
    done = run(saved[0], city)
    assert done.returncode == 2
    assert 'has no <city>/*_gtFine_labelIds.png' in done.stderr
    done = run(tmp_path / 'no', city / 'gtFine/val')
    assert done.returncode == 2 and 'is not a folder' in done.stderr
