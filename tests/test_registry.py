"""What a fresh process finds: the types, and only the imports they need.

Nothing here may run in this process, where the other tests have imported the
package and its hosts already.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from textwrap import dedent
from zipfile import ZipFile

import cv2
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
HOSTS = ('mmdet', 'mmseg')
# A type of ours that needs the host.
OWN = {'mmdet': 'RetinaFaceHead', 'mmseg': 'PolyNLHead'}

# Hides packages from every finder, as if they were not installed.
HIDE = """
import sys


class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {hidden!r}:
            return None
        return self.finder.find_spec(name, path, target)


sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""

# Builds as the hosts' own tools do, and names nothing of this package but
# the type.
BUILD = """
import sys
from mmengine.runner import Runner

assert 'polynl_mm' not in sys.modules
plugin = dict(
    cfg=dict(type='polynl_mm.PolyNL2d', beta_init=0.5),
    stages=(False, False, True, False),
    position='after_conv2',
)
runner = Runner(
    model=dict(type='ResNet', depth=50, base_channels=8, plugins=[plugin]),
    work_dir={work_dir!r},
    default_scope={host!r},
)
backbone = runner.model
assert type(backbone).__module__ == '{host}.models.backbones.resnet'
layers = [block.poly_nl for block in backbone.layer3]
assert len(layers) == 6
for layer in layers:
    assert type(layer).__module__ == 'polynl_mm.layers'
    assert type(layer).__name__ == 'PolyNL2d'
"""


def python(*args, cwd):
    """Run a fresh interpreter that sees this checkout; return its output."""
    path = os.pathsep.join(
        filter(None, (str(ROOT), os.environ.get('PYTHONPATH')))
    )
    # One thread: the models are too small for two.
    env = {**os.environ, 'PYTHONPATH': path, 'OMP_NUM_THREADS': '1'}
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', *map(str, args)],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def run(code, tmp_path, hidden=()):
    """Run code in a fresh interpreter without the packages in ``hidden``."""
    return python(
        '-c', HIDE.format(hidden=set(hidden)) + dedent(code), cwd=tmp_path
    )


def build_code(host, tmp_path):
    pytest.importorskip(host)
    return BUILD.format(host=host, work_dir=str(tmp_path))


@pytest.mark.parametrize('host', HOSTS)
def test_type_resolves_in_the_scope_of_a_host(host, tmp_path):
    run(build_code(host, tmp_path), tmp_path)


@pytest.mark.parametrize('host, other', [HOSTS, HOSTS[::-1]])
def test_one_host_without_the_other(host, other, tmp_path):
    listed = f"""
    assert {other!r} not in sys.modules
    from importlib.util import find_spec
    assert find_spec({other!r}) is None
    from polynl_mm import registry
    bound = set(registry._HOST_OF.items())
    for child in (registry.MODELS, registry.DATASETS, registry.HOOKS):
        for module, needs in bound:
            assert (module in child._locations) == (needs != {other!r}), module
            assert (module in sys.modules) == (needs != {other!r}), module
    assert registry.MODELS.get({OWN[host]!r}) is not None
    assert registry.MODELS.get({OWN[other]!r}) is None
    """
    run(build_code(host, tmp_path) + dedent(listed), tmp_path, hidden=[other])


@pytest.mark.parametrize('hidden', HOSTS)
def test_hidden_is_as_if_not_installed(hidden, tmp_path):
    """The test above is worth what its blocker is."""
    code = f"""
    from importlib.util import find_spec
    print([name for name in {HOSTS} if find_spec(name)])
    try:
        import {hidden}.registry
    except ModuleNotFoundError as error:
        print(error.name)
    """
    installed = [host for host in HOSTS if find_spec(host)]
    others = [host for host in installed if host != hidden]
    printed = run(code, tmp_path, hidden=[hidden]).splitlines()
    assert printed == [str(others), hidden]
    printed = run(code, tmp_path).splitlines()
    assert printed == [str(installed)] + (
        [] if hidden in installed else [hidden]
    )


def test_package_import_is_light(tmp_path):
    code = """
    import polynl_mm
    heavy = {'torch', 'numpy', 'mmengine', 'mmcv', 'mmdet', 'mmseg'}
    assert polynl_mm.__version__
    assert not heavy & set(sys.modules), heavy & set(sys.modules)
    """
    run(code, tmp_path)


