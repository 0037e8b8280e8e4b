"""What can not be started ends in one line, and leaves nothing behind."""

import errno
import json
import os
import random
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip('torch')
pytest.importorskip('mmdet')
pytest.importorskip('mmseg')

import mmcv  # noqa: E402
from mmengine.config import Config, ConfigDict  # noqa: E402
from mmengine.registry import MODELS, DefaultScope  # noqa: E402

from polynl_mm.engine import checks, cli  # noqa: E402
from polynl_mm.engine.hosts import HOSTS  # noqa: E402
from polynl_mm.engine.runner import GlooRunner  # noqa: E402
from polynl_mm.engine.start import (  # noqa: E402
    build_runner,
    load_config,
    runner_class,
)
from polynl_mm.fusion import fuse_poly_nl  # noqa: E402

TOOLS = Path(__file__).parents[2] / 'tools'
GET_DEVICE = 'polynl_mm.engine.start.get_device'


@pytest.fixture
def here(place, tmp_path, monkeypatch):
    """A copy of the configs and the data, as current folder."""
    shutil.copytree(place / 'data', tmp_path / 'data')
    for name in ('det.py', 'seg.py'):
        shutil.copy(place / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, 'environ', dict(os.environ))
    with DefaultScope.overwrite_default_scope('mmengine'):
        yield tmp_path


@pytest.fixture
def refuse(here, capfd, monkeypatch):
    """Run a tool that must refuse; give its line."""

    def refuse(tool, *args, work_dir_made=False):
        before = sorted(here.rglob('*'))
        monkeypatch.setattr(sys, 'argv', [f'{tool}.py', *map(str, args)])
        monkeypatch.setattr(sys, 'path', sys.path[:])
        main = runpy.run_path(str(TOOLS / f'{tool}.py'))['main']
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.run(main)
        assert caught.value.code == 2
        if not work_dir_made:
            assert sorted(here.rglob('*')) == before
        lines = [
            line
            for line in capfd.readouterr().err.splitlines()
            if 'Warning' not in line and not line.startswith('  ')
        ]
        assert len(lines) == 1, lines
        prefix = f'{tool}.py: error: '
        assert lines[0].startswith(prefix)
        return lines[0][len(prefix) :]

    return refuse


def write(here, name, text):
    (here / name).write_text(text)
    return name


@pytest.fixture(scope='module')
def states(place):
    states = {}
    for host in ('det', 'seg'):
        cfg = Config.fromfile(place / f'{host}.py')
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            states[host] = MODELS.build(cfg.model).state_dict()
    return states


@pytest.fixture
def weights(here, states):
    """Save a state dict of a host's model, after a change to it."""

    def weights(change=lambda state: None, host='det', **more):
        state = states[host].copy()
        change(state)
        torch.save({'state_dict': state, **more}, 'some.pth')
        return 'some.pth'

    return weights


# The command line


def test_no_config(refuse):
    assert 'arguments are required: config' in refuse('train')
    assert 'required: checkpoint' in refuse('test', 'det.py')


def test_unknown_option(refuse):
    assert 'unrecognized arguments: --foo' in refuse(
        'train', 'det.py', '--foo'
    )


def test_cfg_options_without_a_value(refuse):
    assert 'KEY=VALUE' in refuse('train', 'det.py', '--cfg-options', 'a.b')


def test_cfg_options_that_can_not_be_read(refuse):
    line = refuse('train', 'det.py', '--cfg-options', 'a=[1,(2]')
    assert 'KEY=VALUE' in line and 'Imbalanced' in line


@pytest.mark.parametrize(
    'option',
    [
        'train_dataloader.dataset.pipeline.99.type=A',
        'default_scope.below.it=1',
    ],
)
def test_cfg_options_that_fit_nowhere(refuse, option):
    line = refuse('train', 'det.py', '--cfg-options', option)
    assert 'does not fit config det.py' in line and option[:10] in line


def test_cfg_options_with_half_a_dict(refuse):
    option = 'train_dataloader.dataset.pipeline=[dict(type=A)]'
    line = refuse('train', 'det.py', '--cfg-options', option)
    assert option in line and 'strings in quotes' in line


def test_config_in_another_encoding(here, refuse):
    (here / 'mine.py').write_bytes("a = '\u9762\u5b54'".encode('gbk'))
    assert "config mine.py: 'utf-8' codec" in refuse('train', 'mine.py')


def test_config_no_python(here, refuse):
    config = write(here, 'mine.py', 'a = (1,\n')
    assert 'mine.py' in refuse('train', config)


def test_blanks_in_a_path_are_kept(refuse):
    assert 'config a  b.py does' in refuse('train', 'a  b.py')


@pytest.mark.parametrize('tool', ['train', 'test'])
def test_config_missing(refuse, tool):
    line = refuse(tool, 'nope.py', *['some.pth'] * (tool == 'test'))
    none = ' does not exist, and polynl_mm has none of that name'
    assert line == f'config nope.py{none}'
    # Of one that begins so, too.
    name = 'mask-rcnn_r50-polynl-res4'
    assert refuse('train', name) == f'config {name}{none}'
    assert refuse('train', 'no/a.py') == 'config no/a.py does not exist'


def test_base_missing(here, refuse):
    config = write(here, 'mine.py', "_base_ = 'gone.py'")
    assert 'gone.py' in refuse('train', config)


def test_host_missing(here, refuse):
    config = write(here, 'mine.py', "default_scope = 'mmpose'")
    line = refuse('train', config)
    assert 'mmpose' in line and 'not installed' in line


@pytest.mark.parametrize(
    'tool, key', [('train', 'train_dataloader'), ('test', 'test_evaluator')]
)
def test_config_of_something_else(refuse, tool, key):
    options = ['some.pth'] * (tool == 'test') + [
        '--cfg-options',
        f'{key}=None',
    ]
    assert refuse(tool, 'det.py', *options) == f'config det.py has no {key}'


def test_work_dir_is_a_file(here, refuse):
    write(here, 'file', '')
    line = refuse('train', 'det.py', '--work-dir', 'file')
    assert line == 'work_dir=file is not a folder'


def test_auto_scale_lr_without_a_base(refuse):
    line = refuse('train', 'det.py', '--auto-scale-lr')
    assert 'auto_scale_lr.base_batch_size' in line


# The demo


@pytest.mark.parametrize(
    'images, said',
    [
        ('gone', 'gone does not exist'),
        ('data', 'data has no images'),
        ('det.py', 'det.py: not a readable picture'),
    ],
)
def test_demo_without_images(refuse, weights, images, said):
    args = (images, 'det.py', weights(), '--out', 'out')
    assert refuse('demo', *args).startswith(said)


