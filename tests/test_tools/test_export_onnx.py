"""Whole models as ONNX files: what torch computes, at other sizes as well."""

import json
import runpy
import sys
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('mmdet')
pytest.importorskip('mmseg')
onnxruntime = pytest.importorskip('onnxruntime')
onnx = pytest.importorskip('onnx')

from helpers import OLD_TORCH, calibrate, layers_of, randomize  # noqa: E402
from mmdet.models.dense_heads import AnchorHead  # noqa: E402
from mmdet.models.utils import filter_scores_and_topk  # noqa: E402
from mmengine.config import Config, ConfigDict  # noqa: E402
from mmengine.registry import MODELS, DefaultScope  # noqa: E402
from mmengine.structures import InstanceData  # noqa: E402
from torch import nn  # noqa: E402

from polynl_mm.engine import cli, export  # noqa: E402
from polynl_mm.engine.cli import StartError  # noqa: E402
from polynl_mm.engine.culprit import culprit  # noqa: E402
from polynl_mm.engine.nms import append_nms  # noqa: E402
from polynl_mm.fusion import fuse_poly_nl  # noqa: E402

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / 'tools'


# The newer exporter takes ten times as long.
LONG = pytest.param(
    *(True, 'dynamo'),
    marks=[
        pytest.mark.long,
        pytest.mark.skipif(OLD_TORCH, reason='came of age in 2.5'),
    ],
)
BACKBONE = """
_base_ = 'mmdet::_base_/default_runtime.py'
backbone = dict(
    type='ResNet', depth=18, base_channels=4, num_stages=2, strides=(1, 2),
    dilations=(1, 1), out_indices=(0, 1), zero_init_residual=False)
fpn = dict(
    type='polynl_mm.Insert', into='FPN', in_channels=[4, 8], out_channels=12,
    num_outs=2, blocks=[dict(
        after='lateral_convs.*', cfg=dict(type='polynl_mm.PolyNL2d'))])
pre = dict(
    type='DetDataPreprocessor', mean=[120., 110., 100.], std=[60., 50., 55.],
    bgr_to_rgb=True, pad_size_divisor=16)
anchors = dict(
    type='AnchorGenerator', octave_base_scale=3, scales_per_octave=1,
    ratios=[1., 2.], strides=[4, 8])
coder = dict(type='DeltaXYWHBBoxCoder', target_stds=[.1, .1, .2, .2])
cls = dict(type='CrossEntropyLoss', use_sigmoid=True)
"""
FACES = (
    BACKBONE
    + """
model = dict(
    type='SingleStageDetector', data_preprocessor=pre, backbone=backbone,
    neck=[fpn, dict(type='SSH', num_scales=2, in_channels=[12, 12],
                    out_channels=[12, 12])],
    bbox_head=dict(
        type='polynl_mm.RetinaFaceHead', in_channels=12,
        anchor_generator=anchors, bbox_coder=coder, loss_cls=cls,
        loss_bbox=dict(type='L1Loss'), loss_landmark=dict(type='L1Loss'),
        loss_iou=cls),
    test_cfg=dict(
        nms_pre=300, score_thr=.4, min_bbox_size=0, min_height=8,
        nms=dict(type='nms', iou_threshold=.4), max_per_img=-1))
"""
)
RESIZE = """
test_dataloader = dict(dataset=dict(type='RepeatDataset', dataset=dict(
    type='WIDERFaceDataset', pipeline=[
        dict(type='LoadImageFromFile'),
        dict(type='mmdet.Resize', scale=(96, 72), keep_ratio=True)])))
"""
RTMDET = (
    BACKBONE
    + """
model = dict(
    type='RTMDet', data_preprocessor=pre, backbone=backbone, neck=fpn,
    bbox_head=dict(
        type='RTMDetSepBNHead', num_classes=3, in_channels=12,
        feat_channels=8, stacked_convs=1, share_conv=True,
        anchor_generator=dict(
            type='MlvlPointGenerator', offset=0, strides=[4, 8]),
        bbox_coder=dict(type='DistancePointBBoxCoder'),
        loss_cls=dict(type='QualityFocalLoss', use_sigmoid=True),
        loss_bbox=dict(type='GIoULoss')),
    test_cfg=dict(
        nms_pre=200, score_thr=.3, min_bbox_size=0,
        nms=dict(type='nms', iou_threshold=.6), max_per_img=30))
"""
)
ATSS = (
    BACKBONE
    + """
model = dict(
    type='ATSS', data_preprocessor=pre, backbone=backbone, neck=fpn,
    bbox_head=dict(
        type='ATSSHead', num_classes=3, in_channels=12, feat_channels=8,
        stacked_convs=1, norm_cfg=dict(type='GN', num_groups=2),
        anchor_generator=dict(
            type='AnchorGenerator', octave_base_scale=3, scales_per_octave=1,
            ratios=[1.], strides=[4, 8]),
        bbox_coder=coder, loss_centerness=cls,
        loss_cls=dict(type='FocalLoss', use_sigmoid=True),
        loss_bbox=dict(type='GIoULoss')),
    test_cfg=dict(
        nms_pre=200, score_thr=.5, min_bbox_size=0,
        nms=dict(type='nms', iou_threshold=.6), max_per_img=60))
"""
)
TWO_STAGES = (
    BACKBONE
    + """
model = dict(
    type='FasterRCNN', data_preprocessor=pre, backbone=backbone, neck=fpn,
    rpn_head=dict(
        type='RPNHead', in_channels=12, feat_channels=8,
        anchor_generator=anchors, bbox_coder=coder, loss_cls=cls,
        loss_bbox=dict(type='L1Loss')),
    roi_head=dict(type='StandardRoIHead'),
    train_cfg=dict(rpn=None, rpn_proposal=None, rcnn=None),
    test_cfg=dict(rpn=None, rcnn=None))
"""
)
SEGMENTS = """
default_scope = 'mmseg'
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(type='SegDataPreProcessor'),
    backbone=dict(
        type='mmdet.ResNet', depth=18, base_channels=4, num_stages=2,
        strides=(1, 2), dilations=(1, 1), out_indices=(1,)),
    decode_head=dict(
        type='polynl_mm.PolyNLHead', in_channels=8, in_index=0, channels=8,
        num_classes=3, align_corners=False, norm_cfg=dict(type='BN'),
        loss_decode=dict(type='CrossEntropyLoss')),
    test_cfg=dict(mode='whole'))
"""
CLASSES = """
default_scope = 'polynl_mm'
model = dict(
    type='polynl_mm.Classifier', in_channels=8, num_classes=5,
    data_preprocessor=dict(type='polynl_mm.ClsDataPreprocessor'),
    backbone=dict(
        type='mmdet.ResNet', depth=18, base_channels=4, num_stages=2,
        strides=(1, 2), dilations=(1, 1), out_indices=(1,)))
"""