def test_ops_and_layers_need_nothing_but_torch(tmp_path):
    code = """
    import torch
    before = set(sys.modules)
    import polynl_mm
    x, *ws = (torch.randn(3, 3).requires_grad_() for _ in range(4))
    p = polynl_mm.Params(*ws, 1.0, 0.5)
    for form in ('auto', 'direct', 'gram'):
        polynl_mm.poly_nl(x[None], p, form=form).sum().backward()
        layer = polynl_mm.PolyNL1d(3, beta_init=0.5, form=form)
        layer(x[None]).sum().backward()
        assert layer.w1.weight.grad.abs().sum() > 0
    assert ws[0].grad.abs().sum() > 0
    assert polynl_mm.PolyNL2d and polynl_mm.PolyNL3d
    roots = {name.partition('.')[0] for name in set(sys.modules) - before}
    assert roots - sys.stdlib_module_names <= {'polynl_mm', 'torch'}, roots
    """
    run(code, tmp_path, hidden=['mmengine', 'mmcv', *HOSTS])


# ------------------------------------------------------- mmengine alone


def test_with_mmengine_alone(tmp_path):
    """Types resolve, a model is fused, and the hook is there."""
    code = """
    import torch
    from mmengine.registry import HOOKS, MODELS
    layer = MODELS.build(
        dict(type='polynl_mm.PolyNL2d', in_channels=6, beta_init=0.5)
    )
    assert HOOKS.build(dict(type='polynl_mm.PolyNLHook'))
    assert MODELS.get('polynl_mm.Insert') is not None
    import polynl_mm
    assert polynl_mm.insert_blocks and type(layer) is polynl_mm.PolyNL2d
    model = torch.nn.Sequential(
        torch.nn.Conv2d(4, 6, 1), torch.nn.BatchNorm2d(6), layer
    ).eval()
    x = torch.randn(2, 4, 5, 7)
    y = model(x)
    assert polynl_mm.fuse_poly_nl(model)[1].fused == ['2']
    assert torch.allclose(model(x), y, atol=1e-5)
    assert not {'mmcv', 'mmdet', 'mmseg'} & set(sys.modules)
    """
    run(code, tmp_path, hidden=['mmcv', *HOSTS])


TOY = """
import torch
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, METRICS, MODELS


@DATASETS.register_module()
class Line(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, i):
        return dict(x=torch.tensor([i / 8]), y=torch.tensor([i / 4]))


@MODELS.register_module()
class Slope(BaseModel):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(1, 1)

    def forward(self, x, y, mode='tensor'):
        error = (self.linear(x) - y) ** 2
        return dict(loss=error.mean()) if mode == 'loss' else error


@METRICS.register_module()
class Error(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results += [each.item() for each in data_samples]

    def compute_metrics(self, results):
        return dict(error=sum(results) / len(results))
"""
TOY_CONFIG = """
custom_imports = dict(imports=['toy'])
model = dict(type='Slope')
train_dataloader = dict(
    batch_size=4,
    dataset=dict(type='Line'),
    sampler=dict(type='DefaultSampler', shuffle=False),
    collate_fn=dict(type='default_collate'),
)
test_dataloader = train_dataloader
test_evaluator = dict(type='Error')
train_cfg = dict(by_epoch=True, max_epochs=1)
test_cfg = dict()
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.1))
"""


def test_tools_need_nothing_but_mmengine(tmp_path):
    """Train, resume and evaluate a model of no host."""
    (tmp_path / 'toy.py').write_text(TOY)
    (tmp_path / 'plain.py').write_text(TOY_CONFIG)

    def tool(name, *args):
        argv = [str(ROOT / 'tools' / f'{name}.py'), *args]
        code = f"""
        import runpy

        sys.argv = {argv}
        runpy.run_path(sys.argv[0], run_name='__main__')
        """
        return run(code, tmp_path, hidden=['mmcv', *HOSTS])

    assert '--score-thr' in tool('demo', '--help')
    tool('train', 'plain.py')
    resume = ('--resume', '--cfg-options', 'train_cfg.max_epochs=2')
    assert 'resumed epoch: 1, iter: 2' in tool('train', 'plain.py', *resume)
    tested = tool('test', 'plain.py', 'work_dirs/plain/epoch_2.pth')
    assert 'error: ' in tested


def test_engine_is_light(tmp_path):
    """A room brings what it needs, and the package nothing."""
    code = """
    import polynl_mm.engine
    assert not {'torch', 'mmengine'} & set(sys.modules)
    rooms = ('cli', 'hosts', 'checks', 'start', 'runner', 'safe_load')
    for room in (*rooms, 'training_state'):
        __import__(f'polynl_mm.engine.{room}')
    hosts = {'mmcv', 'mmdet', 'mmseg'}
    assert not hosts & set(sys.modules), hosts & set(sys.modules)
    """
    run(code, tmp_path)