def test_demo_over_the_images(here, refuse, weights):
    (here / 'data/det/img').rename(here / 'vis')
    args = ('vis', 'det.py', weights(), '--out', '.')
    assert 'would replace the images' in refuse('demo', *args)


def test_demo_of_no_known_host(refuse, weights):
    args = ('data/det/img', 'det.py', weights(), '--out', 'out')
    line = refuse('demo', *args, '--cfg-options', 'default_scope=mmengine')
    assert "default_scope='mmengine'" in line


def test_demo_in_tiles_of_the_other_host(refuse, weights):
    args = ('data/seg/img', 'seg.py', weights(host='seg'), '--out', 'out')
    assert "mode='slide'" in refuse('demo', *args, '--tile', '32')


# The machine


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(GET_DEVICE, lambda: 'cpu')
    for name in ('cuda', 'mlu', 'musa', 'npu'):
        monkeypatch.setattr(
            f'mmengine.device.is_{name}_available', lambda: False
        )


@pytest.mark.parametrize(
    'options',
    [['--amp'], ['--cfg-options', 'optim_wrapper.type=AmpOptimWrapper']],
)
def test_amp_without_a_gpu(refuse, no_gpu, options):
    assert '--amp' in (line := refuse('train', 'det.py', *options))
    assert 'needs a GPU' in line


@pytest.mark.parametrize('launcher', ['slurm', 'mpi'])
def test_launcher_without_a_gpu(refuse, no_gpu, launcher):
    line = refuse('train', 'det.py', '--launcher', launcher)
    assert line.startswith(f'--launcher {launcher} needs a GPU')
    assert 'dist_' in line


def test_torchrun_forgotten(refuse, monkeypatch):
    monkeypatch.delenv('RANK', raising=False)
    line = refuse('train', 'det.py', '--launcher', 'pytorch')
    assert 'RANK is not set' in line and 'dist_' in line


def test_runner_of_its_own_without_a_gpu(refuse, no_gpu, monkeypatch):
    monkeypatch.setenv('RANK', '0')
    line = refuse(
        *('train', 'det.py', '--launcher', 'pytorch'),
        *('--cfg-options', 'runner_type=FlexibleRunner'),
    )
    assert "runner_type='FlexibleRunner'" in line
    assert 'polynl_mm.GlooRunner' in line


def test_runner_unknown(refuse):
    line = refuse('train', 'det.py', '--cfg-options', 'runner_type=Nobody')
    assert "runner_type='Nobody' is not registered" in line


def test_gloo_runner_is_not_written_into_the_config(here, no_gpu, monkeypatch):
    monkeypatch.setenv('RANK', '0')
    cfg = Config.fromfile('det.py')
    cfg.launcher = 'pytorch'
    assert runner_class(cfg) is GlooRunner
    assert 'runner_type' not in cfg
    cfg.runner_type = 'polynl_mm.GlooRunner'  # asked for
    assert runner_class(cfg) is GlooRunner


def test_mpirun_without_an_address(refuse, monkeypatch):
    monkeypatch.setattr(GET_DEVICE, lambda: 'cuda')
    monkeypatch.setenv('OMPI_COMM_WORLD_RANK', '0')
    monkeypatch.setenv('OMPI_COMM_WORLD_LOCAL_RANK', '0')
    monkeypatch.delenv('MASTER_ADDR', raising=False)
    line = refuse('train', 'det.py', '--launcher', 'mpi')
    assert 'MASTER_ADDR is not set' in line


@pytest.mark.parametrize('rank, local', [('1', '1'), ('0', '0')])
def test_mpirun_gives_the_gpu(here, monkeypatch, rank, local):
    monkeypatch.delenv('LOCAL_RANK', raising=False)
    monkeypatch.setenv('OMPI_COMM_WORLD_LOCAL_RANK', local)
    parser = cli.Parser()
    parser.add_job()
    load_config(parser.parse_args(['det.py']))
    assert os.environ['LOCAL_RANK'] == local


def test_more_processes_than_gpus(refuse, monkeypatch):
    monkeypatch.setattr(GET_DEVICE, lambda: 'cuda')
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setenv('RANK', '0')
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '4')
    line = refuse('train', 'det.py', '--launcher', 'pytorch')
    assert line.startswith('4 processes for 2 GPU(s)')


def test_another_process_lets_the_first_one_speak(refuse, monkeypatch):
    waited = []
    monkeypatch.setattr(cli.time, 'sleep', waited.append)
    monkeypatch.setenv('LOCAL_RANK', '1')
    refuse('train', 'nope.py')
    monkeypatch.setenv('RANK', '2')
    monkeypatch.setenv('LOCAL_RANK', '0')  # the first of another node
    refuse('train', 'nope.py')
    same_node, other_node = waited
    assert same_node > other_node > 5


# The data


@pytest.mark.parametrize(
    'host, gone, key',
    [
        ('det', 'data/det', "data_root='data/det'"),
        ('det', 'data/det/ann.json', "ann_file='ann.json'"),
        ('det', 'data/det/img', "data_prefix.img='img'"),
        ('seg', 'data/seg', "data_root='data/seg'"),
        ('seg', 'data/seg/ann', "data_prefix.seg_map_path='ann'"),
    ],
)
def test_data_missing(here, refuse, host, gone, key):
    (here / gone).rename(here / 'elsewhere')
    line = refuse('train', f'{host}.py')
    assert line == (
        f'config {host}.py: train_dataloader: {key}: {here / gone} does not '
        'exist'
    )


def test_data_missing_in_a_wrapper_and_in_test(here, refuse, weights):
    checkpoint = weights()
    config = write(
        here,
        'mine.py',
        "_base_ = 'det.py'\n"
        'train_dataloader = dict(dataset=dict(_delete_=True, '
        "type='ConcatDataset', datasets=[{{_base_.val_dataloader.dataset}}, "
        "dict(type='RepeatDataset', times=2, "
        "dataset=dict(type='CocoDataset', ann_file='gone.json'))]))\n"
        "test_dataloader = dict(dataset=dict(data_root='away'))\n",
    )
    assert "train_dataloader: ann_file='gone.json'" in refuse('train', config)
    assert "test_dataloader: data_root='away'" in refuse(
        'test', config, checkpoint
    )


def test_labels_of_validation_missing(refuse):
    option = 'val_dataloader.dataset.data_prefix.seg_map_path=gone'
    line = refuse('train', 'seg.py', '--cfg-options', option)
    assert "val_dataloader: data_prefix.seg_map_path='gone'" in line


def test_home_is_not_expanded(refuse):
    # The data sets do not, either.
    option = 'train_dataloader.dataset.data_root=~'
    assert "data_root='~'" in refuse(
        'train', 'det.py', '--cfg-options', option
    )


