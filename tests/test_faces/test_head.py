"""RetinaFace's head against loops, by hand, and in a small training."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from detectors import DETECTORS, landmarks_in, sample
from mmdet.registry import MODELS as DET_MODELS
from mmdet.structures.bbox import bbox_overlaps
from mmengine.logging import MessageHub
from oracles import match_loop, retinaface_losses_loop
from torch.testing import assert_close

from polynl_mm.faces.boxes import FaceBoxes
from polynl_mm.faces.head import LandmarkCoder, check_batch_augments

pytestmark = pytest.mark.usefixtures('quiet_and_quick')

NAMES = list(DETECTORS)
WITH_LANDMARKS = ['p3-p5', 'p2-p6']
FACES = [[10, 12, 42, 50], [70, 20, 112, 61]]
META = dict(img_shape=(128, 128), pad_shape=(128, 128))


def anchors_of(head, size=128):
    """All anchors (n, 4) of a square input."""
    sizes = [
        (math.ceil(size / stride),) * 2
        for stride, _ in head.prior_generator.strides
    ]
    return torch.cat(head.prior_generator.grid_priors(sizes, device='cpu'))


def outputs(head, images, size=128, spread=1.0, seed=0):
    """Random predictions of a head, with gradients, as `forward` gives."""
    generator = torch.Generator().manual_seed(seed)
    widths = (
        head.cls_out_channels,
        4,
        10 if head.with_landmarks else 0,
        1 if head.with_iou else 0,
    )
    return tuple(
        [
            torch.randn(
                images,
                width * head.num_base_priors,
                math.ceil(size / stride),
                math.ceil(size / stride),
                generator=generator,
            )
            .mul(spread)
            .requires_grad_()
            for stride, _ in head.prior_generator.strides
        ]
        if width
        else ()
        for width in widths
    )


def flat(maps, width):
    """Maps (B, A * width, H, W) -> (B, anchors, width)."""
    return torch.cat(
        [m.permute(0, 2, 3, 1).reshape(len(m), -1, width) for m in maps], 1
    )


def losses_of(head, outs, samples):
    return head.loss_by_feat(
        *outs,
        [s.gt_instances for s in samples],
        [s.metainfo for s in samples],
        [s.ignored_instances for s in samples],
    )


def annotated(boxes, visible=None, **kwargs):
    visible = torch.ones(len(boxes), 5) if visible is None else visible
    return sample(boxes, landmarks_in(boxes), visible, **kwargs)


# ------------------------------------------------------ anchors and code

SIZES = {
    'p3-p5': {8: (16, 32), 16: (64, 128), 32: (256, 512)},
    'p2-p6': {
        4: (16, 20.16, 25.40),
        8: (32, 40.32, 50.80),
        16: (64, 80.63, 101.59),
        32: (128, 161.26, 203.19),
        64: (256, 322.54, 406.37),
    },
    'tinaface': {4: (10.08, 12.7, 16), 128: (322.5, 406.4, 512)},
}
COUNTS = {
    'p3-p5': {8: 12800, 16: 3200, 32: 800},
    'p2-p6': {4: 76800, 8: 19200, 16: 4800, 32: 1200, 64: 300},
    'tinaface': {4: 76800},
}
TOTALS = {'p3-p5': 16800, 'p2-p6': 102300, 'tinaface': 102375}


@pytest.mark.parametrize('name', NAMES)
def test_anchors_at_640(build, name):
    generator = build(name).bbox_head.prior_generator
    strides = [stride for stride, _ in generator.strides]
    priors = generator.grid_priors(
        [(640 // stride, 640 // stride) for stride in strides], device='cpu'
    )
    assert sum(map(len, priors)) == TOTALS[name]
    levels = dict(zip(strides, priors))
    for stride, count in COUNTS[name].items():
        assert len(levels[stride]) == count
    for stride, sizes in SIZES[name].items():
        sides = levels[stride][:, 2:] - levels[stride][:, :2]
        counted = Counter(sides.prod(1).sqrt().mul(10).round().tolist())
        got = sorted(size / 10 for size in counted)
        assert got == pytest.approx(sizes, abs=0.06)
        ratio = 1.3 if name == 'tinaface' else 1.0
        assert_close(
            sides[:, 1] / sides[:, 0], torch.full_like(sides[:, 0], ratio)
        )
    first = (levels[strides[1]][0, :2] + levels[strides[1]][0, 2:]) / 2
    offset = strides[1] / 2 if name == 'p3-p5' else 0
    assert_close(first, torch.full((2,), float(offset)))


def test_landmark_code():
    coder = LandmarkCoder(std=0.1)
    anchor = torch.tensor([[10.0, 20.0, 30.0, 60.0]])
    points = torch.tensor([[[20, 40], [21, 40], [20, 44], [10, 20], [30, 60]]])
    code = coder.encode(anchor, points)
    expected = [[0, 0], [0.5, 0], [0, 1], [-5, -5], [5, 5]]
    assert_close(code, torch.tensor([expected]))
    assert_close(LandmarkCoder(std=1.0).encode(anchor, points), code / 10)

    generator = torch.Generator().manual_seed(0)
    anchors = torch.rand(50, 4, generator=generator) * 300
    anchors[:, 2:] += anchors[:, :2] + 1
    points = torch.rand(50, 5, 2, generator=generator) * 700 - 100
    code = coder.encode(anchors, points)
    assert_close(coder.decode(anchors, code), points, rtol=0, atol=1e-3)
    assert_close(
        coder.decode(anchors, code.flatten(1)), points, rtol=0, atol=1e-3
    )
    assert coder.decode(anchors[:0], code[:0]).shape == (0, 5, 2)


@pytest.mark.parametrize('std', [0, -1.0, math.nan])
def test_landmark_code_needs_a_scale(std):
    with pytest.raises(ValueError, match=f'std must be above 0, got {std}'):
        LandmarkCoder(std)


# ---------------------------------------------------------------- forward


@pytest.mark.parametrize('name', NAMES)
def test_forward(build, name):
    model = build(name)
    head = model.bbox_head
    x = model.extract_feat(torch.rand(2, 3, 128, 96))
    outs = head(x)
    assert len(outs) == 4
    widths = (head.cls_out_channels, 4, 10, 1)
    present = (True, True, name != 'tinaface', name == 'tinaface')
    for maps, width, there in zip(outs, widths, present):
        assert len(maps) == (len(x) if there else 0)
        for level, feat in zip(maps, x):
            channels = width * head.num_base_priors
            assert level.shape == (2, channels, *feat.shape[2:])
    predictors = 3 if name == 'p3-p5' else 1
    assert len(head.conv_cls) == len(head.conv_reg) == predictors
    if name != 'p3-p5':
        scores = torch.cat([level.flatten() for level in outs[0]]).sigmoid()
        assert scores.median().item() == pytest.approx(0.01, rel=0.2)
    with pytest.raises(ValueError, match='1 feature maps.*strides'):
        head(x[:1])


def test_each_level_has_its_own_predictor_or_not(build):
    for name, own in (('p3-p5', True), ('p2-p6', False)):
        head = build(name).bbox_head
        x = [torch.rand(1, 16, 4, 4)] * head.prior_generator.num_levels
        for maps in head(x)[:3]:
            assert torch.equal(maps[0], maps[1]) != own


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(stacked_convs=-1), 'stacked_convs must be 0 or more, got -1'),
        (dict(kernel_size=2), 'kernel_size must be odd .*, got 2'),
        (
            dict(iou_score_exponents=(1, -1)),
            r'iou_score_exponents .*, got \(1, -1\)',
        ),
        (
            dict(train_cfg=dict(neg_pos_ratio=0)),
            'neg_pos_ratio must be None or above 0, got 0',
        ),
    ],
)
def test_bad_arguments(build, change, message):
    with pytest.raises(ValueError, match=message):
        build('p2-p6', **change)


@pytest.mark.parametrize('name', NAMES)
def test_under_autocast(build, name):
    model = build(name)
    with torch.autocast('cpu', torch.bfloat16):
        x = model.extract_feat(torch.rand(1, 3, 128, 128))
        assert x[0].dtype == torch.bfloat16
        outs = model.bbox_head(x)
        losses = losses_of(model.bbox_head, outs, [annotated(FACES)])
        found = model.bbox_head.predict_by_feat(
            *outs, batch_img_metas=[annotated(FACES).metainfo], rescale=True
        )
    for maps in outs:
        assert all(level.dtype == torch.float32 for level in maps)
    for loss in losses.values():
        assert loss.dtype == torch.float32 and loss.isfinite()
    assert found[0].bboxes.dtype == torch.float32


# ----------------------------------------------------------------- losses


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('name', WITH_LANDMARKS)
def test_losses_agree_with_a_loop(build, name, seed):
    """Matching, mining, all three losses, masks and averages."""
    head = build(name).bbox_head
    rng = np.random.default_rng(seed)
    samples = []
    for count in (3, 0, 5):
        corners = rng.uniform(0, 100, (count, 2))
        sides = rng.uniform(8, 50, (count, 2)).clip(max=127 - corners)
        boxes = np.hstack([corners, corners + sides]).astype(np.float32)
        visible = rng.integers(0, 2, (count, 5)) * rng.integers(
            0, 2, (count, 1)
        )
        samples.append(annotated(boxes.tolist(), torch.tensor(visible)))
    outs = outputs(head, len(samples), seed=seed)
    got = losses_of(head, outs, samples)

    paper = name == 'p2-p6'
    widths = (head.cls_out_channels, 4, 10)
    preds = [flat(maps, w).tolist() for maps, w in zip(outs, widths)]
    expected = retinaface_losses_loop(
        anchors_of(head).tolist(),
        [
            (
                s.gt_instances.bboxes.tolist(),
                s.gt_instances.keypoints.tolist(),
                s.gt_instances.keypoints_visible.tolist(),
                *(pred[i] for pred in preds),
            )
            for i, s in enumerate(samples)
        ],
        matching=(0.5, 0.3) if paper else (0.35, 0.35, 0.2),
        ratio=3 if paper else 7,
        softmax=not paper,
        box_stds=(1, 1, 1, 1) if paper else (0.1, 0.1, 0.2, 0.2),
        box_beta=1 / 9 if paper else 1,
        std=1 if paper else 0.1,
        landmark_beta=1 / 9 if paper else 1,
    )
    weights = (1, 0.25, 0.1) if paper else (1, 2, 1)
    for key, weight, value in zip(
        ('loss_cls', 'loss_bbox', 'loss_landmark'), weights, expected
    ):
        assert value > 0.1
        assert got[key].item() == pytest.approx(weight * value, rel=1e-4), key


def test_losses_of_the_tinaface_family(build):
    """Focal loss over all anchors, DIoU of decoded boxes, BCE of the IoU."""
    head = build('tinaface').bbox_head
    samples = [annotated(FACES), annotated(FACES[:1])]
    outs = outputs(head, 2)
    got = losses_of(head, outs, samples)

    anchors = anchors_of(head).tolist()
    logits, deltas, ious = (
        flat(maps, width).tolist()
        for maps, width in zip((outs[0], outs[1], outs[3]), (1, 4, 1))
    )
    classes = boxes = bces = positives = 0
    for i, s in enumerate(samples):
        faces = s.gt_instances.bboxes.tolist()
        for j, face in enumerate(match_loop(anchors, faces, 0.35, 0.35, 0.35)):
            p = 1 / (1 + math.exp(-logits[i][j][0]))
            if face < 0:
                classes -= 0.75 * p**2 * math.log(1 - p)
                continue
            classes -= 0.25 * (1 - p) ** 2 * math.log(p)
            positives += 1
            x1, y1, x2, y2 = anchors[j]
            dx, dy, dw, dh = deltas[i][j]
            cx = (x1 + x2) / 2 + 0.1 * dx * (x2 - x1)
            cy = (y1 + y2) / 2 + 0.1 * dy * (y2 - y1)
            w = (x2 - x1) * math.exp(0.2 * dw)
            h = (y2 - y1) * math.exp(0.2 * dh)
            fx1, fy1, fx2, fy2 = faces[face]
            box = (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
            iw = max(min(box[2], fx2) - max(box[0], fx1), 0)
            ih = max(min(box[3], fy2) - max(box[1], fy1), 0)
            iou = iw * ih / (w * h + (fx2 - fx1) * (fy2 - fy1) - iw * ih)
            far = (cx - (fx1 + fx2) / 2) ** 2 + (cy - (fy1 + fy2) / 2) ** 2
            hull = (max(box[2], fx2) - min(box[0], fx1)) ** 2 + (
                max(box[3], fy2) - min(box[1], fy1)
            ) ** 2
            boxes += 1 - iou + far / hull
            q = 1 / (1 + math.exp(-ious[i][j][0]))
            bces -= iou * math.log(q) + (1 - iou) * math.log(1 - q)
    assert positives > 5
    expected = dict(loss_cls=classes, loss_bbox=2 * boxes, loss_iou=bces)
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert got[key].item() == pytest.approx(value / positives, rel=1e-4)


@pytest.mark.parametrize('name', WITH_LANDMARKS)
def test_mining_takes_the_hardest(build, name):
    """Seen from the gradient: per picture, and none between the bands."""
    head = build(name).bbox_head
    samples = [annotated(FACES), annotated(FACES[:1]), annotated([])]
    outs = outputs(head, 3)
    losses_of(head, outs, samples)['loss_cls'].backward()
    touched = flat([m.grad for m in outs[0]], head.cls_out_channels).any(2)
    scores = flat(outs[0], head.cls_out_channels).detach()
    face = scores[..., 0] - (scores[..., 1] if name == 'p3-p5' else 0)
    matching = (0.35, 0.35, 0.2) if name == 'p3-p5' else (0.5, 0.3)
    ratio = 7 if name == 'p3-p5' else 3
    anchors = anchors_of(head).tolist()
    for i, s in enumerate(samples):
        match = match_loop(anchors, s.gt_instances.bboxes.tolist(), *matching)
        positive = {j for j, m in enumerate(match) if m is not None and m >= 0}
        negative = [j for j, m in enumerate(match) if m == -1]
        negative.sort(key=lambda j: -face[i, j].item())
        expected = positive | set(negative[: ratio * len(positive)])
        assert set(touched[i].nonzero().flatten().tolist()) == expected
        assert bool(positive) == (i < 2)


@pytest.mark.parametrize(
    'boxes',
    [
        [FACES, []],
        [[], []],
        [[[10, 10, 10, 40], [20, 30, 50, 30], [40, 40, 30, 30]], []],
        [[[-60, -60, 40, 50], [100, 90, 300, 400]], [[1, 1, 2, 2]]],
    ],
    ids=['one empty', 'none', 'degenerate', 'outside and tiny'],
)
@pytest.mark.parametrize('name', NAMES)
def test_gradients_for_all_parameters(build, name, boxes):
    """With or without positives, as DistributedDataParallel demands."""
    model = build(name).train()
    samples = [annotated(each) for each in boxes]
    losses = model.bbox_head.loss(
        model.extract_feat(torch.rand(2, 3, 128, 128)), samples
    )
    total, logged = model.parse_losses(losses)
    assert {'loss_cls', 'loss_bbox'} < logged.keys()
    total.backward()
    for key, param in model.named_parameters():
        assert param.grad is not None, key
        assert param.grad.isfinite().all(), key
    if boxes[0] is FACES:
        for key, param in model.bbox_head.named_parameters():
            # No face is large enough for P5's own predictors.
            alone = name == 'p3-p5' and '.2.' in key and 'cls' not in key
            assert param.grad.any() != alone, key
        assert min(logged.values()) > 0
    elif boxes[0][:1] in ([], [[10, 10, 10, 40]]):
        assert all(logged[k] == 0 for k in losses if k != 'loss_cls')


def test_degenerate_faces_are_passed_over(build):
    """Even where each face gets an anchor, whatever their IoU: log(0)."""
    assigner = dict(
        type='MaxIoUAssigner',
        pos_iou_thr=0.5,
        neg_iou_thr=0.4,
        min_pos_iou=0.0,
        gt_max_assign_all=False,
    )
    head = build('p3-p5', train_cfg=dict(assigner=assigner)).bbox_head
    outs = outputs(head, 1)
    bad = [[10, 10, 10, 40], [20, 30, 50, 30], [40, 40, 30, 30]]
    both = annotated([bad[0], FACES[0], *bad[1:], FACES[1]])
    got = losses_of(head, outs, [both])
    expected = losses_of(head, outs, [annotated(FACES)])
    assert got == expected
    assert got['loss_bbox'] > 0 and got['loss_bbox'].isfinite()


@pytest.mark.parametrize('anything', [0.0, -1.0, 7e5, math.nan, math.inf])
@pytest.mark.parametrize('name', WITH_LANDMARKS)
def test_absent_landmarks_do_not_matter(build, name, anything):
    head = build(name).bbox_head
    outs = outputs(head, 2)
    visible = torch.tensor([[1, 1, 0, 1, 1], [0, 0, 0, 0, 0]])

    def run(value):
        samples = [
            annotated(FACES, visible),
            annotated(FACES[1:], visible[1:]),
        ]
        for s in samples:
            faces = s.gt_instances
            faces.keypoints[faces.keypoints_visible == 0] = value
        losses = losses_of(head, outs, samples)
        grads = torch.autograd.grad(losses['loss_landmark'], outs[2])
        return losses, grads

    losses, grads = run(anything)
    expected, expected_grads = run(64.0)
    assert losses == expected
    assert all(map(torch.equal, grads, expected_grads))
    assert losses['loss_landmark'] > 0
    # The nose, and all of the face that has none, get no gradient.
    grad = flat(grads, 10).unflatten(2, (5, 2))
    assert not grad[:, :, 2].any() and not grad[1].any()
    assert grad[0, :, 0].any()


def test_all_landmarks_absent(build):
    head = build('p3-p5').bbox_head
    outs = outputs(head, 1)
    losses = losses_of(head, outs, [annotated(FACES, torch.zeros(2, 5))])
    assert losses['loss_landmark'] == 0 and losses['loss_bbox'] > 0
    losses['loss_landmark'].backward()
    assert all(level.grad is not None for level in outs[2])


@pytest.mark.parametrize(
    'remove, shape',
    [
        ('keypoints', r'\(2, 5, 2\), got none'),
        ('keypoints_visible', r'\(2, 5\), got none'),
        ('points', r'\(2, 5, 2\), got \(2, 4, 2\)'),
    ],
)
def test_landmarks_missing(build, remove, shape):
    broken = annotated(FACES)
    if remove == 'points':
        faces = broken.gt_instances
        faces.keypoints = faces.keypoints[:, :4]
    else:
        broken.gt_instances.pop(remove)
    head = build('p3-p5').bbox_head
    message = rf'event/name.jpg: .*keypoints\w* must .* {shape}; .*=None'
    with pytest.raises(ValueError, match=message):
        losses_of(head, outputs(head, 1), [broken])
    head = build('p3-p5', loss_landmark=None).bbox_head
    losses = losses_of(head, outputs(head, 1), [broken])
    assert losses.keys() == {'loss_cls', 'loss_bbox'}
    # Without a face there is nothing to miss.
    head = build('p3-p5').bbox_head
    samples = [sample([]), annotated(FACES)]
    assert losses_of(head, outputs(head, 2), samples)['loss_landmark'] > 0


@pytest.mark.parametrize(
    'augment, refused',
    [
        (dict(type='BatchSyncRandomResize', random_size_range=(96, 96)), True),
        (dict(type='BatchResize', scale=(96, 96)), True),
        (dict(type='BatchFixedSizePad', size=(160, 160)), False),
    ],
    ids=lambda value: value['type'] if isinstance(value, dict) else '',
)
def test_a_batch_resized_after_packing(build, augment, refused):
    """Boxes move with it, landmarks do not: it is an error, by name."""
    head = build('p3-p5').bbox_head
    preprocessor = DET_MODELS.build(
        dict(type='DetDataPreprocessor', batch_augments=[augment])
    )
    preprocessor.batch_augments[0]._input_size = (96, 96)
    MessageHub.get_current_instance().update_info('iter', 0)
    packed = annotated(FACES)
    packed.set_metainfo(dict(landmark_shape=packed.img_shape))
    data = preprocessor(
        dict(inputs=[torch.zeros(3, 128, 128)], data_samples=[packed]),
        training=True,
    )

    def run():
        return losses_of(head, outputs(head, 1), data['data_samples'])

    cfg = dict(
        model=dict(
            bbox_head=dict(loss_landmark=dict(type='L1Loss')),
            data_preprocessor=dict(batch_augments=[augment]),
        )
    )
    if refused:
        with pytest.raises(ValueError, match=f'has {augment["type"]}, which'):
            check_batch_augments(cfg, ['train'])
        cfg['model']['bbox_head'] = dict(loss_landmark=None)
        message = (
            r'event/name.jpg: resized from \(128, 128\) to \(96, 96\) '
            'after packing.*BatchSyncRandomResize'
        )
        with pytest.raises(ValueError, match=message):
            run()
    else:
        assert run()['loss_landmark'] > 0
    check_batch_augments(cfg, ['train'])


def test_boxes_packed_with_their_landmarks_inside_are_refused(build):
    """As mmdet's own packing gives them."""
    packed = annotated(FACES)
    faces = packed.gt_instances
    points = torch.cat([faces.keypoints, torch.ones(2, 5, 1)], -1)
    faces.bboxes = FaceBoxes.join(faces.bboxes, points).tensor
    head = build('p3-p5').bbox_head
    message = r'bboxes must .* \(2, 4\), got \(2, 19\).*PackDetInputs'
    with pytest.raises(ValueError, match=message):
        losses_of(head, outputs(head, 1), [packed])