def config(folder, text, name='some.py'):
    (folder / name).write_text(text)
    return Config.fromfile(folder / name)


def trained(cfg, fuse=False):
    """What is exported of a model that is as if trained."""
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model).eval()
    randomize(model)
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv2d):
            continue
        # Hosts let all scores begin at one value, and boxes at no size.
        if name.endswith(
            ('conv_cls', 'conv_cls.0', 'rtm_cls.0', 'rtm_cls.1', 'atss_cls')
        ):
            nn.init.normal_(module.weight, std=0.02)
        if 'rtm_reg' in name:
            nn.init.constant_(module.bias, 2.0)
    if layers_of(model):
        calibrate(export.to_export(cfg, model), torch.randn(1, 3, 64, 64))
    if fuse:
        _, report = fuse_poly_nl(model)
        assert report.fused and not report.left
    return export.to_export(cfg, model)


def pictures(*shapes):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(b, 3, *s, generator=generator) for b, *s in shapes]


def assert_equal(module, program, *inputs):
    found = export.verify(module, program, inputs)
    for each in found:
        assert each.values > 20 and each.difference <= 1e-4, each
    return found


@pytest.mark.parametrize(
    'fuse, exporter', [(False, 'older'), (True, 'older'), LONG]
)
def test_faces(tmp_path, fuse, exporter):
    module = trained(config(tmp_path, FACES), fuse)
    # What mmdeploy asks for.
    opset = 11 if exporter == 'older' else None
    program = export.export(module, 16, exporter, opset)
    assert [each.name for each in program.graph.output] == [
        *('dets', 'labels', 'keypoints')
    ]
    assert {node.domain for node in program.graph.node} == {''}
    # Once, or onnxruntime does not quantise it.
    assert sum(not each.domain for each in program.opset_import) == 1
    x, y = pictures((1, 80, 112), (3, 144, 96))
    y[1] *= 0.3
    assert_equal(module, program, x, y)
    # A picture with fewer faces has empty rows.
    dets, labels, keypoints = export.run(export.session(program), [y])
    counts = (labels == 0).sum(1)
    assert dets.shape == (3, counts.max(), 5)
    assert keypoints.shape == (3, counts.max(), 5, 2)
    assert 20 < counts.min() < counts.max()
    for each, of_picture, n in zip(dets, labels, counts):
        assert (of_picture[n:] == -1).all() and not each[n:].any()
        assert (np.diff(each[:n, 4]) <= 0).all()


