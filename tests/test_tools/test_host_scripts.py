"""The hosts' own scripts and inferencers, unmodified, on what we train.

The scripts run in this process, as an import of the hosts takes seconds; the
inferencers in a fresh one, in which nothing has named this package yet.
"""

import os
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path
from textwrap import dedent
from types import ModuleType

import cv2
import pytest

torch = pytest.importorskip('torch')
mmdet = pytest.importorskip('mmdet')
mmseg = pytest.importorskip('mmseg')
pytest.importorskip('skimage')

import matplotlib.pyplot as plt  # noqa: E402
from helpers import FORKS  # noqa: E402
from mini_data.build import build  # noqa: E402
from mmengine.registry import DefaultScope  # noqa: E402

from polynl_mm.engine import cli  # noqa: E402

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / 'tools'
CONFIGS = {
    'mmdet': ROOT / 'configs/mini/retinaface_r50-polynl_mini-wider.py',
    'mmseg': ROOT / 'configs/mini/polynl_r18-d4_mini-cityscapes.py',
}
SCRIPTS = {
    host.__name__: Path(host.__file__).parent / '.mim/tools/analysis_tools'
    for host in (mmdet, mmseg)
}
OPTIONS = {
    'mmdet': (
        'train_cfg.max_epochs=2 train_cfg.dynamic_intervals=None '
        'train_cfg.val_interval=2 train_dataloader.batch_size=2'
    ),
    'mmseg': (
        'train_cfg.max_iters=2 train_cfg.val_interval=2 '
        'train_dataloader.batch_size=2 '
        'default_hooks.checkpoint.interval=2'
    ),
}
# One of the name of another would write into the folder of that.
LOGGED = (
    'default_hooks.logger.interval=1 custom_hooks.0.interval=1 '
    'visualizer.name=of_host_scripts'
)
LAST = {'mmdet': 'epoch_2.pth', 'mmseg': 'iter_2.pth'}


@pytest.fixture(scope='module')
def here(tmp_path_factory):
    """A folder with small data sets, in which the tools run."""
    folder = tmp_path_factory.mktemp('scripts')
    sizes = dict(train=4, val=2)
    build('wider_face', folder / 'data/mini_wider', 0, sizes)
    build('cityscapes', folder / 'data/mini_cityscapes', 0, sizes)
    return folder


@pytest.fixture(scope='module')
def call(here):
    """Run a tool of ours, or a script of a host, in this process."""

    def call(tool, *args):
        before = os.getcwd()
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(here)
            patch.setattr(sys, 'argv', [str(tool), *map(str, args)])
            patch.setattr(sys, 'path', sys.path[:])
            patch.setattr(sys, 'excepthook', sys.excepthook)
            # They take it for a style of the plots alone.
            seaborn = ModuleType('seaborn')
            seaborn.set_style = lambda style: None
            patch.setitem(sys.modules, 'seaborn', seaborn)
            # mmseg's matrix has 100 million pixels otherwise.
            patch.setattr(plt, 'subplots', partial(subplots, plt.subplots))
            with DefaultScope.overwrite_default_scope('mmengine'):
                if tool.parent == TOOLS:
                    cli.run(runpy.run_path(str(tool))['main'])
                else:
                    runpy.run_path(str(tool), run_name='__main__')
        plt.close('all')
        assert os.getcwd() == before

    return call


@pytest.fixture(scope='module')
def trained(call, here):
    """Train with our tool, test with it; give the work directory of a host."""
    done = {}

    def trained(host):
        if host in done:
            return done[host]
        options = f'{OPTIONS[host]} {LOGGED}'.split()
        call(
            *(TOOLS / 'train.py', CONFIGS[host], '--work-dir', host),
            *('--cfg-options', *options),
        )
        out = {'mmdet': 'found.pkl', 'mmseg': 'found'}[host]
        call(
            *(TOOLS / 'test.py', CONFIGS[host], f'{host}/{LAST[host]}'),
            *('--out', out, '--work-dir', f'{host}_test'),
        )
        done[host] = here / host
        return done[host]

    return trained