def test_landmarks_missing(refuse):
    option = 'train_dataloader.dataset.landmark_file=gone.txt'
    line = refuse('train', 'det.py', '--cfg-options', option)
    assert "train_dataloader: landmark_file='gone.txt'" in line


def test_annotations_of_the_metric_missing(refuse):
    line = refuse(
        'train', 'det.py', '--cfg-options', 'val_evaluator.ann_file=gone.json'
    )
    assert "val_evaluator: ann_file='gone.json'" in line


def test_test_set_without_labels_is_no_error(here):
    cfg = Config.fromfile('seg.py')
    shutil.rmtree(here / 'data/seg/ann')
    pipeline = cfg.test_dataloader.dataset.pipeline
    assert pipeline.pop(1).type == 'LoadAnnotations'
    checks.check_data(cfg, 'test')


def test_remote_labels_are_left_to_mmengine(here):
    (here / 'data/seg/ann/3.png').unlink()
    cfg = Config.fromfile('seg.py')
    with pytest.raises(cli.StartError, match='3.png'):
        checks.check_data(cfg, 'train')
    cfg.train_dataloader.dataset.data_root = 's3://bucket/seg'
    checks.check_data(cfg, 'train')


def test_labels_of_one_class_where_they_are_meant(here):
    """Beside others, which may be remote, and to test with."""
    shutil.copytree('data/seg', 'background')
    for path in (here / 'background/ann').iterdir():
        cv2.imwrite(str(path), cv2.imread(str(path), -1) * 0)
    cfg = Config.fromfile('seg.py')
    whole = cfg.train_dataloader.dataset
    for phase in ('train', 'val', 'test'):
        leaf = dict(whole, data_root='background')
        cfg[f'{phase}_dataloader'].dataset = leaf
    checks.check_data(cfg, 'val', 'test')
    with pytest.raises(cli.StartError, match='background/ann hold, of 2'):
        checks.check_data(cfg, 'train')
    for root in ('data/seg', 's3://bucket/seg'):
        both = [leaf, dict(whole, data_root=root)]
        cfg.train_dataloader.dataset = dict(
            type='ConcatDataset', datasets=both
        )
        checks.check_data(cfg, 'train')


def spoil(here, what):
    """Break the fourth image or label of the segmentation data."""
    image, label = (here / f'data/seg/{part}/3.png' for part in ('img', 'ann'))
    ids = cv2.imread(str(label), -1)
    if what == 'no label':
        label.unlink()
        (here / 'data/seg/ann/5.png').unlink()
    elif what == 'no image':
        image.unlink()
    elif what == 'size':
        cv2.imwrite(str(image), np.zeros((48, 80, 3), np.uint8))
    elif what == 'ids':
        ids[:2, :2] = [[2, 33], [255, 254]]
        cv2.imwrite(str(label), ids)
    elif what == 'colours':
        cv2.imwrite(str(label), np.dstack([ids] * 3))
    elif what == 'cut label':
        label.write_bytes(label.read_bytes()[:60])
    elif what == 'cut image':
        image.write_bytes(image.read_bytes()[:12])
    elif what == 'no pictures':
        for path in (here / 'data/seg/img').iterdir():
            path.rename(path.with_suffix('.bmp'))


@pytest.mark.parametrize('phase', ['train', 'val'])
@pytest.mark.parametrize(
    'what, said',
    [
        (
            'no label',
            'image {img}/3.png has no label: {ann}/3.png does not exist (2 of '
            '8 images have none)',
        ),
        (
            'no image',
            'label {ann}/3.png has no image *.png in {img} (1 of 8 labels '
            'have none)',
        ),
        (
            'size',
            'label {ann}/3.png is 64 x 64 pixels, but its image {img}/3.png '
            'is 80 x 48',
        ),
        (
            'ids',
            'label {ann}/3.png has the ids [2, 33, 254], expected 0 to 1, or '
            '255',
        ),
        ('colours', 'label {ann}/3.png has shape (64, 64, 3), expected one'),
        ('cut label', '{ann}/3.png can not be read: '),
        ('cut image', '{img}/3.png can not be read: '),
        ('no pictures', '{img} has no file *.png, which a BaseSegDataset'),
    ],
)
def test_images_and_labels_that_do_not_fit(here, refuse, phase, what, said):
    if phase == 'val':
        # The training data are whole.
        shutil.copytree('data/seg', 'whole')
        root = ['train_dataloader.dataset.data_root=whole']
    spoil(here, what)
    options = ['--cfg-options', *root] if phase == 'val' else []
    line = refuse('train', 'seg.py', *options)
    said = said.format(img='data/seg/img', ann='data/seg/ann')
    assert line.startswith(f'config seg.py: {phase}_dataloader: {said}')


@pytest.mark.parametrize('what', ['no label', 'ids'])
def test_labels_to_test_with(here, refuse, weights, what):
    spoil(here, what)
    line = refuse('test', 'seg.py', weights(host='seg'))
    assert line.startswith('config seg.py: test_dataloader: ')
    assert 'data/seg/ann/3.png' in line


def test_labels_as_the_host_reads_them(here):
    """A third class may be there if the host makes it another one."""
    spoil(here, 'ids')
    label = cv2.imread('data/seg/ann/3.png', -1)
    label[label == 33] = 2
    label[label == 254] = 2
    cv2.imwrite('data/seg/ann/3.png', label)
    cfg = Config.fromfile('seg.py')
    with pytest.raises(cli.StartError, match=r'ids \[2\]'):
        checks.check_data(cfg, 'train')
    # 0 is ignored, and 1 and 2 become 0 and 1.
    cfg.train_dataloader.dataset.reduce_zero_label = True
    checks.check_data(cfg, 'train')
    cfg.train_dataloader.dataset.reduce_zero_label = False
    cfg.train_dataloader.dataset.ignore_index = 2
    with pytest.raises(cli.StartError, match=r'ids \[255\]'):
        checks.check_data(cfg, 'train')


@pytest.mark.parametrize('name', ['RandomFlip', 'FilterAnnotations'])
@pytest.mark.parametrize(
    'key', ['train_dataloader.dataset.pipeline.1.type', 'tta_pipeline']
)
def test_transforms_that_the_host_has_now(refuse, name, key):
    value = f'polynl_mm.{name}'
    if key == 'tta_pipeline':
        value = f'[dict(transforms=[[dict(type={value!r})]])]'
    line = refuse('train', 'det.py', '--cfg-options', f'{key}={value}')
    assert line == (
        f"config det.py: there is no 'polynl_mm.{name}' any more, as the "
        f"host's own moves landmarks, too: write type='{name}'"
    )