@pytest.mark.parametrize(
    'text', [RTMDET, ATSS, TWO_STAGES], ids=['rtmdet', 'atss', 'frcnn']
)
def test_other_detectors(tmp_path, text):
    module = trained(config(tmp_path, text))
    program = export.export(module, 16, 'older')
    names = [each.name for each in program.graph.output]
    whole = text is not TWO_STAGES
    assert names == (['dets', 'labels'] if whole else ['feat0', 'feat1'])
    assert 'without rpn_head (RPNHead), roi_head' in module.what or whole
    assert_equal(module, program, *pictures((1, 80, 112), (3, 96, 64)))


def test_nothing_is_found(tmp_path):
    """Neither in the trial pictures nor in others: that is no difference."""
    cfg = config(tmp_path, FACES)
    cfg.model.test_cfg.score_thr = 2
    module = trained(cfg)
    program = export.export(module, 16, 'older')
    (found,) = export.verify(module, program, pictures((2, 80, 112)))
    assert (found.values, found.difference) == (0, 0)


def test_detections_are_compared_before_there_is_a_file(tmp_path):
    module = trained(config(tmp_path, FACES))
    module.nms['iou_threshold'] = 0.8
    with pytest.raises(StartError, match='Head can not be exported: what onn'):
        export.export(module, 16, 'older')


def test_maps_of_classes(tmp_path):
    module = trained(config(tmp_path, SEGMENTS))
    program = export.export(module, 16, 'older')
    found = assert_equal(module, program, *pictures((1, 72, 90), (3, 64, 50)))
    # Of the size of the input, three classes.
    assert [each.values for each in found] == [3 * 72 * 90, 9 * 64 * 50]


def test_one_logit(tmp_path):
    cfg = config(tmp_path, SEGMENTS)
    cfg.model.decode_head.update(num_classes=2, out_channels=1, threshold=0.7)
    cfg.model.decode_head.loss_decode.use_sigmoid = True
    module = trained(cfg)
    assert module.what.endswith('class 1 is where its sigmoid is above 0.7')
    assert export.describe(cfg, module, {}, False)['threshold'] == '0.7'
    (found,) = export.verify(
        module, export.export(module, 16, 'older'), pictures((1, 32, 48))
    )
    assert found.values == 32 * 48


def test_classifier(tmp_path):
    module = trained(config(tmp_path, CLASSES))
    program = export.export(module, 16, 'older')
    assert_equal(module, program, *pictures((5, 40, 30), (7, 33, 64)))


# ----------------------------------------------------------------------- NMS


