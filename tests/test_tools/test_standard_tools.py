"""The hosts' own train.py and test.py, unmodified, with our configs.

Each in fresh processes; COCO and Cityscapes as a rival runs, without a Poly-NL
layer: nothing but what every config of ours takes from
``configs/_base_/polynl.py`` then names this package.
"""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Data set, host, config, options that take the layer out, and those for a
# first round of training, a second, and the name of a round's checkpoint.
EPOCHS = ('train_cfg.max_epochs=1', 'train_cfg.max_epochs=2', 'epoch_{}.pth')
ITERATIONS = (
    'train_cfg.max_iters=1 train_cfg.val_interval=1',
    'train_cfg.max_iters=2 train_cfg.val_interval=2',
    'iter_{}.pth',
)
CASES = {
    'wider_face': (
        'mmdet',
        'retinaface_r50-polynl_mini-wider.py',
        '',
        ('train_cfg.dynamic_intervals=None', *EPOCHS),
    ),
    'coco': (
        'mmdet',
        'mask-rcnn_r50-polynl_mini-coco.py',
        'model.backbone.plugins=None',
        ('train_cfg.val_interval=1', *EPOCHS),
    ),
    'cityscapes': (
        'mmseg',
        'polynl_r18-d4_mini-cityscapes.py',
        'model.decode_head.type=FCNHead',
        ('default_hooks.checkpoint.interval=1', *ITERATIONS),
    ),
}
FOLDERS = dict(
    wider_face='mini_wider', coco='mini_coco', cityscapes='mini_cityscapes'
)


def logged(work_dir):
    """Log of the latest run in a work directory, and its last metrics."""
    latest = max(work_dir.glob('2*'))
    (log,) = latest.glob('2*.log')
    (file,) = [*latest.glob('2*.json')] or [*latest.glob('*/scalars.json')]
    lines = map(json.loads, file.read_text().splitlines())
    (*_, metrics) = [line for line in lines if 'loss' not in line]
    timeless = {
        key: value
        for key, value in metrics.items()
        if 'time' not in key and key != 'step'
    }
    return log.read_text(), timeless


@pytest.mark.parametrize(
    'data',
    [
        # The tools are those of mmdet and mmseg, and one of each host is
        # looked at in test_registry, too.
        pytest.param(
            name, marks=[] if name == 'wider_face' else [pytest.mark.long]
        )
        for name in CASES
    ],
)
def test_train_resume_and_test(place, start, finish, data):
    host, name, without, (always, first, second, checkpoint) = CASES[data]
    module = pytest.importorskip(host)
    tools = Path(module.__file__).parent / '.mim/tools'
    config = ROOT / 'configs/mini' / name

    def run(*command, **env):
        done = finish(start(*command, **env))
        assert done.code == 0, done.err

    def tool(name, *args, options=()):
        options = (without, always, *options)
        options = [each for option in options for each in option.split()]
        run(
            *(tools / name, config, *args, '--work-dir', data),
            *('--cfg-options', *options),
            PYTHONPATH=str(ROOT),
        )
        return logged(place / data)

    run(
        *('make_mini_data.py', data, '--out', f'data/{FOLDERS[data]}'),
        *('--seed', 0, '--train', 8, '--val', 4),
    )
    tool('train.py', options=[first])
    resumed, in_training = tool('train.py', '--resume', options=[second])
    assert (
        f'latest checkpoint {place}/{data}/{checkpoint.format(1)}' in resumed
    )
    assert 'resumed epoch' in resumed
    dumped = (place / data / name).read_text()
    assert 'PolyNLHook' in dumped
    assert ('PolyNL' in dumped.replace('PolyNLHook', '')) == (not without)
    loaded, after = tool('test.py', f'{data}/{checkpoint.format(2)}')
    assert f'Load checkpoint from {data}/{checkpoint.format(2)}' in loaded
    assert 'do not match exactly' not in loaded
    assert after == in_training