def test_part_of_the_images(here, refuse):
    write(here, 'data/seg/some.txt', '0\n1\n')
    option = 'train_dataloader.dataset.ann_file=some.txt'
    spoil(here, 'no image')
    cfg = Config.fromfile('seg.py')
    cfg.merge_from_dict({option.split('=')[0]: 'some.txt'})
    checks.check_data(cfg, 'train')
    write(here, 'data/seg/some.txt', '0\n3\n')
    line = refuse('train', 'seg.py', '--cfg-options', option)
    assert line.endswith('image data/seg/img/3.png does not exist')


@pytest.mark.parametrize(
    'host, name, content, said',
    [
        ('seg', 'some.txt', b'0\n\xc3\xe6\n', ", line 2: got b'\\xc3\\xe6', "),
        ('seg', 'some.txt', b'\xef\xbb\xbf0\n', ' begins with a byte order'),
        ('det', 'some.json', b'\xef\xbb\xbf{}', ' begins with a byte order'),
        ('det', 'some.json', b'{"a": "\xc3\xe6"}', ', line 1: got '),
    ],
)
def test_annotation_in_another_encoding(
    here, refuse, host, name, content, said
):
    (here / f'data/{host}' / name).write_bytes(content)
    option = f'train_dataloader.dataset.ann_file={name}'
    line = refuse('train', f'{host}.py', '--cfg-options', option)
    assert f'{here}/data/{host}/{name}{said}' in line and 'UTF-8' in line


def test_mosaic_of_a_single_picture(refuse):
    load = "dict(type='LoadImageFromFile')"
    line = refuse(
        *('train', 'det.py', '--cfg-options'),
        f"train_dataloader.dataset.pipeline=[{load}, dict(type='Mosaic')]",
    )
    assert 'train_dataloader: Mosaic mixes several pictures' in line
    assert 'MultiImageMixDataset around the data set' in line


def test_no_resize_to_test_with(refuse, weights):
    """What mmdet's heads would say when the first batch is done."""
    line = refuse(
        *('test', 'det.py', weights(), '--cfg-options'),
        "test_dataloader.dataset.pipeline=[dict(type='LoadImageFromFile'), "
        "dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', "
        "'ori_shape', 'img_shape'))]",
        work_dir_made=True,
    )
    assert line.startswith(
        'config det.py: test_dataloader: samples have no scale_factor'
    )
    assert "dict(type='Resize', scale_factor=1.0)" in line


def test_the_look_at_a_sample_leaves_the_random_numbers(here):
    class Loader:
        batch_sampler = None

        class dataset:
            def __class_getitem__(cls, index):
                random.random(), np.random.rand(), torch.rand(1)
                return {}

    before = random.getstate(), np.random.rand(0), torch.get_rng_state()
    numbers = np.random.get_state()[2]
    cfg = Config.fromfile('det.py')
    checks.check_loader(cfg, 'test', Loader)
    assert random.getstate() == before[0]
    assert np.random.get_state()[2] == numbers
    assert torch.equal(torch.get_rng_state(), before[2])