def through_nms(levels, boxes, scores, points, factors=None, **options):
    """Run the appended operators alone."""
    inputs = ['boxes', *(f'scores{i}' for i in range(levels)), 'points']
    inputs += ['factors'] * (factors is not None)
    given = ', '.join(f'float[A{name}] {name}_' for name in inputs)
    text = ', '.join(f'float[A{name}] {name}' for name in inputs)
    body = '\n'.join(f'{name} = Identity({name}_)' for name in inputs)
    program = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 17]> '
        f'some ({given}) => ({text}) {{ {body} }}'
    )
    for value in [*program.graph.input, *program.graph.output]:
        name = value.name.rstrip('_')
        rank = 4 if name == 'points' else 3
        dims = value.type.tensor_type.shape.dim
        del dims[:]
        for i in range(rank):
            dims.add().dim_param = f'{name}{i}'
    program = append_nms(program, levels, True, **options)
    onnx.checker.check_model(program, full_check=True)
    given = zip(program.graph.input, [boxes, *scores, points, factors])
    feeds = {each.name: x.numpy() for each, x in given}
    return export.session(program).run(None, feeds)


def of_mmdet(head, boxes, scores, points, factors, cfg):
    """What its own code keeps of one picture, and faces of low boxes."""
    found, at = [], 0
    for level in scores:
        values, labels, kept, _ = filter_scores_and_topk(
            level.T, cfg.score_thr, cfg.nms_pre
        )
        found.append(
            InstanceData(
                bboxes=boxes[at:][kept],
                scores=values,
                labels=labels,
                keypoints=points[at:][kept],
            )
        )
        if factors is not None:
            found[-1].score_factors = factors[0, at:][kept]
        at += level.shape[1]
    found = InstanceData.cat(found)
    _, top, _, bottom = found.bboxes.unbind(1)
    found = found[bottom - top >= cfg.min_height]
    return AnchorHead._bbox_post_process(head, found, cfg)


@pytest.mark.parametrize(
    'options',
    [
        dict(),
        dict(nms_pre=25),
        dict(max_per_img=9),
        dict(score_thr=0.6, min_size=9),
        dict(min_height=9),
        dict(score_thr=2.0),
        dict(factors=True, nms_pre=60, score_thr=0.5, max_per_img=30),
    ],
    ids=str,
)
def test_nms_is_that_of_mmdet(options):
    generator = torch.Generator().manual_seed(0)
    classes, sizes, batch = 3, (70, 40), 3
    corners = torch.rand(batch, sum(sizes), 2, generator=generator) * 40
    sides = torch.rand(batch, sum(sizes), 2, generator=generator) * 20
    boxes = torch.cat([corners, corners + sides], 2)
    scores = [
        torch.rand(batch, classes, n, generator=generator) for n in sizes
    ]
    for level in scores:
        level[1] *= 0.7
    points = torch.rand(batch, sum(sizes), 5, 2, generator=generator)
    options = dict(dict(score_thr=0.3, iou_threshold=0.4), **options)
    if options.get('factors'):
        options['factors'] = torch.rand(
            batch, 1, sum(sizes), generator=generator
        )
    factors = options.get('factors', [None] * batch)
    dets, labels, keypoints = through_nms(2, boxes, scores, points, **options)
    cfg = ConfigDict(
        nms_pre=options.get('nms_pre', 10**6),
        score_thr=options['score_thr'],
        min_bbox_size=options.get('min_size', -1),
        min_height=options.get('min_height', -1),
        nms=dict(type='nms', iou_threshold=0.4),
        max_per_img=options.get('max_per_img', 10**6),
    )
    wants = [
        of_mmdet(
            None,
            boxes[i],
            [s[i] for s in scores],
            points[i],
            factors[i],
            cfg,
        )
        for i in range(batch)
    ]
    assert dets.shape[1] == max(map(len, wants))
    uneven = len({len(want) for want in wants}) > 1
    assert uneven or options.keys() & {'max_per_img'} or dets.shape[1] == 0
    for i, want in enumerate(wants):
        n = len(want)
        assert (labels[i, n:] == -1).all()
        np.testing.assert_array_equal(labels[i, :n], want.labels)
        np.testing.assert_array_equal(dets[i, :n, :4], want.bboxes)
        np.testing.assert_array_equal(dets[i, :n, 4], want.scores)
        np.testing.assert_array_equal(keypoints[i, :n], want.keypoints)