def test_averages_are_over_all_processes(build, monkeypatch):
    head = build('tinaface', loss_landmark=dict(type='L1Loss')).bbox_head
    outs = outputs(head, 1)
    visible = torch.tensor([[1] * 5, [0] * 5])
    alone = losses_of(head, outs, [annotated(FACES, visible)])
    # As if the other process had seen three times as many.
    monkeypatch.setattr(
        'polynl_mm.faces.head.reduce_mean', lambda count: count * 2
    )
    shared = losses_of(head, outs, [annotated(FACES, visible)])
    assert alone.keys() == {
        'loss_cls', 'loss_bbox', 'loss_landmark', 'loss_iou'
    }  # fmt: skip
    for key, loss in alone.items():
        assert shared[key].item() == pytest.approx(loss.item() / 2, rel=1e-5)


# ----------------------------------- matching, ignored regions, padding


def assigned(head, boxes, **kwargs):
    """Labels (n,) and label weights (n,) of all anchors."""
    s = annotated(boxes, **kwargs)
    sizes = [(128 // stride, 128 // stride) for stride in (8, 16, 32)]
    anchors, flags = head.get_anchors(sizes, [s.metainfo], device='cpu')
    labels, weights, *_ = head.get_targets(
        anchors, flags, [s.gt_instances], [s.metainfo], [s.ignored_instances]
    )
    return torch.cat(labels, 1)[0], torch.cat(weights, 1)[0]


def test_matching_by_hand(build):
    """On P3, anchors of 16 and 32 pixels around (4 + 8 i, 4 + 8 j)."""
    head = build('p3-p5').bbox_head
    anchors = anchors_of(head)
    # Centred on (36, 36), 32 wide: that anchor itself, and the four that are
    # 8 pixels away (IoU 24 / 40); 8 pixels in both (IoU 576 / 1472) match,
    # too, 16 pixels away (IoU 16 / 48) do not.
    labels, _ = assigned(head, [[20, 20, 52, 52]])
    found = anchors[labels == 0]
    sides = found[:, 2] - found[:, 0]
    centres = (found[:, :2] + found[:, 2:]) / 2 - 36
    assert (sides == 32).all()
    assert sorted(centres.tolist()) == [
        [x, y] for x in (-8, 0, 8) for y in (-8, 0, 8)
    ]

    # 8 pixels wide in an anchor of 16: an IoU of 0.25, the best there is.
    labels, _ = assigned(head, [[32, 32, 40, 40]])
    assert anchors[labels == 0].tolist() == [[28, 28, 44, 44]]
    # 7 pixels: 0.19, below min_pos_iou.
    labels, _ = assigned(head, [[32, 32, 39, 39]])
    assert not (labels == 0).any()


@pytest.mark.parametrize('faces', [FACES[:1], []], ids=['face', 'no face'])
def test_ignored_regions_give_no_loss(build, faces):
    region = [64, 0, 128, 128]
    head = build('p2-p6', train_cfg=dict(neg_pos_ratio=None)).bbox_head
    outs = outputs(head, 1)
    ignoring = annotated(faces, ignored=[region])
    losses_of(head, outs, [ignoring])['loss_cls'].backward()
    touched = flat([m.grad for m in outs[0]], 1)[0, :, 0] != 0

    x1, y1, x2, y2 = anchors_of(head).unbind(1)
    inside = (x2.clamp(max=128) - x1.clamp(min=64)).clamp(min=0) * (
        y2.clamp(max=128) - y1.clamp(min=0)
    ).clamp(min=0)
    ignored = inside / ((x2 - x1) * (y2 - y1)) > 0.5
    assert ignored.any() and not ignored.all()
    match = match_loop(anchors_of(head).tolist(), faces, 0.5, 0.3)
    between = torch.tensor([m is None for m in match])
    assert torch.equal(touched, ~ignored & ~between)


def test_padding_has_no_loss_and_changes_nothing(build):
    """Two pictures of different sizes; the small one's padding is dead."""
    model = build(
        'p2-p6',
        train_cfg=dict(neg_pos_ratio=None),
        test_cfg=dict(score_thr=0.0, nms_pre=200),
    )
    head = model.bbox_head
    small = annotated(FACES[:1], size=(64, 64))
    outs = outputs(head, 2)
    losses_of(head, outs, [annotated(FACES), small])['loss_cls'].backward()
    for level, (stride, _) in zip(outs[0], head.prior_generator.strides):
        valid = math.ceil(64 / stride)
        assert not level.grad[1, :, valid:].any()
        assert not level.grad[1, :, :, valid:].any()
        assert level.grad[1, :, :valid, :valid].any()
        assert level.grad[0, :, valid:].any()

    # From pictures to losses, as a runner goes.
    generator = torch.Generator().manual_seed(0)
    samples = [annotated(FACES), annotated(FACES[:1], size=(57, 63))]
    inputs = [
        torch.randint(
            256, (3, *s.img_shape), generator=generator, dtype=torch.uint8
        )
        for s in samples
    ]
    data = model.data_preprocessor(
        dict(inputs=inputs, data_samples=samples), training=True
    )
    assert data['inputs'].shape == (2, 3, 128, 128)
    assert data['data_samples'][1].pad_shape == (64, 64)
    losses = model(**data, mode='loss')
    assert all(loss.isfinite() for loss in losses.values())
    model.eval()
    found = model(**data, mode='predict')[1].pred_instances
    assert found.bboxes[:, 0::2].max() <= 63
    assert found.bboxes[:, 1::2].max() <= 57


# ------------------------------------------------------------- prediction


def told(head, faces, points, scores, size=128):
    """Predictions by which the best anchor of each face finds it exactly."""
    anchors = anchors_of(head, size)
    preds = [torch.zeros(len(anchors), width) for width in (1, 4, 10)]
    preds[0] -= 20
    chosen = []
    for face, five, score in zip(faces, points, scores):
        ious = bbox_overlaps(anchors, face[None])[:, 0]
        ious[chosen] = -1
        best = ious.argmax()
        chosen.append(best.item())
        preds[0][best] = math.log(score / (1 - score))
        preds[1][best] = head.bbox_coder.encode(
            anchors[best][None], face[None]
        )[0]
        preds[2][best] = head.landmark_coder.encode(
            anchors[best][None], five[None]
        ).flatten()
    outs, start = [[], [], [], []], 0
    for stride, _ in head.prior_generator.strides:
        side = math.ceil(size / stride)
        count = side * side * head.num_base_priors
        for maps, pred in zip(outs, preds):
            level = pred[start : start + count].reshape(side, side, -1)
            maps.append(level.permute(2, 0, 1)[None])
        start += count
    return outs


def tensors(*rows):
    return torch.tensor(rows, dtype=torch.float32)


def three_faces():
    """Three faces, the second a worse double of the first; best last."""
    boxes = tensors([10, 12, 42, 50], [11, 12, 43, 50], [70, 20, 112, 61])
    points = landmarks_in(boxes.tolist()) + tensors(
        [[0, 0]], [[3, 3]], [[0, 0]]
    )
    return boxes, points, [0.8, 0.6, 0.9]


def meta(**kwargs):
    return dict(META, scale_factor=(1.0, 1.0), **kwargs)


def test_landmarks_stay_with_their_boxes_through_nms(build):
    head = build('p2-p6').bbox_head
    boxes, points, scores = three_faces()
    outs = told(head, boxes, points, scores)
    (found,) = head.predict_by_feat(*outs, batch_img_metas=[meta()])
    assert_close(found.scores, torch.tensor([0.9, 0.8]))
    assert_close(found.bboxes, boxes[[2, 0]], rtol=0, atol=1e-3)
    assert_close(found.keypoints, points[[2, 0]], rtol=0, atol=1e-3)
    assert found.keypoints.dtype == torch.float32
    assert found.labels.tolist() == [0, 0]
    (found,) = head.predict_by_feat(
        *outs, batch_img_metas=[meta()], with_nms=False
    )
    assert len(found) == 3


def test_pixels_of_the_original_picture(build):
    head = build('p2-p6').bbox_head
    boxes, points, scores = three_faces()
    outs = told(head, boxes, points, scores)
    scaled = dict(META, scale_factor=(2.0, 0.5))
    (found,) = head.predict_by_feat(
        *outs, batch_img_metas=[scaled], rescale=True
    )
    unit = torch.tensor([2.0, 0.5])
    assert_close(
        found.bboxes, boxes[[2, 0]] / unit.repeat(2), rtol=0, atol=1e-3
    )
    assert_close(found.keypoints, points[[2, 0]] / unit, rtol=0, atol=1e-3)
    (found,) = head.predict_by_feat(*outs, batch_img_metas=[scaled])
    assert_close(found.bboxes, boxes[[2, 0]], rtol=0, atol=1e-3)
    assert_close(found.keypoints, points[[2, 0]], rtol=0, atol=1e-3)


def test_boxes_are_clipped_and_landmarks_are_not(build):
    head = build('p2-p6').bbox_head
    boxes = tensors([-10, 100, 40, 150])
    points = landmarks_in(boxes.tolist()) - tensors([20, -10])
    outs = told(head, boxes, points, [0.9])
    (found,) = head.predict_by_feat(*outs, batch_img_metas=[meta()])
    assert_close(found.bboxes, tensors([0, 100, 40, 128]), atol=1e-3, rtol=0)
    assert_close(found.keypoints, points, atol=1e-3, rtol=0)
    assert points.min() < 0 and points.max() > 128


@pytest.mark.parametrize('key', ['nms_pre', 'max_per_img'])
def test_limits(build, key):
    """In mmdet, -1 drops the last; -2 and 0 have no meaning at all."""
    boxes, points, scores = three_faces()

    def count(limit):
        head = build('p2-p6', test_cfg={key: limit}).bbox_head
        outs = told(head, boxes[[0, 2]], points[[0, 2]], [0.8, 0.9])
        return len(head.predict_by_feat(*outs, batch_img_metas=[meta()])[0])

    assert (count(-1), count(1), count(2), count(9)) == (2, 1, 2, 2)
    for bad in (0, -2):
        with pytest.raises(ValueError, match=rf'test_cfg.{key} .*, got {bad}'):
            count(bad)


@pytest.mark.parametrize('rescale', [False, True])
def test_min_height_in_the_original(build, rescale):
    boxes, points, scores = three_faces()  # 38 and 41 pixels high

    def count(min_height, scale):
        test_cfg = dict(min_height=min_height)
        head = build('p2-p6', test_cfg=test_cfg).bbox_head
        outs = told(head, boxes, points, scores)
        metas = [dict(META, scale_factor=(0.01, scale))]
        return len(
            head.predict_by_feat(
                *outs, batch_img_metas=metas, rescale=rescale
            )[0]
        )

    assert (count(39, 1.0), count(37, 1.0), count(42, 1.0)) == (1, 2, 0)
    assert (count(39, 2.0), count(20, 2.0), count(19 - 1e-3, 2.0)) == (0, 1, 2)


def test_score_of_softmax(build):
    head = build('p3-p5').bbox_head
    outs = outputs(head, 1)
    (found,) = head.predict_by_feat(
        *outs, batch_img_metas=[meta()], with_nms=False
    )
    face, background = flat(outs[0], 2)[0].detach().unbind(1)
    expected = (face - background).sigmoid()
    # Boxes that end up outside the picture are gone.
    assert 0.5 * len(expected) < len(found) <= len(expected)
    gaps = (found.scores[:, None] - expected).abs().amin(1)
    assert gaps.max() < 1e-6
    best = found.scores.argmax()
    assert_close(found.scores[best], expected.max())


def test_score_with_iou(build):
    changes = dict(
        loss_iou=dict(type='CrossEntropyLoss', use_sigmoid=True),
        iou_score_exponents=(0.5, 2.0),
    )
    head = build('p2-p6', test_cfg=dict(score_thr=0.2), **changes).bbox_head
    boxes, points, _ = three_faces()
    outs = told(head, boxes[[0, 2]], points[[0, 2]], [0.81, 0.64])
    logit = math.log(0.5 / 0.5)
    outs[3] = [torch.full_like(level, logit) for level in outs[0]]
    (found,) = head.predict_by_feat(*outs, batch_img_metas=[meta()])
    # sqrt(0.81) / 4; sqrt(0.64) / 4 = 0.2 does not pass, though its class
    # alone would.
    assert_close(found.scores, torch.tensor([0.225]))
    head.iou_score_exponents = (1.0, 0.0)
    (found,) = head.predict_by_feat(*outs, batch_img_metas=[meta()])
    assert_close(found.scores, torch.tensor([0.81, 0.64]))


@pytest.mark.parametrize('name', NAMES)
def test_nothing_found(build, name):
    model = build(name, test_cfg=dict(score_thr=0.999)).eval()
    samples = [sample([], size=(128, 128))]
    data = dict(inputs=torch.zeros(1, 3, 128, 128), data_samples=samples)
    with torch.no_grad():
        found = model(**data, mode='predict')[0].pred_instances
    assert found.bboxes.shape == (0, 4)
    assert found.scores.shape == found.labels.shape == (0,)
    if name != 'tinaface':
        assert found.keypoints.shape == (0, 5, 2)
        assert found.keypoints.dtype == torch.float32
    else:
        assert 'keypoints' not in found


# --------------------------------------------------------------- training


def drawn(boxes, size, generator):
    """A dark noisy picture with bright faces and dark landmarks."""
    picture = torch.rand(3, *size, generator=generator) * 60
    for box, points in zip(boxes, landmarks_in(boxes)):
        x1, y1, x2, y2 = map(round, box)
        picture[:, y1:y2, x1:x2] += 150
        for x, y in points.round().int().tolist():
            picture[:, y - 1 : y + 2, x - 1 : x + 2] = 0
    return picture


@pytest.mark.parametrize('name', NAMES)
def test_learns_one_batch(build, name):
    """Losses fall to near zero; faces and landmarks come back."""
    tina = name == 'tinaface'
    change = dict(loss_landmark=dict(type='SmoothL1Loss')) if tina else {}
    model = build(name, **change).train()
    generator = torch.Generator().manual_seed(0)
    sizes = [(64, 96), (96, 64)]
    boxes = [
        [[6, 10, 34, 46], [50, 14, 82, 54]],
        [[6, 6, 26, 30], [20, 44, 52, 86]],
    ]
    inputs = [drawn(each, size, generator) for each, size in zip(boxes, sizes)]
    samples = [annotated(each, size=s) for each, s in zip(boxes, sizes)]
    data = model.data_preprocessor(
        dict(inputs=inputs, data_samples=samples), training=True
    )
    steps, lr = 100, 0.01
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)
    first = None
    for _ in range(steps):
        losses = model(**data, mode='loss')
        first = first or {key: loss.item() for key, loss in losses.items()}
        optimizer.zero_grad()
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10)
        optimizer.step()
        schedule.step()
    for key in ('loss_cls', 'loss_landmark'):
        assert losses[key] < 0.06 * first[key]
    if tina:
        # 1 - DIoU; a cross entropy against a number below 1 stays above 0.
        assert losses['loss_bbox'] < 0.25 * first['loss_bbox']
        assert losses['loss_iou'] < 0.5 * first['loss_iou']
    else:
        assert losses['loss_bbox'] < 0.06 * first['loss_bbox']

    model.eval()
    with torch.no_grad():
        results = model(**data, mode='predict')
    for each, result in zip(boxes, results):
        found = result.pred_instances[: len(each)]
        assert found.scores.min() > 0.7
        found = found[found.bboxes[:, 0].argsort()]
        assert_close(found.bboxes, tensors(*each), rtol=0, atol=3)
        assert_close(found.keypoints, landmarks_in(each), rtol=0, atol=3)
