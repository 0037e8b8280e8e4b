"""Small data and configs of both hosts, and ways to start the tools."""

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / 'tools'

DET = """
_base_ = 'mmdet::_base_/default_runtime.py'
randomness = dict(seed=0)
norm = dict(type='SyncBN', requires_grad=True)
model = dict(
    type='RetinaNet',
    data_preprocessor=dict(
        type='DetDataPreprocessor', mean=[0.] * 3, std=[255.] * 3),
    backbone=dict(
        type='polynl_mm.Insert', into='ResNet', depth=50, base_channels=4,
        norm_cfg=norm, norm_eval=False, zero_init_residual=False,
        out_indices=(1, 2, 3),
        blocks=[dict(
            after='layer3.*',
            cfg=dict(type='polynl_mm.PolyNL2d', beta_init=0.1))]),
    neck=dict(
        type='FPN', in_channels=[32, 64, 128], out_channels=8, num_outs=3),
    bbox_head=dict(
        type='RetinaHead', num_classes=2, in_channels=8, stacked_convs=1,
        feat_channels=8,
        anchor_generator=dict(
            type='AnchorGenerator', octave_base_scale=4, scales_per_octave=1,
            ratios=[1.], strides=[8, 16, 32]),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder'),
        loss_cls=dict(type='FocalLoss', use_sigmoid=True),
        loss_bbox=dict(type='L1Loss')),
    train_cfg=dict(
        assigner=dict(type='MaxIoUAssigner', pos_iou_thr=0.5,
                      neg_iou_thr=0.4, min_pos_iou=0),
        sampler=dict(type='PseudoSampler'),
        allowed_border=-1, pos_weight=-1, debug=False),
    test_cfg=dict(
        nms_pre=100, min_bbox_size=0, score_thr=0.,
        nms=dict(type='nms', iou_threshold=0.5), max_per_img=10))
load = dict(type='LoadImageFromFile')
resize = dict(type='Resize', scale=(64, 64), keep_ratio=False)
pack = dict(
    type='PackDetInputs',
    meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape',
               'scale_factor'))
data = dict(
    type='CocoDataset', data_root='data/det', ann_file='ann.json',
    data_prefix=dict(img='img'), metainfo=dict(classes=('a', 'b')))
train_dataloader = dict(
    batch_size=2, num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=True),
    batch_sampler=dict(type='AspectRatioBatchSampler'),
    dataset=dict(
        pipeline=[load, dict(type='LoadAnnotations', with_bbox=True), resize,
                  pack],
        **data))
val_dataloader = dict(
    batch_size=2, num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(test_mode=True, pipeline=[load, resize, pack], **data))
test_dataloader = val_dataloader
val_evaluator = dict(
    type='CocoMetric', ann_file='data/det/ann.json', metric='bbox')
test_evaluator = val_evaluator
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(
    type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=4)]
"""

SEG = """
_base_ = 'mmseg::_base_/default_runtime.py'
randomness = dict(seed=0)
norm = dict(type='SyncBN', requires_grad=True)
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor', mean=[0.] * 3, std=[255.] * 3,
        size=(64, 64), pad_val=0, seg_pad_val=255),
    backbone=dict(
        type='ResNetV1c', depth=50, base_channels=4, stem_channels=8,
        norm_cfg=norm, out_indices=(3,),
        plugins=[dict(
            cfg=dict(type='polynl_mm.PolyNL2d'),
            stages=(False, False, True, False), position='after_conv3')]),
    decode_head=dict(
        type='FCNHead', in_channels=128, channels=8, num_convs=1,
        norm_cfg=norm, num_classes=2, align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', avg_non_ignore=True)),
    train_cfg=dict(), test_cfg=dict(mode='whole'))
pack = dict(type='PackSegInputs')
pipeline = [
    dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), pack]
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='TestTimeAug', transforms=[
        [dict(type='RandomFlip', prob=0.), dict(type='RandomFlip', prob=1.)],
        [dict(type='LoadAnnotations')], [pack]])]
loader = dict(
    batch_size=2, num_workers=0,
    dataset=dict(
        type='BaseSegDataset', data_root='data/seg', img_suffix='.png',
        seg_map_suffix='.png',
        data_prefix=dict(img_path='img', seg_map_path='ann'),
        metainfo=dict(classes=('a', 'b'), palette=[[0] * 3, [255] * 3]),
        pipeline=pipeline))
train_dataloader = dict(
    sampler=dict(type='InfiniteSampler', shuffle=True), **loader)
val_dataloader = dict(
    sampler=dict(type='DefaultSampler', shuffle=False), **loader)
test_dataloader = val_dataloader
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator
train_cfg = dict(type='IterBasedTrainLoop', max_iters=2, val_interval=2)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(
    type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01, momentum=0.9))
param_scheduler = [
    dict(type='PolyLR', power=0.9, begin=0, end=4, by_epoch=False)]
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=1),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=2),
    visualization=dict(type='SegVisualizationHook', interval=1))
"""