def test_detections_that_differ():
    """Any of them, in place, score or label, and one that is missing."""
    rows = torch.rand(4, 16, generator=torch.Generator().manual_seed(0))
    rows = rows.numpy() * 100
    rows[:, 5] = 0
    farthest = partial(export._farthest, side=200)
    assert farthest(rows, rows[::-1]) == 0
    for column, difference in ((0, 20), (4, 0.1), (5, 0.1), (15, 20)):
        other = rows.copy()
        other[2, column] += difference
        for pair in ((rows, other), (other, rows)):
            assert farthest(*pair) == pytest.approx(0.1, rel=1e-5)
    assert farthest(rows[:3], rows) > 0.01 < farthest(rows, rows[:3])
    assert farthest(rows, rows[:0]) == farthest(rows[:0], rows) == np.inf
    assert farthest(rows[:0], rows[:0]) == 0


# ------------------------------------------------------------------ the tool


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a config, a checkpoint and a picture."""
    cfg = config(tmp_path, FACES + RESIZE, 'faces.py')
    model = trained(cfg).detector
    meta = dict(dataset_meta=dict(classes=('face',)))
    state = dict(state_dict=model.state_dict(), meta=meta)
    torch.save(state, tmp_path / 'faces.pth')
    image = np.random.default_rng(0).integers(0, 255, (96, 128, 3), np.uint8)
    cv2.imwrite(str(tmp_path / 'some.png'), image)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', sys.path[:])
    return tmp_path


def call(monkeypatch, *args):
    """Give the exit code of the tool."""
    monkeypatch.setattr(sys, 'argv', ['export_onnx.py', *args])
    main = runpy.run_path(str(TOOLS / 'export_onnx.py'))['main']
    try:
        cli.run(main)
    except SystemExit as error:
        return error.code
    return 0


def test_the_tool_and_the_example(here, monkeypatch, capfd):
    options = ['--fuse', '--verify', 'some.png', '--exporter', 'older']
    args = ['faces.py', 'faces.pth', 'out/faces.onnx', *options]
    assert call(monkeypatch, *args) == 0
    out = capfd.readouterr().out
    assert '2 of 2 Poly-NL layers fused' in out
    assert 'the whole detector with NMS: dets, labels, keypoints' in out
    # The second is three quarters of the picture, padded.
    assert '1 x 3 x 96 x 128: dets' in out and '1 x 3 x 80 x 96: dets' in out
    assert [path.name for path in Path('out').iterdir()] == ['faces.onnx']
    facts = {
        each.key: each.value
        for each in onnx.load('out/faces.onnx').metadata_props
    }
    assert json.loads(facts['mean']) == [120, 110, 100]
    assert json.loads(facts['classes']) == ['face']
    assert facts['pad_size_divisor'] == '16' and facts['fused'] == 'true'
    assert facts['min_height_of_input'] == '8'
    assert json.loads(facts['resize']) == dict(scale=[96, 72], keep_ratio=True)

    # One that is wrong is told, and ends with 1.
    program = onnx.load('out/faces.onnx')
    wrong = export.Difference((1, 3), 'dets', 1, 2e-4)
    with monkeypatch.context() as patch:
        patch.setattr(export, 'export', lambda *_: program)
        patch.setattr(export, 'verify', lambda *_: [wrong, wrong])
        assert call(patch, *args) == 1
    said = '2 of 2 outputs differ by more than 0.0001'
    assert said in capfd.readouterr().err

    # Without torch: what the detector finds on the picture itself.
    file = ROOT / 'projects/deployment/detect.py'
    example = runpy.run_path(str(file))
    picture = cv2.imread('some.png')
    dets, _, points = example['detect'](
        *example['load']('out/faces.onnx'), picture
    )
    cfg = Config.fromfile('faces.py')
    with DefaultScope.overwrite_default_scope('mmdet'):
        model, _ = export.load_model(cfg, 'faces.pth')
    module = export.to_export(cfg, model)
    (want,) = module.detect(export.read_picture('some.png', model, 0.75))
    assert len(want) > 10
    want[:, [0, 1, 2, 3, *range(6, 16)]] /= 0.75
    want[:, :4] = want[:, :4].clip(0, [128, 96, 128, 96])
    np.testing.assert_allclose(dets, want[:, :5], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        points.reshape(-1, 10), want[:, 6:], rtol=1e-4, atol=1e-3
    )
    monkeypatch.setattr(
        sys, 'argv', ['detect.py', 'out/faces.onnx', 'some.png', 'drawn.png']
    )
    example['main']()
    drawn = cv2.imread('drawn.png')
    assert drawn.shape == picture.shape and (drawn != picture).any()
    assert len(capfd.readouterr().out.splitlines()) == (dets[:, 4] > 0.5).sum()

    # In 8 bits; nothing is left in the current folder.
    before = sorted(here.iterdir())
    sys.path.insert(0, str(file.parent))
    script = runpy.run_path(str(file.with_name('quantise.py')))
    script['preprocess']('out/faces.onnx', 'out/whole.onnx')
    nodes = onnx.load('out/whole.onnx').graph.node
    convolutions = [node.name for node in nodes if node.op_type == 'Conv']
    facts = example['load']('out/faces.onnx')[1]
    given = script['Pictures']([here / 'some.png'], facts)
    script['quantise']('out/whole.onnx', 'out/small.onnx', convolutions, given)
    kinds = [node.op_type for node in onnx.load('out/small.onnx').graph.node]
    assert kinds.count('QuantizeLinear') >= len(convolutions) > 10
    assert sorted(here.iterdir()) == before


@pytest.mark.parametrize(
    'model, out, line',
    [
        ('no.onnx', 'a.png', 'no.onnx: onnxruntime does not read it: '),
        ('some.png', 'a.png', 'some.png: onnxruntime does not read it: '),
        (
            *('boxes.onnx', 'a.png'),
            'boxes.onnx: its outputs are dets, labels; expected are dets, '
            'labels, keypoints, of a detector of faces with landmarks\n',
        ),
        (
            *('bare.onnx', 'a.png'),
            'bare.onnx: its metadata lacks mean, pad_size_divisor; expected '
            'is a file by tools/export_onnx.py\n',
        ),
        ('boxes.onnx', 'nodir/a.png', 'nodir/a.png: there is no folder '),
        ('boxes.onnx', 'a', 'a: OpenCV writes no such file; expected is an '),
        ('boxes.onnx', './some.png', './some.png is the picture itself'),
    ],
)
def test_the_example_refuses(here, monkeypatch, capfd, model, out, line):
    for name, count in (('boxes', 2), ('bare', 3)):
        outputs = ['dets', 'labels', 'keypoints'][:count]
        body = '\n'.join(f'{each} = Identity(input)' for each in outputs)
        text = ', '.join(f'float[A] {each}' for each in outputs)
        program = onnx.parser.parse_model(
            f'<ir_version: 8, opset_import: ["": 17]> '
            f'some (float[A] input) => ({text}) {{ {body} }}'
        )
        onnx.save(program, f'{name}.onnx')
    example = runpy.run_path(str(ROOT / 'projects/deployment/detect.py'))
    monkeypatch.setattr(sys, 'argv', ['detect.py', model, 'some.png', out])
    with pytest.raises(SystemExit) as error:
        example['main']()
    assert error.value.code == 2
    said = capfd.readouterr().err
    assert f'detect.py: error: {line}' in said
    assert len(said.partition('error: ')[2].splitlines()) == 1


def test_what_is_not_done_is_not_told(here, monkeypatch):
    """Nothing to fuse, and no padding."""
    cfg = config(here, CLASSES, 'classes.py')
    model = trained(cfg).classifier
    torch.save(dict(state_dict=model.state_dict()), 'classes.pth')
    args = ['classes.py', 'classes.pth', 'classes.onnx', '--fuse']
    assert call(monkeypatch, *args, '--exporter', 'older') == 0
    facts = {
        each.key: each.value
        for each in onnx.load('classes.onnx').metadata_props
    }
    assert facts['fused'] == 'false'
    assert facts['pad_size_divisor'] == '1'
    assert not facts.keys() & {'resize', 'min_height_of_input'}
    assert export.trial_divisor(cfg) == 32
    cfg.model.data_preprocessor.update(
        size_divisor=7, test_cfg=dict(size_divisor=24)
    )
    assert export.divisor_of(cfg) == 24 and export.trial_divisor(cfg) == 24


def test_what_the_caller_must_know(tmp_path):
    cfg = config(tmp_path, FACES + RESIZE)
    cfg.model.data_preprocessor.update(
        bgr_to_rgb=False,
        rgb_to_bgr=True,
        pad_value=3,
        test_cfg=dict(size=(64, 96)),
    )
    (resize,) = cfg.test_dataloader.dataset.dataset.pipeline[1:]
    resize.interpolation = 'area'
    module = trained(config(tmp_path, FACES))
    module.nms['min_size'] = 5
    facts = export.describe(cfg, module, {}, False)
    assert facts['bgr_to_rgb'] == 'true' and facts['pad_value'] == '3'
    assert facts['pad_size'] == '[64, 96]'
    assert facts['min_size_of_input'] == '5'
    assert json.loads(facts['resize'])['interpolation'] == 'area'


# ------------------------------------------------------ what is not exported


@MODELS.register_module(force=True)
class Breaks(nn.Module):
    """A module that exporters can not take."""

    def __init__(self, in_channels, how):
        super().__init__()
        self.how = how

    def forward(self, x):
        if self.how == 'operator':
            return x + torch.special.i1e(x)
        # A size that a tracer takes for a constant.
        return x * int(x.shape[2])


BROKEN = """
_base_ = 'faces.py'
model = dict(neck=[
    dict(type='polynl_mm.Insert', into='FPN', in_channels=[4, 8],
         out_channels=12, num_outs=2,
         blocks=[
             dict(after='lateral_convs.*',
                  cfg=dict(type='polynl_mm.PolyNL2d')),
             dict(after='fpn_convs.1', cfg=dict(type='Breaks', how='HOW'))]),
    dict(type='SSH', num_scales=2, in_channels=[12, 12],
         out_channels=[12, 12])])