def test_photograph_that_was_turned(here):
    """A header says how to turn a JPEG, and the hosts turn it."""
    picture = Image.fromarray(np.zeros((48, 64, 3), np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6
    os.remove('data/seg/img/3.png')
    shutil.rmtree('data/seg/ann')
    os.mkdir('data/seg/ann')
    picture.save('data/seg/img/3.jpg', exif=turned)
    cfg = Config.fromfile('seg.py')
    cfg.train_dataloader.dataset.img_suffix = '.jpg'
    label = np.zeros(mmcv.imread('data/seg/img/3.jpg').shape[:2], np.uint8)
    label[0] = 1
    assert label.shape == (64, 48)
    cv2.imwrite('data/seg/ann/3.png', label)
    checks.check_data(cfg, 'train')
    cv2.imwrite('data/seg/ann/3.png', label.T)
    with pytest.raises(cli.StartError, match='64 x 48 .* 48 x 64'):
        checks.check_data(cfg, 'train')


@pytest.mark.parametrize(
    'config, head, owner',
    [
        ('seg.py', 'decode_head', 'BaseSegDataset'),
        ('seg.py', 'auxiliary_head.1', 'BaseSegDataset'),
        ('det.py', 'bbox_head', 'CocoDataset'),
        ('det.py', 'roi_head.mask_head', 'CocoDataset'),
    ],
)
def test_a_head_with_fewer_classes_than_the_data(here, config, head, owner):
    cfg = Config.fromfile(config)
    # One that learns edges, and others that have the classes of the data.
    edges = dict(type='STDCHead', num_classes=1)
    cfg.model.auxiliary_head = [edges, dict(type='FCNHead', num_classes=2)]
    cfg.model.roi_head = dict(mask_head=dict(num_classes=2))
    cfg.model.rpn_head = dict(num_classes=1)
    checks.check_data(cfg, 'train')
    cfg.merge_from_dict({f'model.{head}.num_classes': 1})
    with pytest.raises(cli.StartError) as caught:
        checks.check_data(cfg, 'train')
    assert str(caught.value) == (
        f'config {cfg.filename}: model.{head}.num_classes=1, expected at '
        f'least the 2 classes of {owner} in train_dataloader (of others, '
        'metainfo=dict(classes=(...)) of the data set tells them)'
    )
    checks.check_data(cfg, 'val')


CITYSCAPES = """
_base_ = 'mmseg::fcn/fcn_r50-d8_4xb2-40k_cityscapes-512x1024.py'
train_dataloader = dict(dataset=dict(data_root='{root}'))
val_dataloader = dict(dataset=dict(data_root='{root}'))
"""


def test_folder_that_is_not_cityscapes(here, refuse):
    config = write(here, 'city.py', CITYSCAPES.format(root='data'))
    line = refuse('train', config)
    assert line.startswith(
        "config city.py: train_dataloader: data_prefix.img_path='leftImg8bit/"
    )
    for split in ('train', 'val'):
        shutil.copytree('data/seg/img', f'data/leftImg8bit/{split}')
        shutil.copytree('data/seg/ann', f'data/gtFine/{split}')
    line = refuse('train', config)
    assert line == (
        'config city.py: train_dataloader: data/leftImg8bit/train has no file '
        '*_leftImg8bit.png, which a CityscapesDataset consists of'
    )


def test_cityscapes_without_training_ids(here, refuse):
    config = write(here, 'city.py', CITYSCAPES.format(root='data'))
    stem = 'bonn/bonn_000000_000019'
    for split in ('train', 'val'):
        for name in ('leftImg8bit', 'gtFine'):
            os.makedirs(f'data/{name}/{split}/bonn')
        shutil.copy(
            'data/seg/img/0.png',
            f'data/leftImg8bit/{split}/{stem}_leftImg8bit.png',
        )
        label = f'data/gtFine/{split}/{stem}_gtFine_label'
        shutil.copy('data/seg/ann/0.png', f'{label}Ids.png')
    line = refuse('train', config)
    label = f'data/gtFine/train/{stem}_gtFine_label'
    assert f'{label}TrainIds.png does not exist (1 of 1 images' in line
    assert f'make it from {label}Ids.png with csCreateTrainIdLabel' in line
    for split in ('train', 'val'):
        label = f'data/gtFine/{split}/{stem}_gtFine_label'
        shutil.copy(f'{label}Ids.png', f'{label}TrainIds.png')
    checks.check_data(Config.fromfile(config), 'train', 'val')


def test_labels_of_a_type_that_nobody_knows(here):
    """The runner says it better."""
    spoil(here, 'ids')
    cfg = Config.fromfile('seg.py')
    cfg.train_dataloader.dataset.type = 'Nobody'
    checks.check_data(cfg, 'train')


@pytest.mark.parametrize(
    'launcher, rank, size',
    [
        ('pytorch', 'RANK', 'WORLD_SIZE'),
        ('slurm', 'SLURM_PROCID', 'SLURM_NTASKS'),
        ('mpi', 'OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_SIZE'),
    ],
)
def test_processes_share_the_labels(here, monkeypatch, launcher, rank, size):
    """The fourth of the labels is one that process 1 of 2 reads."""
    spoil(here, 'ids')
    cfg = Config.fromfile('seg.py')
    cfg.launcher = launcher
    monkeypatch.setenv(size, '2')
    monkeypatch.setenv(rank, '0')
    checks.check_data(cfg, 'train')
    monkeypatch.setenv(rank, '1')
    with pytest.raises(cli.StartError, match='ids'):
        checks.check_data(cfg, 'train')
    # Whether names fit is cheap, and everybody's.
    spoil(here, 'no label')
    monkeypatch.setenv(rank, '0')
    with pytest.raises(cli.StartError, match='no label'):
        checks.check_data(cfg, 'train')


def test_remote_data_is_left_to_mmengine(here):
    cfg = Config.fromfile('det.py')
    cfg.train_dataloader.dataset.data_root = 's3://bucket/det'
    checks.check_data(cfg, 'train')
    cfg.train_dataloader.dataset.data_root = 'elsewhere'
    cfg.train_dataloader.dataset.backend_args = dict(backend='petrel')
    checks.check_data(cfg, 'train')


def test_annotation_file_empty(here, refuse):
    (here / 'data/det/ann.json').write_text('')
    line = refuse('train', 'det.py')
    empty = here / 'data/det/ann.json'
    assert line.endswith(f'{empty} is empty, expected annotations')


@pytest.mark.parametrize(
    'face, says',
    [
        ('1 2 3', "data/faces.txt, line 3: got '1 2 3', expected "),
        ('1 2 3 4 0 0 0 0 0 0', 'data/det/img/0--Parade/0.jpg: not there'),
    ],
)
def test_annotation_of_ours_does_not_fit(here, refuse, face, says):
    write(here, 'data/faces.txt', f'0--Parade/0.jpg\n1\n{face}\n')
    # mmengine names a logger by config and second, and keeps its stream.
    config = write(
        here,
        f'mine_{len(face)}.py',
        "_base_ = 'det.py'\n"
        'train_dataloader = dict(dataset=dict(_delete_=True, '
        "type='polynl_mm.WiderFaceDataset', data_root='data', "
        "ann_file='faces.txt', data_prefix=dict(img='det/img'), "
        'pipeline=[]))',
    )
    line = refuse('train', config, work_dir_made=True)
    assert line.startswith(says)


def test_pictures_of_unknown_size_are_not_grouped(here, refuse):
    os.makedirs('data/det/img/x')
    shutil.copy('data/det/img/0.png', 'data/det/img/x/0.png')
    write(here, 'data/faces.txt', 'x/0.png\n1\n1 2 30 40 0 0 0 0 0 0\n')
    config = write(
        here,
        'wider.py',
        "_base_ = 'det.py'\n"
        'train_dataloader = dict(dataset=dict(_delete_=True, '
        "type='polynl_mm.WiderFaceDataset', data_root='data', "
        "ann_file='faces.txt', data_prefix=dict(img='det/img'), "
        'pipeline=[]))',
    )
    line = refuse('train', config, work_dir_made=True)
    assert 'train_dataloader: AspectRatioBatchSampler needs the width' in line
    assert 'a WiderFaceDataset does not know' in line
    assert line.endswith('set train_dataloader.batch_sampler=None')


WIDER_TEST = """
_base_ = 'det.py'
model = dict(bbox_head=dict(num_classes=1))
test_dataloader = dict(dataset=dict(
    _delete_=True, type='polynl_mm.WiderFaceDataset', data_root='data/det',
    ann_file='list.txt', data_prefix=dict(img='img'), test_mode=True,
    pipeline={{_base_.val_dataloader.dataset.pipeline}}))
test_evaluator = dict(
    _delete_=True, type='polynl_mm.WiderFaceMetric', gt_dir=None,
    out_dir='found')
val_evaluator = test_evaluator
"""


def test_predictions_of_a_list_that_find_wrote(
    here, refuse, weights, monkeypatch
):
    """They lie in out_dir, and nothing lies beside the pictures."""
    os.makedirs('data/det/img/0--Parade')
    names = [f'0--Parade/{i}.png' for i in range(2)]
    for i, name in enumerate(names):
        shutil.copy(f'data/det/img/{i}.png', f'data/det/img/{name}')
    before = sorted(here.glob('data/**/*'))
    lines = [f'{here}/data/det/img/{name}' for name in names]
    write(here, 'data/det/list.txt', '\n'.join(lines))

    def one_class(state):
        for key in ('weight', 'bias'):
            key = f'bbox_head.retina_cls.{key}'
            state[key] = state[key][: len(state[key]) // 2]

    config = write(here, 'listed.py', WIDER_TEST)
    checkpoint = weights(one_class)
    monkeypatch.setattr('sys.argv', ['test.py', config, checkpoint])
    cli.run(runpy.run_path(str(TOOLS / 'test.py'))['main'])
    for name in names:
        text = (here / 'found' / name).with_suffix('.txt').read_text()
        assert text.splitlines()[0] == name.replace('.png', '.jpg')
    after = set(here.glob('data/**/*'))
    assert after.difference(before) == {here / 'data/det/list.txt'}

    for name in ('/elsewhere/0--Parade/0.png', '../0--Parade/0.png'):
        write(here, 'data/det/list.txt', f'{lines[0]}\n{name}\n')
        # mmengine keeps a logger by config and second, and its stream.
        config = write(here, f'list{len(name)}.py', WIDER_TEST)
        line = refuse('test', config, checkpoint, work_dir_made=True)
        assert line.startswith(f'data/det/list.txt, line 2: got {name!r}')


@pytest.mark.parametrize('tool', ['train', 'test'])
def test_block_that_can_not_be_inserted(refuse, weights, tool):
    checkpoint = [weights()] * (tool == 'test')
    line = refuse(
        *(tool, 'det.py', *checkpoint, '--cfg-options'),
        'model.backbone.blocks=[layer3]',
        work_dir_made=True,
    )
    assert line.startswith('config det.py: blocks must be a list of dicts')


def test_folder_for_predictions_that_can_not_be_made(here, refuse):
    config = write(here, 'metric.py', WIDER_TEST)
    line = refuse(
        *('train', config, '--cfg-options', 'val_evaluator.out_dir=det.py'),
        'model.bbox_head.num_classes=2',
        work_dir_made=True,
    )
    assert line == 'out_dir=det.py can not be written: File exists'


def test_no_sample(here, refuse):
    path = here / 'data/det/ann.json'
    coco = json.loads(path.read_text())
    path.write_text(json.dumps({**coco, 'images': [], 'annotations': []}))
    line = refuse('train', 'det.py', work_dir_made=True)
    assert line == 'config det.py: train_dataloader has no sample'


# The checkpoint


@pytest.mark.parametrize('how', ['test', 'train'])
def test_checkpoint_missing(refuse, how):
    args = ['gone.pth'] if how == 'test' else ['--resume', 'gone.pth']
    line = refuse(how, 'det.py', *args)
    assert line == 'checkpoint gone.pth does not exist'


def test_no_checkpoint_at_all(here, refuse):
    for content in ('', 'some text', '{}'):
        write(here, 'some.pth', content)
        line = refuse('test', 'det.py', 'some.pth')
        assert line.startswith('checkpoint some.pth can not be read: ')
        assert 'weights_only' not in line


def test_checkpoint_cut_short(here, refuse, weights):
    path = here / weights()
    path.write_bytes(path.read_bytes()[:-999])
    assert 'can not be read' in refuse('test', 'det.py', path)


class Crafted:
    def __reduce__(self):
        return os.mkdir, ('crafted',)


def test_malicious_checkpoint(refuse, weights):
    line = refuse('test', 'det.py', weights(meta=Crafted()))
    assert 'can not be read' in line and 'mkdir' in line


def test_no_dict(refuse, here):
    torch.save([1], 'some.pth')
    assert 'holds a list' in refuse('test', 'det.py', 'some.pth')


def test_checkpoint_of_another_model(refuse, weights):
    def change(state):
        del state['bbox_head.retina_cls.weight']
        state['roi_head.weight'] = torch.zeros(1)
        state['neck.fpn_convs.0.conv.bias'] = torch.zeros(3)

    line = refuse('test', 'det.py', weights(change), '--work-dir', 'out')
    assert line == (
        'checkpoint some.pth does not fit the model of det.py: '
        '1 missing keys (bbox_head.retina_cls.weight), '
        '1 unexpected keys (roi_head.weight), '
        '1 keys of another shape (neck.fpn_convs.0.conv.bias)'
    )


def test_checkpoint_without_our_block(refuse, weights):
    def change(state):
        for key in [key for key in state if 'poly_nl' in key]:
            del state[key]

    line = refuse('test', 'det.py', weights(change))
    assert '30 missing keys (backbone.layer3.0.poly_nl.alpha, ' in line
    assert line.endswith(', ...)')


@pytest.mark.parametrize('prefix', ['', 'module.'])
def test_checkpoint_of_a_fused_model(refuse, prefix):
    """To be fused by --fuse, it must be that of a training, too."""
    cfg = Config.fromfile('seg.py')
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = MODELS.build(cfg.model).eval()
    state = fuse_poly_nl(model)[0].state_dict()
    torch.save({prefix + k: v for k, v in state.items()}, 'fused.pth')
    line = refuse('test', 'seg.py', 'fused.pth', *['--fuse'] * bool(prefix))
    assert line == (
        'checkpoint fused.pth does not fit the model of seg.py: '
        "'backbone.layer3.0.poly_nl' is a Poly-NL layer; in the state dict "
        'it is fused with the convolution before it: that is for a model '
        'on which fuse_poly_nl was called; a training saves none such'
    )


def test_checkpoint_of_the_other_host(refuse, weights):
    line = refuse('test', 'det.py', weights(host='seg'))
    assert 'missing keys' in line and 'unexpected keys' in line


def test_harmless_differences_are_accepted(here, weights):
    def change(state):
        for key in list(state):
            value = state.pop(key)
            if not key.endswith('num_batches_tracked'):
                state[f'module.{key}'] = value
        state['data_preprocessor.mean'] = torch.zeros(3, 1, 1)
        state['ema_backbone_conv1_weight'] = torch.zeros(1)

    checks.check_checkpoint(Config.fromfile('det.py'), weights(change))


def test_modules_learn_the_version_of_a_checkpoint(weights, monkeypatch):
    met = []
    load = torch.nn.Conv2d._load_from_state_dict

    def spy(self, state_dict, prefix, local_metadata, *args):
        met.append((prefix, local_metadata.get('version')))
        load(self, state_dict, prefix, local_metadata, *args)

    def change(state):
        state._metadata = {'backbone.conv1': dict(version=7)}

    monkeypatch.setattr(torch.nn.Conv2d, '_load_from_state_dict', spy)
    checks.check_checkpoint(Config.fromfile('det.py'), weights(change))
    assert ('backbone.conv1.', 7) in met


def test_one_process_reads_the_checkpoint(here, monkeypatch):
    monkeypatch.setenv('RANK', '1')
    (here / 'some.pth').write_text('no checkpoint')
    checks.check_checkpoint(Config.fromfile('det.py'), 'some.pth')
    with pytest.raises(cli.StartError, match='does not exist'):
        checks.check_checkpoint(Config.fromfile('det.py'), 'gone.pth')


def test_resumed_on_one_node_only(here, monkeypatch):
    class Started:
        from_cfg = staticmethod(lambda cfg: None)

    monkeypatch.setattr(
        'polynl_mm.engine.start.all_gather_object',
        lambda resumed: [resumed, True],
    )
    cfg = Config.fromfile('det.py')
    cfg.work_dir = 'out'
    with pytest.raises(cli.StartError, match='some nodes .* in out'):
        build_runner(Started, cfg)


@pytest.mark.parametrize('missing', ['meta', 'message_hub', 'optimizer'])
def test_resume_from_weights_only(refuse, weights, missing):
    state = {'meta': {}, 'message_hub': {}, 'optimizer': {}}
    del state[missing]
    line = refuse('train', 'det.py', '--resume', weights(**state))
    assert f'has no {missing!r}' in line and 'load_from' in line


def test_resume_from_another_model(refuse, weights):
    def change(state):
        state['roi_head.weight'] = torch.zeros(1)

    checkpoint = weights(change, meta={}, message_hub={}, optimizer={})
    line = refuse('train', 'det.py', '--resume', checkpoint)
    assert '1 unexpected keys (roi_head.weight)' in line
    line = refuse(
        *('train', 'det.py', '--cfg-options', 'resume=True'),
        f'load_from={checkpoint}',
    )
    assert '1 unexpected keys (roi_head.weight)' in line


def test_resume_where_every_checkpoint_is_lost(here, refuse):
    (here / 'work').mkdir()
    write(here, 'work/last_checkpoint', '/gone/epoch_1.pth')
    line = refuse('train', 'det.py', '--work-dir', 'work', '--resume')
    assert 'last_checkpoint names /gone/epoch_1.pth, but there is no' in line


def set_resume(cfg, resume):
    runpy.run_path(str(TOOLS / 'train.py'))['set_resume'](cfg, resume)


def test_resume_where_no_checkpoint_can_be_read(here, weights):
    (here / 'work').mkdir()
    cfg = Config.fromfile('det.py')
    cfg.work_dir = 'work'
    # Weights alone are none.
    os.rename(weights(), 'work/pretrained.pth')
    set_resume(cfg, 'auto')
    assert not cfg.resume
    write(here, 'work/epoch_1.pth', 'PK')
    with pytest.raises(cli.StartError) as caught:
        set_resume(cfg, 'auto')
    assert str(caught.value) == (
        '--resume: there is no whole checkpoint in work, but work/epoch_1.pth:'
        ' to start anew, move what can not be read out of there'
    )


def test_resume_with_nothing_to_resume_starts_anew(here, capfd):
    cfg = Config.fromfile('det.py')
    cfg.work_dir = 'work'
    cfg.load_from = 'pretrained.pth'
    set_resume(cfg, 'auto')
    assert (cfg.resume, cfg.load_from) == (False, 'pretrained.pth')
    assert 'no checkpoint in work yet' in capfd.readouterr().err


def test_resume_finds_the_newest_of_this_folder(here, weights, capfd):
    """With its seed; a record of the folder it was copied from is none."""
    (here / 'work').mkdir()
    for number, second in ((1, '09'), (2, '08'), (3, '07')):
        meta = dict(iter=number, seed=number, time=f'20260102_0304{second}')
        path = weights(meta=meta, message_hub={}, optimizer={})
        os.rename(path, f'work/epoch_{number}.pth')
    write(here, 'work/last_checkpoint', '/original/epoch_3.pth')
    write(here, 'work/epoch_4.pth', 'PK')
    cfg = Config.fromfile('det.py')
    cfg.work_dir = 'work'
    cfg.randomness = dict(seed=7, deterministic=True)
    set_resume(cfg, 'auto')
    assert (cfg.resume, cfg.load_from) == (True, 'work/epoch_1.pth')
    assert cfg.randomness == dict(seed=1, deterministic=True)
    said = capfd.readouterr().err
    assert 'work/epoch_4.pth can not be read (' in said
    assert '--resume: from work/epoch_1.pth' in said
    assert 'randomness.seed=1 as in work/epoch_1.pth, not 7' in said


def test_a_full_disk_stops_in_a_line(here, refuse, weights, monkeypatch):
    """With the checkpoint from which it could go on."""
    (here / 'work').mkdir()
    path = weights(meta={}, message_hub={}, optimizer={})
    os.rename(path, 'work/epoch_1.pth')

    def train():
        raise OSError(errno.ENOSPC, 'No space left on device', 'work/a.pth')

    runner = SimpleNamespace(train=train, iter=7, work_dir='work', hooks=[])
    monkeypatch.setattr(
        'polynl_mm.engine.start.build_runner', lambda *args: runner
    )
    assert refuse('train', 'det.py', '--work-dir', 'work') == (
        "[Errno 28] No space left on device: 'work/a.pth': the training "
        'stopped after 7 iterations; make room and --resume; the last good '
        'checkpoint is work/epoch_1.pth'
    )


def test_weights_to_start_from_missing(refuse):
    line = refuse('train', 'det.py', '--cfg-options', 'load_from=gone.pth')
    assert line == 'checkpoint gone.pth does not exist'


def test_fine_tuning_may_lack_keys(here):
    write(here, 'pretrained.pth', '')
    cfg = Config.fromfile('det.py')
    cfg.load_from = 'pretrained.pth'
    set_resume(cfg, None)
    assert (cfg.resume, cfg.load_from) == (False, 'pretrained.pth')


def test_a_checkpoint_is_missed_before_data_are_read(refuse):
    """Which may take long, and may be wrong as well."""
    options = ['--cfg-options', 'test_dataloader.dataset.data_root=nowhere']
    line = refuse('test', 'seg.py', 'gone.pth', *options)
    assert line == 'checkpoint gone.pth does not exist'


# Options of test.py


@pytest.mark.parametrize(
    'host, options, said',
    [
        ('det', ['--out', 'labels'], '.pkl or .pickle'),
        ('seg', ['--out', 'det.py'], 'this is a file'),
        ('seg', ['--out', 'o.pkl'], 'expected the name of a folder'),
        (
            'seg',
            [
                '--out',
                'o',
                '--cfg-options',
                'test_evaluator.type=DumpResults',
            ],
            'no metric in test_evaluator',
        ),
        ('seg', ['--tta', '--cfg-options', 'tta_model=None'], 'no tta_model'),
        (
            'seg',
            ['--tta', '--cfg-options', 'tta_pipeline=None'],
            'no tta_pipeline',
        ),
        (
            'det',
            ['--show-dir', 'o', '--cfg-options', 'default_hooks=None'],
            'default_hooks.visualization',
        ),
        (
            'det',
            ['--out', 'o.pkl', '--cfg-options', 'default_scope=mmengine'],
            "default_scope='mmengine'",
        ),
        ('seg', ['--tile', '32'], "mode='slide'"),
        ('det', ['--tile', '100'], 'overlap must be less than tile=100'),
        (
            'det',
            [
                *('--tile', '160', '--cfg-options'),
                'model.backbone.blocks=[]',
            ],
            'with context=None',
        ),
    ],
)
def test_options_of_test(refuse, weights, host, options, said):
    line = refuse('test', f'{host}.py', weights(host=host), *options)
    assert said in line


@pytest.mark.parametrize(
    'model, path',
    [
        (dict(roi_head=dict(mask_head=dict())), 'model.roi_head.mask_head'),
        (dict(bbox_head=dict(type='RTMDetInsHead')), 'model.bbox_head'),
        (dict(roi_head=dict(mask_head=None)), None),
    ],
)
def test_masks_of_mirror_images(model, path):
    """No host merges them; a model of the user's own may."""
    cfg = Config(dict(model=dict(model, backbone=dict(type='ResNet'))))
    data = ConfigDict(pipeline=[dict(type='PackDetInputs')])
    defaults = HOSTS['mmdet'].tta_defaults
    if path:
        with pytest.raises(
            cli.StartError, match=f'--tta: .* {path} of config'
        ):
            defaults(cfg, data)
        cfg.tta_model = dict(type='MyTTAModel')
    assert defaults(cfg, data)['tta_model']['type'] == 'DetTTAModel'


@pytest.mark.parametrize(
    'host, out', [('det', 'det.py/o.pkl'), ('det', 'o.pkl'), ('seg', 'o/x')]
)
def test_results_that_can_not_be_written(here, refuse, weights, host, out):
    """Said before the evaluation, not after it."""
    if out == 'o.pkl':
        (here / out).mkdir()
    elif host == 'seg':
        write(here, 'o', '')
    line = refuse('test', f'{host}.py', weights(host=host), '--out', out)
    assert line.startswith(f'--out {out} can not be written: ')


def test_work_dir_that_can_not_be_made(refuse, weights):
    args = ('test', 'det.py', weights(), '--work-dir', 'seg.py/work')
    assert refuse(*args).startswith('work_dir seg.py/work can not be written')


@pytest.mark.parametrize(
    'host, option',
    [('det', '--show-dir'), ('seg', '--show-dir'), ('seg', '--out')],
)
def test_two_pictures_of_one_name(here, refuse, weights, host, option):
    """Both hosts name a drawing, mmseg a label map, as the picture alone."""
    pictures = [f'data/{host}/img/{folder}/0.png' for folder in 'ab']
    for folder in 'ab':
        for part in ('img', 'ann')[: 1 + (host == 'seg')]:
            os.makedirs(f'data/{host}/{part}/{folder}')
            shutil.copy(
                f'data/{host}/{part}/0.png', f'data/{host}/{part}/{folder}'
            )
    if host == 'det':
        coco = json.loads((here / 'data/det/ann.json').read_text())
        for image, name in zip(coco['images'], ('a/0.png', 'b/0.png')):
            image['file_name'] = name
        write(here, 'data/det/ann.json', json.dumps(coco))
    else:
        os.remove('data/seg/img/0.png')
        os.remove('data/seg/ann/0.png')
    # A logger is kept by config and second, mmseg's visualizer anyway, with
    # its folder.
    config = write(here, f'mine{option}.py', f"_base_ = '{host}.py'")
    args = ('test', config, weights(host=host), option, here / 'o')
    line = refuse(*args, work_dir_made=True)
    name = '0' if option == '--out' else '0.png'
    assert line == (
        f'{option}: {pictures[0]} and {pictures[1]} would both be written to '
        f'one file {name}: test them one after the other'
    )


# A distributed job


def test_distributed_job_says_it_once(place, start, finish, free_port):
    before = sorted(place.iterdir())
    done = finish(start('dist_train.sh', 'nope.py', 2, PORT=free_port()))
    assert done.code == 2
    assert done.err == (
        'train.py: error: config nope.py does not exist, and polynl_mm has '
        'none of that name\n'
    )
    assert done.out == ''
    assert sorted(place.iterdir()) == before


def test_port_in_use(start, finish, free_port):
    import socket

    with socket.socket() as other:
        other.bind(('127.0.0.1', 0))
        other.listen()
        port = str(other.getsockname()[1])
        done = finish(start('dist_train.sh', 'det.py', 1, PORT=port))
    assert done.code == 2
    assert done.err.startswith(f'torchrun.py: error: port {port} is in use')
    assert done.err.count('\n') == 1


@pytest.mark.parametrize(
    'config, options, said',
    (
        (
            'det.py',
            (
                'model.backbone.into=CSPDarknet',
                "model.backbone.plugins=[dict(type='polynl_mm.PolyNL2d')]",
            ),
            "CSPDarknet takes none: leave it out and write type='polynl_mm."
            "Insert', into='CSPDarknet', blocks=[dict(after=..., cfg=...)]",
        ),
        (
            'seg.py',
            ('model.backbone.depth=18',),
            'ResNetV1c of depth 18 has no bottlenecks: leave it out and write '
            "type='polynl_mm.Insert', into='ResNetV1c', blocks=[dict("
            'after=..., cfg=...)]',
        ),
    ),
)
def test_plugins_where_there_is_no_place(refuse, config, options, said):
    line = refuse('train', config, '--cfg-options', *options)
    assert line == f'config {config}: model.backbone.plugins: {said}'


@pytest.mark.parametrize(
    'change, said',
    [
        (
            dict(position='after_conv4'),
            ".position='after_conv4', expected one of after_conv1, "
            'after_conv2, after_conv3',
        ),
        (dict(position=None), '.position=None, expected one of after_conv1, '),
        (
            dict(stages=(False, True)),
            '.stages=(False, True), expected one of True or False for each of '
            '4 stages',
        ),
        (
            dict(cfg=dict(type='polynl_mm.PolyNL2D')),
            ".cfg.type='polynl_mm.PolyNL2D' is not registered, expected a "
            "type such as 'polynl_mm.PolyNL2d'",
        ),
        (
            dict(cfg=dict(type='ContextBlok')),
            ".cfg.type='ContextBlok' is not registered, expected a type such "
            "as 'ContextBlock'",
        ),
    ],
)
def test_plugins_of_no_such_kind(change, said):
    good = dict(
        cfg=dict(type='polynl_mm.PolyNL2d'),
        stages=(False, False, True, False),
        position='after_conv3',
    )
    plugins = [good, {**good, **change}]
    backbone = dict(type='ResNet', depth=50, plugins=plugins)
    cfg = Config(dict(default_scope='mmdet', model=dict(backbone=backbone)))
    with pytest.raises(cli.StartError) as caught:
        checks.check_plugins(cfg)
    assert f'model.backbone.plugins.1{said}' in str(caught.value)
    cfg.model.backbone.plugins.pop()
    checks.check_plugins(cfg)
