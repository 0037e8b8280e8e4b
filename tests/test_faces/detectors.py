"""Small detectors of RetinaFace's family, and annotations for them."""

import torch
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData

GN = dict(type='GN', num_groups=2)


def detector(start, levels, head, train_cfg, test_cfg):
    """ResNet-50, an eighth as wide, FPN, context modules and our head."""
    return dict(
        type='SingleStageDetector',
        data_preprocessor=dict(
            type='DetDataPreprocessor',
            mean=[127.5] * 3,
            std=[128.0] * 3,
            pad_size_divisor=32,
        ),
        backbone=dict(
            type='ResNet',
            depth=50,
            base_channels=8,
            norm_cfg=GN,
            norm_eval=False,
            zero_init_residual=False,
        ),
        neck=[
            dict(
                type='FPN',
                in_channels=[32, 64, 128, 256],
                start_level=start,
                out_channels=16,
                num_outs=levels,
                add_extra_convs='on_input',
            ),
            dict(
                type='SSH',
                num_scales=levels,
                in_channels=[16] * levels,
                out_channels=[16] * levels,
                norm_cfg=GN,
            ),
        ],
        bbox_head=dict(
            type='polynl_mm.RetinaFaceHead',
            in_channels=16,
            feat_channels=16,
            **head,
        ),
        train_cfg=dict(
            sampler=dict(type='PseudoSampler'),
            allowed_border=-1,
            pos_weight=-1,
            **train_cfg,
        ),
        test_cfg=dict(
            nms_pre=-1,
            score_thr=0.02,
            min_bbox_size=0,
            nms=dict(type='nms', iou_threshold=0.4),
            max_per_img=-1,
            **test_cfg,
        ),
    )


DETECTORS = {
    # Levels P3 to P5, two anchors per position, softmax and mining.
    'p3-p5': detector(
        start=1,
        levels=3,
        head=dict(
            share_predictors=False,
            anchor_generator=dict(
                type='AnchorGenerator',
                base_sizes=[16, 64, 256],
                scales=[1, 2],
                ratios=[1.0],
                strides=[8, 16, 32],
                centers=[(4, 4), (8, 8), (16, 16)],
            ),
            bbox_coder=dict(
                type='DeltaXYWHBBoxCoder', target_stds=(0.1, 0.1, 0.2, 0.2)
            ),
            loss_cls=dict(type='CrossEntropyLoss'),
            loss_bbox=dict(type='SmoothL1Loss', loss_weight=2.0),
            loss_landmark=dict(type='SmoothL1Loss'),
        ),
        train_cfg=dict(
            assigner=dict(
                type='MaxIoUAssigner',
                pos_iou_thr=0.35,
                neg_iou_thr=0.35,
                min_pos_iou=0.2,
                gt_max_assign_all=False,
                ignore_iof_thr=0.5,
            ),
            neg_pos_ratio=7,
        ),
        test_cfg={},
    ),
    # Levels P2 to P6 of the paper: three anchors per position.
    'p2-p6': detector(
        start=0,
        levels=5,
        head=dict(
            anchor_generator=dict(
                type='AnchorGenerator',
                octave_base_scale=4,
                scales_per_octave=3,
                ratios=[1.0],
                strides=[4, 8, 16, 32, 64],
            ),
            bbox_coder=dict(type='DeltaXYWHBBoxCoder'),
            loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=True),
            loss_bbox=dict(type='SmoothL1Loss', beta=1 / 9, loss_weight=0.25),
            loss_landmark=dict(
                type='SmoothL1Loss', beta=1 / 9, loss_weight=0.1
            ),
            landmark_coder=dict(type='polynl_mm.LandmarkCoder', std=1.0),
        ),
        train_cfg=dict(
            assigner=dict(
                type='MaxIoUAssigner',
                pos_iou_thr=0.5,
                neg_iou_thr=0.3,
                match_low_quality=False,
                ignore_iof_thr=0.5,
            ),
            neg_pos_ratio=3,
        ),
        test_cfg={},
    ),
    'tinaface': detector(
        start=0,
        levels=6,
        head=dict(
            stacked_convs=2,
            kernel_size=3,
            norm_cfg=GN,
            anchor_generator=dict(
                type='AnchorGenerator',
                octave_base_scale=2 ** (4 / 3),
                scales_per_octave=3,
                ratios=[1.3],
                strides=[4, 8, 16, 32, 64, 128],
            ),
            bbox_coder=dict(
                type='DeltaXYWHBBoxCoder', target_stds=(0.1, 0.1, 0.2, 0.2)
            ),
            reg_decoded_bbox=True,
            loss_cls=dict(
                type='FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25
            ),
            loss_bbox=dict(type='DIoULoss', loss_weight=2.0),
            loss_landmark=None,
            loss_iou=dict(type='CrossEntropyLoss', use_sigmoid=True),
        ),
        train_cfg=dict(
            assigner=dict(
                type='MaxIoUAssigner',
                pos_iou_thr=0.35,
                neg_iou_thr=0.35,
                min_pos_iou=0.35,
                gt_max_assign_all=False,
                ignore_iof_thr=0.5,
            ),
        ),
        test_cfg=dict(min_height=9),
    ),
}


def sample(boxes, keypoints=None, visible=None, ignored=(), size=(128, 128)):
    """A picture's annotation, as the pipeline packs it."""
    faces = InstanceData(
        bboxes=torch.tensor(boxes).float().reshape(-1, 4),
        labels=torch.zeros(len(boxes), dtype=torch.long),
    )
    if keypoints is not None:
        faces.keypoints = torch.as_tensor(keypoints).float().reshape(-1, 5, 2)
        faces.keypoints_visible = torch.as_tensor(visible).reshape(-1, 5)
    result = DetDataSample(
        metainfo=dict(
            img_path='event/name.jpg',
            img_shape=size,
            pad_shape=size,
            ori_shape=size,
            scale_factor=(1.0, 1.0),
        )
    )
    result.gt_instances = faces
    result.ignored_instances = InstanceData(
        bboxes=torch.tensor(ignored).float().reshape(-1, 4),
        labels=torch.zeros(len(ignored), dtype=torch.long),
    )
    return result


FIVE = torch.tensor(
    [[0.3, 0.4], [0.7, 0.4], [0.5, 0.6], [0.35, 0.8], [0.65, 0.8]]
)


def landmarks_in(boxes):
    """Five points (n, 5, 2) at their usual places in boxes (n, 4)."""
    boxes = torch.tensor(boxes).float().reshape(-1, 4)
    return boxes[:, None, :2] + FIVE * (
        boxes[:, None, 2:] - boxes[:, None, :2]
    )