"""


@pytest.mark.parametrize(
    'how, why',
    [
        ('operator', "Exporting the operator 'aten::special_i1e'"),
        (
            'constant',
            'at (3, 12, 36, 32) it differs from torch by 0.1 of the largest '
            'value, as something of the first input was taken for a constant',
        ),
    ],
)
def test_the_module_is_named(here, monkeypatch, capfd, how, why):
    (here / 'broken.py').write_text(BROKEN.replace('HOW', how))
    before = sorted(here.rglob('*'))
    args = ['broken.py', 'faces.pth', 'some.onnx', '--exporter', 'older']
    assert call(monkeypatch, *args) == 2
    assert sorted(here.rglob('*')) == before
    lines = capfd.readouterr().err.splitlines()
    (line,) = [each for each in lines if each.startswith('export_onnx.py:')]
    assert line.startswith(
        'export_onnx.py: error: neck.0.fpn_convs.1.breaks (Breaks) can not be '
        'exported by the older exporter: '
    )
    assert why in line
    assert line.endswith(
        '; try --exporter dynamo, or replace this module in the config'
    )


class Whole(nn.Module):
    """Of a module that gives more than tensors, and of a list."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(True))
        self.items = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(2))
        self.items.append(nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 1))))
        self.patches.forward = lambda x: (self.patches[0](x), (1, 2))

    def forward(self, x):
        x, _ = self.patches(x)
        for item in self.items:
            x = item(x)
        return x


