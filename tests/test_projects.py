"""The studies run, and compare what they say they compare."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('mmcv')
pytest.importorskip('matplotlib')

from benchmarks.timing import flops  # noqa: E402
from mmengine.registry import DefaultScope  # noqa: E402

from polynl_mm import PolyNL2d  # noqa: E402
from polynl_mm.padding import Pictures, pictures_in  # noqa: E402

SCALING = Path(__file__).parents[1] / 'projects' / 'scaling' / 'scaling.py'


@pytest.fixture
def scaling(monkeypatch):
    monkeypatch.setattr(sys, 'path', list(sys.path))
    return runpy.run_path(str(SCALING))


def rivals(scaling, *names):
    torch.manual_seed(0)
    blocks = [scaling['BLOCKS'][name](16).eval() for name in names]
    for p in blocks[0].parameters():
        torch.nn.init.normal_(p, std=0.5)
    for block in blocks:
        block.load_state_dict(blocks[0].state_dict())
    return blocks


def test_attention_without_its_matrix_is_nonlocal2d(scaling):
    plain, sdpa = rivals(scaling, 'NonLocal2d', 'NonLocal2d, SDPA')
    x = torch.randn(2, 16, 5, 3)
    with torch.no_grad():
        y = plain(x)
        torch.testing.assert_close(sdpa(x), y)
    assert (y - x).abs().max() > 0.1


def test_efficient_attention(scaling):
    (block,) = rivals(scaling, 'efficient attention')
    x = torch.randn(1, 16, 3, 2)
    with torch.no_grad():
        q, k, v = (
            conv(x).reshape(8, 6) for conv in (block.theta, block.phi, block.g)
        )
        expected = torch.zeros(8, 6)
        for i in range(6):
            for j in range(6):
                weights = [
                    q[:, i].exp()[d]
                    / q[:, i].exp().sum()
                    * (k[d, j].exp() / k[d].exp().sum())
                    for d in range(8)
                ]
                expected[:, i] += sum(weights) * v[:, j]
        expected = x + block.conv_out(expected.reshape(1, 8, 3, 2))
        torch.testing.assert_close(block(x), expected)


def test_operations(scaling):
    def count(name, c, n, mode='forward'):
        args = SimpleNamespace(device='cpu', dtype='float32')
        return scaling['count'](name, c, n, mode, args)

    c, n = 32, 64
    base = 2 * n * c * c // 4
    assert count('no block', c, n) == base
    assert count('Poly-NL, direct', c, n) == base + 2 * 3 * n * c**2
    # Beyond what fits: four projections to half the channels, two products.
    for n in (1024, 2**18):
        expected = 2 * n * c * c // 4 + 2 * (4 * n * c * c // 2)
        expected += 2 * 2 * n**2 * c // 2
        assert count('NonLocal2d, SDPA', c, n) == expected
    args = SimpleNamespace(device='cpu', dtype='float32')
    call = scaling['make_call']('NonLocal2d', c, 1024, 'training', args)
    assert count('NonLocal2d', c, 1024, 'training') == flops(call)


def test_what_is_left_out(scaling):
    def fits(name, n):
        return scaling['fits'](name, 256, n, 'cpu')

    for name in ('Poly-NL, direct', 'ContextBlock', 'efficient attention'):
        assert fits(name, 512**2)
    for name in ('NonLocal2d', 'NonLocal2d, SDPA'):
        assert fits(name, 64**2) and not fits(name, 512**2)


@pytest.mark.long
def test_layers_of_small_sizes(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCALING), '--out', str(tmp_path)]
        + ['--positions', '64', '256', '--channels', '32', '64']
        + ['--seconds', '0.01', '--parts', 'layers'],
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    cases = json.loads((tmp_path / 'layers.json').read_text())['cases']
    sizes = [(case['c'], case['n'], case['mode']) for case in cases]
    assert sizes == [
        (c, n, mode)
        for c, n in ((32, 64), (32, 256), (64, 64))
        for mode in ('forward', 'training')
    ]
    for case in cases:
        assert len(case['contenders']) == 8
        for figures in case['contenders'].values():
            assert figures['seconds'][0] > 0 and figures['flops'] > 0
        assert case['contenders']['no block']['relative'] == [1, 0]
    assert 'forward: GFLOP/s' in done.stdout
    assert '| 64 | 64 |' in done.stdout
    for axis in 'nc':
        picture = (tmp_path / f'against_{axis}.svg').read_text()
        assert 'Poly-NL, fused' in picture


def test_models_as_the_tool_takes_them(scaling, monkeypatch, tmp_path):
    pytest.importorskip('mmdet')
    pytest.importorskip('mmseg')
    root = SCALING.parents[2]
    tool = runpy.run_path(str(root / 'tools' / 'benchmark_model.py'))
    calls = []

    def run(command, cwd, **kwargs):
        assert command[1] == 'tools/benchmark_model.py' and cwd == root
        monkeypatch.setattr(sys, 'argv', command[1:])
        calls.append(tool['parse_args']())
        return subprocess.CompletedProcess(command, 0, stdout='')

    monkeypatch.setattr(subprocess, 'run', run)
    args = SimpleNamespace(out=tmp_path, device='cpu')
    scaling['measure_models'](args)
    assert [args.shape for args in calls] == [
        *([512, 512], [800, 1344], [800, 1344])
    ]
    assert [args.modes for args in calls] == [
        *(('forward',), ('forward',), ['training'])
    ]
    for args in calls:
        assert args.fuse and len(args.configs) >= 3
        assert Path(args.json).parent == tmp_path
        for config in args.configs:
            assert (root / config).exists()


def test_bars_by_placement(scaling, tmp_path):
    row = dict(
        contenders={
            scaling['COCO'].format(config) + variant: dict(
                relative=dict(forward=[value, 0.01]),
                multiply_adds=value * 1e9,
                forward=[value, 2 * value, value],
            )
            for config, variant, value in (
                ('plain', '', 1),
                ('plain', ' (conv-bn)', 0.7),
                ('polynl-c4', '', 1.375),
                ('polynl-c4', ' (fused)', 1.125),
                ('polynl-c4', ' (fused, conv-bn)', 0.875),
                ('gc-res4', '', 1.25),
            )
        }
    )
    small = dict(contenders=dict(row['contenders']))
    del small['contenders'][scaling['COCO'].format('gc-res4')]
    table = scaling['backbones_table']([row, small])
    c4 = 'every block of c4'
    for line in (
        '| plain | 1.0 | 1.00 ± 0.00 | 1.00 ± 0.00 |',
        f'| Poly-NL, {c4} | 1.4 | 1.38 ± 0.00 |  | 1.4 | 1.38 ± 0.00 |  |',
        f'| Poly-NL, fused, {c4} | 1.1 | 1.12 ± 0.00 | 1.25 ± 0.00 | 1.1 |',
        '| ContextBlock, end of res4 | 1.2 | 1.25 ± 0.00 |  | left out |',
    ):
        assert line in table
    assert table.endswith('(conv-bn): 700 ± 175 ms')
    scaling['draw_models']([row, small], tmp_path / 'bars.svg')
    picture = (tmp_path / 'bars.svg').read_text()
    for text in (
        *('every block of c4: Poly-NL, fused', 'end of res4: ContextBlock'),
        *('1.38', '1.12', '1.25'),
    ):
        assert picture.count(text), text
    assert '0.88' not in picture and '0.87' not in picture


# -------------------------------------------------------------------- windows


@pytest.fixture
def windows(monkeypatch):
    pytest.importorskip('mmseg')
    monkeypatch.setattr(sys, 'path', list(sys.path))
    folder = SCALING.parents[1] / 'windows'
    names = ('study', 'cost')
    return SimpleNamespace(
        **{name: runpy.run_path(str(folder / f'{name}.py')) for name in names}
    )


def test_windows_have_parts_of_the_same_features(windows):
    features = windows.cost['features']
    whole = features((0, 0, 64, 48), 16)
    assert whole.shape == (1, 16, 6, 8) and whole.std() > 0.1
    part = features((24, 16, 64, 48), 16)
    torch.testing.assert_close(part, whole[..., 2:, 3:])


class Head(torch.nn.Module):
    in_channels, num_classes = 4, 8

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(4, 8, 1)
        self.poly_nl = PolyNL2d(8, beta_init=1.0)
        self.runs = 0

    def forward(self, inputs):
        self.runs += 1
        return self.poly_nl(self.conv(inputs[3]))


def test_costs_are_of_the_ways_that_they_name(windows):
    torch.manual_seed(0)
    head, found, runs = Head(), {}, {}
    with torch.no_grad():
        for way in windows.cost['WAYS']:
            head.runs = 0
            args = (head, (64, 128), 32, 8, way)
            found[way] = windows.cost['compute'](*args)
            runs[way] = head.runs
    own, whole = found.pop('windows, own context'), found.pop('whole')
    for way, y in found.items():
        torch.testing.assert_close(y, whole, msg=way)
    assert (own - whole).abs().max() > 1e-3
    assert runs['whole'] == 1
    assert runs['windows, none held'] == 2 * runs['windows, held'] == 30


def test_the_table_of_windows(windows):
    study = windows.study
    cases = study['settings'](one_context=True)
    assert len(cases) == 1 + 2 * len(study['WINDOWS'])
    found = [
        {case: base + 10 * ('context' in cfg) for case, cfg in cases.items()}
        for base in (50, 54)
    ]
    table = study['told'](found).splitlines()
    assert table[2] == '| whole image | 52.0 ± 2.8 |  |'
    assert table[3] == '| 192×128, stride 64 | 52.0 ± 2.8 | 62.0 ± 2.8 |'
    alone = [dict.fromkeys(study['settings'](one_context=False), 1.0)]
    row = study['told'](alone).splitlines()[3]
    assert row == '| 192×128, stride 64 | 1.0 | has none |'


# ---------------------------------------------------------------- recognition


@pytest.fixture
def recognition(monkeypatch):
    pytest.importorskip('mmdet')
    monkeypatch.setattr(sys, 'path', list(sys.path))
    file = SCALING.parents[1] / 'recognition' / 'study.py'
    return SimpleNamespace(**runpy.run_path(str(file)))


@pytest.fixture
def digits(tmp_path):
    from mini_data.image_folders import digits

    digits(tmp_path, 0, dict(train=40, val=20))
    return tmp_path


def test_blocks_are_compared_at_one_place(recognition, digits):
    from mmengine.registry import MODELS

    # What a block calls itself.
    names = ['se_layer', 'context_block', 'nonlocal_block', 'poly_nl']
    plain = None
    for block, name in zip(recognition.BLOCKS, [None, *names]):
        cfg = recognition.settings(str(digits), block, 0.01, 7)
        assert cfg.optim_wrapper.optimizer.lr == 0.01
        assert cfg.randomness.seed == 7
        keys = set(MODELS.build(cfg.model).state_dict())
        plain = plain or keys
        added = {key.split('.')[:4][-1] for key in keys - plain}
        assert plain <= keys and added == ({name} if name else set())


def test_tuning_does_not_see_val(recognition, digits):
    from mmengine.registry import DATASETS

    cfg = recognition.settings(str(digits), 'none', 0.01, 0)
    recognition.hold_out(cfg, 0)
    parts = []
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        data = DATASETS.build(dict(loader.dataset, pipeline=[]))
        parts.append({each['img_path'] for each in data})
        labels = [each['gt_label'] for each in data]
        assert sorted(labels) == [k for k in range(10) for _ in range(2)]
    assert not parts[0] & parts[1]
    assert all('/train/' in path for path in parts[0] | parts[1])


def test_the_table_of_recognition(recognition):
    found = {}
    for block in recognition.BLOCKS:
        for rate in recognition.RATES:
            for seed in recognition.TUNING_SEEDS:
                # Two rates are equally good: the lower one is taken.
                good = rate in (0.003, 0.01)
                found[f'tuning {block} {rate} {seed}'] = 90 + good
        for seed, value in zip(recognition.SEEDS, (90, 91, 92, 93, 94)):
            found[f'final {block} 0.003 {seed}'] = value
    # Student's t of 4 degrees of freedom is 2.776, times sqrt(2.5 / 5).
    row = '| Poly-NL | 0.003 | 92.0 ± 2.0 | 90.0, 91.0, 92.0, 93.0, 94.0 |'
    assert recognition.told(found).splitlines()[-1] == row


# -------------------------------------------------------------------- padding


@pytest.fixture
def padding(monkeypatch):
    pytest.importorskip('mmdet')
    monkeypatch.setattr(sys, 'path', list(sys.path))
    file = SCALING.parents[1] / 'padding' / 'study.py'
    return SimpleNamespace(**runpy.run_path(str(file)))


def test_padding_counts_where_it_is_to(padding):
    layer, x = PolyNL2d(4, beta_init=1.0), torch.randn(1, 4, 6, 8)
    outside = layer(x)
    with pictures_in(Pictures((6, 8), [(6, 5)])), torch.no_grad():
        inside = layer(x)
        with padding.padding(True):
            assert layer(x).equal(inside)
        with padding.padding(False):
            assert layer(x).equal(outside)
        assert layer(x).equal(inside)
    assert (inside - outside).abs().max() > 1e-3


def test_neighbours_come_in_three_sizes(padding):
    cfg = padding.settings(0, 'data', 'work')
    kinds = [each.type for each in cfg.test_dataloader.dataset.pipeline]
    assert kinds[1] == 'ResizeByTurns' and 'Resize' not in kinds[2:]
    with DefaultScope.overwrite_default_scope('mmdet'):
        resize = padding.ResizeByTurns()
    image = np.zeros((20, 40, 3), np.uint8)
    shapes = [
        resize(dict(img=image, sample_idx=i))['img'].shape[:2]
        for i in range(4)
    ]
    assert shapes == [(14, 28), (20, 40), (28, 56), (14, 28)]


def test_the_table_of_padding(padding):
    cases = {
        (kind, way, *batch): 0.5 + 0.1 * way
        for kind in padding.KINDS
        for way in ((True,) if kind is None else padding.WAYS)
        for batch in padding.BATCHES
    }
    found = [cases, {case: value + 0.01 for case, value in cases.items()}]
    lines = padding.told(found).splitlines()
    assert lines[0].endswith('| batch 8 | batch 8, other order | batch 24 |')
    one = "a picture's own positions"
    two = 'padding in the mean'
    assert [line.split(' | ')[:3] for line in lines[2:]] == [
        [f'| {one}', one, '0.6050 ± 0.0071'],
        [f'| {one}', two, '0.5050 ± 0.0071'],
        [f'| {two}', one, '0.6050 ± 0.0071'],
        [f'| {two}', two, '0.5050 ± 0.0071'],
        ['| no blocks', '', '0.6050 ± 0.0071'],
    ]
    assert padding.told(found[:1]).splitlines()[2].count('| 0.6000 ') == 4


# ------------------------------------------------------------------ attention


def test_seeds_of_attention_are_of_the_better_rate(tmp_path, monkeypatch):
    pytest.importorskip('mmdet')
    monkeypatch.setattr(sys, 'path', list(sys.path))
    file = SCALING.parents[1] / 'attention' / 'study.py'
    study = runpy.run_path(str(file))
    values = {(0.002, 0): 3, (0.006, 0): 5, (0.006, 1): 7, (0.006, 2): 9}
    found = {
        f'cityscapes | Poly-SA, mean | {rate} | {seed}': dict(
            value=value, seconds=value, parameters=1234
        )
        for (rate, seed), value in values.items()
    }
    (tmp_path / 'found.json').write_text(json.dumps(found))
    args = SimpleNamespace(
        json=tmp_path / 'found.json',
        tasks=['cityscapes'],
        seeds=[0, 1, 2],
        rates=[0.002, 0.006],
    )
    row = study['Study'](args).row('cityscapes', 'Poly-SA, mean')
    assert row[1:] == ['0.006', '7.0', '5.0 to 9.0', '1,234', '7']


# ------------------------------------------------------------- influence


def test_study_of_influence(tmp_path, quiet_and_quick):
    """Its measures, where they are known: of areas, and of no attention."""
    pytest.importorskip('mmseg')
    pytest.importorskip('cityscapesscripts')
    from mini_data.cityscapes import cityscapes

    cityscapes(tmp_path, 0, dict(train=2, val=2))
    study = runpy.run_path(str(SCALING.parents[1] / 'influence/study.py'))
    labels = [each for _, each in study['pictures'](tmp_path, 'val')]
    area = np.mean([np.isin(each, (6, 7)).mean() for each in labels])
    assert 0.02 < area < 0.2
    cfg, model = study['network']('polynl_mm.PolyNLHead', None)
    study['drawn_anew'](model)
    compared = {
        'branch': (cfg, model, False),
        'two': (cfg, model, True),
        'even': (*study['network']('NLHead', None), False),
    }
    rows = study['measured'](compared, tmp_path, 2, 8)
    assert rows[0][:3] == ['area', f'{area:.1%}', '1.0']
    assert [row[0] for row in rows[1:]] == [*compared]
    # Attention that has learnt nothing is even.
    assert float(rows[3][2]) == pytest.approx(1, abs=0.05)
    assert rows[3][5:] == [
        f'+{rows[0][3]}',
        f'{1 - float(rows[0][3][:-1]) / 100:+.1%}',
    ]
    for row in rows[1:3]:
        there, elsewhere = (float(value[:-1]) for value in row[5:])
        assert abs(there) + abs(elsewhere) <= 100.1
        assert 0 < float(row[1][:-1]) <= float(row[3][:-1]) < 100
    for each in labels:
        for x, y in study['points_of'](each, 2, np.random.default_rng(0)):
            assert each[y, x] in (0, 1, 2, 3, 8, 9)


def test_a_part_is_left_out_of_the_mean():
    study = runpy.run_path(str(SCALING.parents[1] / 'influence/study.py'))
    part = np.zeros((8, 8), bool)
    part[:4, :4] = True
    layer = PolyNL2d(3, beta_init=1.0)
    x = torch.randn(1, 3, 4, 4)
    layer.around = study['leaving_out'](part)
    y = layer(x)
    x[:, :, :2, :2] = 7  # what is left out may be anything
    rest = layer(x)
    torch.testing.assert_close(y[..., 2:, :], rest[..., 2:, :])


# ----------------------------------------------------------------- deployment


@pytest.fixture
def deployment(monkeypatch):
    pytest.importorskip('mmdet')
    pytest.importorskip('onnxruntime')
    pytest.importorskip('onnx')
    monkeypatch.setattr(sys, 'path', list(sys.path))
    folder = SCALING.parents[1] / 'deployment'
    monkeypatch.syspath_prepend(str(folder))
    names = ('quantise', 'parity', 'detect')
    return SimpleNamespace(
        **{name: runpy.run_path(str(folder / f'{name}.py')) for name in names}
    )


def test_pictures_are_prepared_as_by_the_host(deployment):
    from mmdet.models import DetDataPreprocessor

    facts = dict(mean=[120, 110, 100], std=[60, 50, 55], bgr_to_rgb=True)
    facts['pad_value'] = 7
    host = DetDataPreprocessor(pad_size_divisor=16, **facts)
    picture = np.random.default_rng(0).integers(0, 255, (20, 33, 3), np.uint8)
    batch = dict(inputs=[torch.from_numpy(picture).permute(2, 0, 1)])
    want = host(batch)['inputs']
    got = deployment.detect['prepare'](
        picture, dict(facts, pad_size_divisor=16, resize={})
    )
    assert got.dtype == np.float32 and got.shape == (1, 3, 32, 48)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    'resize',
    [
        dict(scale=(160, 215), keep_ratio=True),
        dict(scale=(64, 64), keep_ratio=True),
        dict(scale=(50, 40)),
        dict(scale=(50, 40), interpolation='area'),
        dict(scale_factor=1.5),
        dict(scale_factor=3.0, max_side=100),
        dict(scale_factor=1.0, max_side=4096),
    ],
    ids=str,
)
@pytest.mark.parametrize('size', [(20, 33), (71, 52)])
def test_pictures_are_resized_as_by_the_pipeline(deployment, resize, size):
    from polynl_mm.faces.transforms import Resize

    pixels = np.random.default_rng(0).integers(0, 255, (*size, 3), np.uint8)
    # As from JSON.
    read = json.loads(json.dumps(resize))
    facts = dict(mean=[0] * 3, std=[1] * 3, bgr_to_rgb=False, resize=read)
    facts.update(pad_value=0, pad_size_divisor=1)
    want = Resize(**resize)(dict(img=pixels, img_shape=size))
    got = deployment.detect['prepare'](pixels, facts)
    np.testing.assert_array_equal(got[0].transpose(1, 2, 0), want['img'])

    def run(names, feeds):
        """What stands at the corners of the resized picture."""
        height, width = feeds['input'].shape[2:]
        box = np.float32([[[0, 0, width, height, 1]]])
        points = np.float32([[[[width, height]] * 5]])
        return box, np.zeros((1, 1), int), points

    dets, _, points = deployment.detect['detect'](
        SimpleNamespace(run=run), facts, pixels
    )
    corner = size[::-1]
    np.testing.assert_allclose(dets, [[0, 0, *corner, 1]], rtol=1e-6)
    np.testing.assert_allclose(points, [[corner] * 5], rtol=1e-6)


def test_what_is_quantised_is_what_is_named(deployment):
    from onnx import helper

    nodes = [
        helper.make_node(kind, ['x'], ['y'], name)
        for kind, name in (
            ('Conv', '/backbone/layer3/layer3.0/conv3/Conv'),
            ('MatMul', '/backbone/layer3/layer3.0/poly_nl/MatMul'),
            ('Conv', '/backbone/layer3/layer3.0/poly_nl/Conv'),
            ('Conv', '/bbox_head/conv_cls.0/Conv'),
            ('Exp', '/Exp'),
        )
    ]
    parts = deployment.quantise['parts']
    found = parts(helper.make_graph(nodes, 'some', [], []))
    assert {key: value and len(value) for key, value in found.items()} == {
        'nothing (float32)': None,
        'the network without blocks': 2,
        'the whole network': 4,
        'blocks alone': 2,
        'all, decoding and NMS as well': 5,
    }
    with pytest.raises(ValueError, match='without --fuse'):
        parts(helper.make_graph(nodes[-2:], 'some', [], []))


def test_models_of_the_table_have_branches_that_matter(deployment):
    layer, x = PolyNL2d(4), torch.randn(2, 4, 5, 6)
    with torch.no_grad():
        deployment.parity['set_beta'](layer, (x,))
        branch = layer(x) - layer.alpha * x
    assert abs((branch.std() / x.std()).item() - 0.4) < 1e-4


# -------------------------------------------------------------- tutorial


def test_tutorial(tmp_path):
    """Every cell, with a training of three iterations."""
    for name in ('mmseg', 'cityscapesscripts', 'onnx', 'onnxruntime'):
        pytest.importorskip(name)
    book = SCALING.parents[1] / 'tutorial/tutorial.ipynb'
    cells = json.loads(book.read_text())['cells']
    code = '\n'.join(
        ''.join(cell['source'])
        for cell in cells
        if cell['cell_type'] == 'code'
    )
    for old, new in (
        ('ITERATIONS = 800', 'ITERATIONS = 3'),
        ("Path('work_dirs/tutorial')", f'Path({str(tmp_path)!r})'),
        ("'--seed', 0)", "'--seed', 0, '--train', 4, '--val', 4)"),
        # There need be no Jupyter.
        (
            'from IPython.display import Image, display',
            'Image = display = str',
        ),
    ):
        assert code.count(old) == 1
        code = code.replace(old, new)
    (tmp_path / 'tutorial.py').write_text(code)
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', tmp_path / 'tutorial.py'],
        cwd=book.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert 'the same: True' in done.stdout
    assert '6 of 6 Poly-NL layers fused' in done.stdout
    assert 'same classes: 100.00%' in done.stdout
    for name in ('curves.png', 'street.onnx'):
        assert (tmp_path / name).is_file()