def write_data(folder, images=8):
    """Squares in two colours, as COCO instances and as label maps."""
    rng = np.random.default_rng(0)
    for name in ('det/img', 'seg/img', 'seg/ann'):
        (folder / name).mkdir(parents=True)
    coco = dict(
        images=[],
        annotations=[],
        categories=[dict(id=1, name='a'), dict(id=2, name='b')],
    )
    for i in range(images):
        picture = rng.integers(0, 99, (64, 64, 3), np.uint8)
        label = np.zeros((64, 64), np.uint8)
        x, y = (int(v) for v in rng.integers(4, 30, 2))
        picture[y : y + 24, x : x + 24] = (250, 40, 0) if i % 2 else 240
        label[y : y + 24, x : x + 24] = 1
        cv2.imwrite(str(folder / f'det/img/{i}.png'), picture)
        cv2.imwrite(str(folder / f'seg/img/{i}.png'), picture)
        cv2.imwrite(str(folder / f'seg/ann/{i}.png'), label)
        coco['images'].append(
            dict(id=i, file_name=f'{i}.png', width=64, height=64)
        )
        coco['annotations'].append(
            dict(
                id=i + 1,
                image_id=i,
                category_id=1 + i % 2,
                bbox=[x, y, 24, 24],
                area=576,
                iscrowd=0,
            )
        )
    (folder / 'det/ann.json').write_text(json.dumps(coco))


@pytest.fixture(scope='session')
def place(tmp_path_factory):
    """Give a folder with ``det.py``, ``seg.py`` and their data."""
    folder = tmp_path_factory.mktemp('place')
    write_data(folder / 'data')
    (folder / 'det.py').write_text(DET)
    (folder / 'seg.py').write_text(SEG)
    return folder


@pytest.fixture(scope='session')
def start(place):
    """Give a function that starts a tool in a fresh process, in ``place``.

    It takes the tool's file name or path, its arguments, and environment
    variables.
    """

    def start(tool, *args, **env):
        # Files, as a full pipe would stop one process of a job for ever.
        out, err = (tempfile.TemporaryFile('w+') for _ in range(2))
        process = subprocess.Popen(
            ['bash' if str(tool).endswith('.sh') else sys.executable]
            + [str(TOOLS / tool), *map(str, args)],
            cwd=place,
            env={
                **os.environ,
                'PATH': os.pathsep.join(
                    [os.path.dirname(sys.executable), os.environ['PATH']]
                ),
                # More threads only get in each other's way here.
                'OMP_NUM_THREADS': '1',
                # The tests ask for several processes on any machine.
                'CUDA_VISIBLE_DEVICES': '',
                **env,
            },
            stdout=out,
            stderr=err,
        )
        return process, out, err

    return start


@pytest.fixture(scope='session')
def finish():
    """Give a function that waits for what ``start`` started."""

    def finish(started):
        process, *files = started
        code = process.wait(timeout=300)
        texts = []
        for file in files:
            file.seek(0)
            texts.append(file.read())
            file.close()
        return SimpleNamespace(code=code, out=texts[0], err=texts[1])

    return finish


@pytest.fixture(scope='session')
def free_port():
    """Give a function that finds a port for a distributed job."""

    def free_port():
        with socket.socket() as probe:
            probe.bind(('127.0.0.1', 0))
            return str(probe.getsockname()[1])

    return free_port