@pytest.mark.parametrize('path', ['patches.0', 'items.1', 'items.2.0.0', None])
def test_the_smallest_is_found(path):
    model = Whole()
    part = path and model.get_submodule(path)

    def why(alone, given):
        assert [len(tensors) for tensors in given] == [1, 1]
        assert all(map(torch.is_tensor, alone(*given[1])))
        # What has it in it fails, too.
        return 'as told' if part in alone.module.modules() else None

    found = culprit(model, pictures((1, 8, 6), (2, 4, 4)), why)
    assert found == (path and (path, part, 'as told'))


def not_plain(nms):
    return (
        f'config faces.py: model.test_cfg.nms={nms} is not exported, as the '
        'standard operator knows plain NMS within each class alone: set '
        'model.test_cfg.nms="dict(type=\'nms\', iou_threshold=0.5)"'
    )


@pytest.mark.parametrize(
    'options, line',
    [
        (
            ['--cfg-options', "model.test_cfg.nms=dict(type='soft_nms')"],
            not_plain(dict(type='soft_nms', iou_threshold=0.4)),
        ),
        (
            ['--cfg-options', 'model.test_cfg.nms.class_agnostic=True'],
            not_plain(
                dict(type='nms', iou_threshold=0.4, class_agnostic=True)
            ),
        ),
        (
            ['--cfg-options', 'model.test_cfg.nms.max_num=5'],
            not_plain(dict(type='nms', iou_threshold=0.4, max_num=5)),
        ),
        (
            [
                *('--cfg-options', 'model.type=polynl_mm.Tiled'),
                *('model.detector=SingleStageDetector', 'model.tile=64'),
                'model.overlap=32',
            ],
            "config faces.py: model.type='polynl_mm.Tiled' is not exported",
        ),
        (['--verify', 'some.jpg'], 'some.jpg: not a readable picture'),
        (
            ['--cfg-options', 'model.bbox_head.in_channels=13'],
            'checkpoint faces.pth does not fit the model of faces.py: 4 keys',
        ),
        (
            ['--exporter', 'older', '--opset', '17'],
            '--opset 17: the older exporter gives 18 instead; try --exporter ',
        ),
    ],
    ids='soft agnostic number tiles picture checkpoint opset'.split(),
)
def test_what_is_refused(here, monkeypatch, capfd, options, line):
    (here / 'some.jpg').write_bytes(b'none')
    # As the newer exporter does where it can not go back to a version.
    newer = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 18]> a (float[1] x) => () {}'
    )
    monkeypatch.setattr(export, '_why_not', lambda *_: newer)
    args = ['faces.py', 'faces.pth', 'some.onnx']
    assert call(monkeypatch, *args, *options) == 2
    assert not (here / 'some.onnx').exists()
    assert line in capfd.readouterr().err


@pytest.mark.parametrize(
    'exporter, opset, line',
    [
        ('older', 10, '--opset 10: expected is 11 to '),
        ('older', 99, '--opset 99: expected is 11 to '),
        ('dynamo', 99, '--opset 99: expected is 11 to '),
    ],
)
def test_opsets_out_of_range(tmp_path, monkeypatch, exporter, opset, line):
    """Before anything is exported."""
    monkeypatch.setattr(export, '_program', None)
    module = trained(config(tmp_path, FACES))
    with pytest.raises(StartError, match=line) as error:
        export.export(module, 16, exporter, opset)
    assert f'which the {exporter} exporter of torch' in str(error.value)


def test_windows_are_refused(tmp_path):
    cfg = config(tmp_path, SEGMENTS)
    cfg.model.test_cfg = dict(mode='slide', crop_size=(8, 8), stride=(8, 8))
    with pytest.raises(StartError, match="mode='slide' is not exported, as"):
        trained(cfg)