# --------------------------------------------------- the hosts' own tools

# One iteration of any model: the smallest that the tool accepts.
TRAIN = """
default_scope = {host!r}
plugins = [
    dict(
        cfg=dict(type='polynl_mm.PolyNL2d'),
        stages=(False, False, True, False),
        position='after_conv2',
    )
]
backbone = dict(type='ResNet', depth=50, base_channels=4, plugins=plugins)
train_dataloader = dict(
    batch_size=2,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
)
train_cfg = dict(type='IterBasedTrainLoop', max_iters=1)
default_hooks = dict(
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=1)
)
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.001))
"""
TRAIN_DET = """
model = dict(
    type='RetinaNet',
    data_preprocessor=dict(type='DetDataPreprocessor', pad_size_divisor=32),
    backbone=backbone,
    neck=dict(
        type='FPN',
        in_channels=[16, 32, 64, 128],
        out_channels=8,
        start_level=1,
        num_outs=5,
    ),
    bbox_head=dict(
        type='RetinaHead',
        num_classes=80,
        in_channels=8,
        feat_channels=8,
        stacked_convs=1,
        anchor_generator=dict(
            type='AnchorGenerator',
            octave_base_scale=4,
            scales_per_octave=1,
            ratios=[1.0],
            strides=[8, 16, 32, 64, 128],
        ),
    ),
    train_cfg=dict(
        assigner=dict(
            type='MaxIoUAssigner',
            pos_iou_thr=0.5,
            neg_iou_thr=0.4,
            min_pos_iou=0,
        ),
        sampler=dict(type='PseudoSampler'),
        allowed_border=-1,
        pos_weight=-1,
    ),
)
train_dataloader['dataset'] = dict(
    type='CocoDataset',
    ann_file='boxes.json',
    data_prefix=dict(img='images'),
    pipeline=[
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations', with_bbox=True),
        dict(type='PackDetInputs'),
    ],
)
"""
TRAIN_SEG = """
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(type='SegDataPreProcessor', size=(64, 64)),
    backbone=backbone,
    decode_head=dict(
        type='FCNHead',
        in_channels=128,
        channels=8,
        num_convs=1,
        num_classes=19,
    ),
)
train_dataloader['dataset'] = dict(
    type='CityscapesDataset',
    img_suffix='.png',
    seg_map_suffix='.png',
    data_prefix=dict(img_path='images', seg_map_path='labels'),
    pipeline=[
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations'),
        dict(type='PackSegInputs'),
    ],
)
"""


@pytest.mark.parametrize(
    'host, config', [('mmdet', TRAIN_DET), ('mmseg', TRAIN_SEG)]
)
def test_unmodified_training_tool_of_a_host(host, config, tmp_path):
    """No ``custom_imports``, and not one of our own tools."""
    package = pytest.importorskip(host)
    tool = Path(package.__file__).parent / '.mim' / 'tools' / 'train.py'
    assert tool.is_file(), f'{host} ships no tools'
    (tmp_path / 'config.py').write_text(TRAIN.format(host=host) + config)
    rng = np.random.default_rng(0)
    for folder in ('images', 'labels'):
        (tmp_path / folder).mkdir()
    for i in range(2):
        image = rng.integers(256, size=(64, 64, 3), dtype=np.uint8)
        label = rng.integers(19, size=(64, 64), dtype=np.uint8)
        cv2.imwrite(str(tmp_path / 'images' / f'{i}.png'), image)
        cv2.imwrite(str(tmp_path / 'labels' / f'{i}.png'), label)
    images = [
        dict(id=i, file_name=f'{i}.png', height=64, width=64) for i in range(2)
    ]
    boxes = [
        dict(
            id=i,
            image_id=i,
            category_id=1,
            bbox=[8, 8, 32, 32],
            area=1024,
            iscrowd=0,
        )
        for i in range(2)
    ]
    categories = [dict(id=1, name='person')]
    (tmp_path / 'boxes.json').write_text(
        json.dumps(
            dict(images=images, annotations=boxes, categories=categories)
        )
    )
    python(tool, 'config.py', '--work-dir', 'out', cwd=tmp_path)
    with ZipFile(tmp_path / 'out' / 'iter_1.pth') as checkpoint:
        (state,) = (n for n in checkpoint.namelist() if n.endswith('.pkl'))
        assert b'backbone.layer3.5.poly_nl.beta' in checkpoint.read(state)