def subplots(inner, **kwargs):
    return inner(**{**kwargs, 'dpi': 20})


def scalars(work_dir):
    (file,) = work_dir.glob('2*/vis_data/scalars.json')
    return file


def pictures(folder):
    return sorted(path.name for path in folder.rglob('*.*g'))


def test_mmdet(trained, call, here, capfd):
    work_dir = trained('mmdet')
    scripts = SCRIPTS['mmdet']
    config = CONFIGS['mmdet']

    call(
        *(scripts / 'browse_dataset.py', config, '--not-show'),
        *('--output-dir', 'browsed'),
    )
    # One of the four pictures has no face.
    assert len(pictures(here / 'browsed')) == 3
    # Landmarks in it: that of a left eye is red.
    drawn = [cv2.imread(str(path)) for path in (here / 'browsed').iterdir()]
    assert any((abs(p - [0, 0, 255.0]).sum(2) < 60).any() for p in drawn)

    call(
        *(scripts / 'analyze_logs.py', 'plot_curve', scalars(work_dir)),
        *('--keys', 'loss', '--out', 'det.png'),
        # The style that the fork's script takes by default is none.
        *(['--style', 'ggplot'] if FORKS else []),
    )
    assert cv2.imread(str(here / 'det.png')) is not None

    capfd.readouterr()
    call(scripts / 'get_flops.py', config, '--num-images', 1)
    assert 'Flops: ' in capfd.readouterr().out
    call(scripts / 'confusion_matrix.py', config, 'found.pkl', 'det_matrix')
    assert pictures(here / 'det_matrix') == ['confusion_matrix.png']


def test_mmseg(trained, call, here):
    """Those that run with any config; of others, see configs/from_pip.md."""
    work_dir = trained('mmseg')
    scripts = SCRIPTS['mmseg']
    config = CONFIGS['mmseg']

    log = scalars(work_dir)
    call(
        *(scripts / 'analyze_logs.py', log, '--out', 'seg.png'),
        *('--keys', 'loss', 'poly_nl/decode_head.poly_nl.alpha'),
    )
    assert cv2.imread(str(here / 'seg.png')) is not None
    call(scripts / 'confusion_matrix.py', config, 'found', 'seg_matrix')
    assert pictures(here / 'seg_matrix') == ['confusion_matrix.png']


def test_inferencers(trained, here):
    """With our configs, and those that our tool saves beside checkpoints."""
    for host in CONFIGS:
        trained(host)
    # mmengine alone finds no mmseg:: base of a fork.
    segmentors = [] if FORKS else [str(CONFIGS['mmseg'])]
    code = f"""
    import sys
    from glob import glob

    from mmdet.apis import DetInferencer
    from mmseg.apis import MMSegInferencer

    assert 'polynl_mm' not in sys.modules
    picture = glob('data/mini_wider/WIDER_val/images/*/*.jpg')[0]
    for config in ({str(CONFIGS['mmdet'])!r}, glob('mmdet/*.py')[0]):
        infer = DetInferencer(config, 'mmdet/{LAST['mmdet']}', 'cpu')
        (found,) = infer(picture, no_save_vis=True)['predictions']
        print(len(found['bboxes']) == len(found['scores']))
    for config in (*{segmentors!r}, glob('mmseg/*.py')[0]):
        infer = MMSegInferencer(config, 'mmseg/{LAST['mmseg']}', device='cpu')
        print(infer(picture)['predictions'].shape)
    """
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', dedent(code)],
        cwd=here,
        env={**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    height, width = cv2.imread(
        str(next((here / 'data/mini_wider/WIDER_val').rglob('*.jpg')))
    ).shape[:2]
    assert [line for line in done.stdout.splitlines() if line[:1] in 'T('] == [
        *['True'] * 2,
        *[f'({height}, {width})'] * (len(segmentors) + 1),
    ]
