"""What of a detector of mmdet is exported.

Of a single-stage detector whose boxes are decoded place by place: all boxes
and scores, on which NMS is to follow. Of any other: the maps of backbone and
neck.
"""

from __future__ import annotations

import numpy as np
import torch
from mmdet.models.dense_heads import RTMDetInsHead
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.detectors import SingleStageDetector
from mmdet.structures import DetDataSample
from torch import Tensor, nn

from polynl_mm.faces.head import RetinaFaceHead


def exported(detector: nn.Module) -> Candidates | Features:
    """Give what of a detector is exported.

    Raises:
        ValueError: ``test_cfg`` asks for an NMS that is not the plain one, or
            pictures are taken in tiles.
    """
    if hasattr(detector, 'tiling'):
        raise ValueError(
            "model.type='polynl_mm.Tiled' is not exported, as tiles are cut "
            'around the network and share their context: set model.type to '
            'what model.detector is, and leave tile and overlap out'
        )
    head = getattr(detector, 'bbox_head', None)
    if isinstance(detector, SingleStageDetector) and _decodes_plainly(head):
        return Candidates(detector)
    return Features(detector)


def _decodes_plainly(head: nn.Module) -> bool:
    """Whether its boxes are those that :class:`Candidates` gives."""
    return isinstance(head, (RetinaFaceHead, RTMDetInsHead)) or all(
        getattr(type(head), name, None) is getattr(BaseDenseHead, name)
        for name in ('predict_by_feat', '_predict_by_feat_single')
    )


class Features(nn.Module):
    """The maps of backbone and neck.

    Shape: (B, 3, H, W) -> as many maps (B, C, h, w) as the neck gives.
    """

    nms = None

    def __init__(self, detector: nn.Module) -> None:
        """Take a detector of mmdet."""
        super().__init__()
        self.detector = detector

    def output_names(self, count: int) -> list[str]:
        """Name them, finest first."""
        return [f'feat{level}' for level in range(count)]

    @property
    def what(self) -> str:
        """What is exported, for the user."""
        heads = [
            f'{name} ({type(module).__name__})'
            for name, module in self.detector.named_children()
            if name not in ('data_preprocessor', 'backbone', 'neck')
        ]
        return 'maps of backbone and neck, without ' + ', '.join(heads)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute them."""
        return tuple(self.detector.extract_feat(x))


class Candidates(nn.Module):
    """Boxes and scores of all anchors or points, and landmarks of faces.

    In pixels of the input; boxes are clipped to it if the box coder clips.
    ``nms`` is what is to follow, see :mod:`polynl_mm.engine.nms`.

    Shape:
        - input: (B, 3, H, W)
        - boxes: (B, N, 4), x1 y1 x2 y2
        - scores: of each level, (B, num_classes, n)
        - factors: with a centerness or the like, (B, 1, N), by which mmdet
          multiplies scores that have passed its filters
        - keypoints: with landmarks, (B, N, 5, 2), x y

    Raises:
        ValueError: ``test_cfg`` asks for an NMS that is not the plain one.
    """

    def __init__(self, detector: nn.Module) -> None:
        """Take a detector of mmdet; look at its ``test_cfg``."""
        super().__init__()
        self.detector = detector
        head = self.head
        self.is_face = isinstance(head, RetinaFaceHead)
        self.has_landmarks = self.is_face and head.with_landmarks
        cfg = head.test_cfg or {}
        nms = dict(cfg.get('nms') or {})
        # How many boxes mmcv takes at once, whatever it finds.
        nms.pop('split_thr', None)
        if (
            nms.pop('type', 'nms') != 'nms'
            or nms.pop('class_agnostic', False)
            or nms.keys() - {'iou_threshold'}
        ):
            raise ValueError(
                f'model.test_cfg.nms={cfg.nms} is not exported, as the '
                'standard operator knows plain NMS within each class alone: '
                "set model.test_cfg.nms=\"dict(type='nms', "
                'iou_threshold=0.5)"'
            )
        self.nms = dict(
            levels=head.prior_generator.num_levels,
            keypoints=self.has_landmarks,
            iou_threshold=nms.get('iou_threshold', 1.0),
            score_thr=cfg.get('score_thr', 0),
            nms_pre=cfg.get('nms_pre', -1),
            max_per_img=cfg.get('max_per_img', -1),
            min_size=cfg.get('min_bbox_size', -1),
            min_height=cfg.get('min_height', -1) if self.is_face else -1,
        )

    @property
    def head(self) -> nn.Module:
        """The detector's."""
        return self.detector.bbox_head

    def output_names(self, count: int) -> list[str]:
        """Name them, before NMS."""
        levels = self.nms['levels']
        names = ['boxes', *(f'scores{level}' for level in range(levels))]
        names.append('points' if self.has_landmarks else 'factors')
        return names[:count]

    @property
    def what(self) -> str:
        """What is exported, for the user."""
        outputs = ['dets', 'labels', 'keypoints'][: 2 + self.has_landmarks]
        masks = isinstance(self.head, RTMDetInsHead)
        return (
            f'the whole detector with NMS: {", ".join(outputs)}'
            + ', without masks' * masks
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute them."""
        head, batch = self.head, x.shape[0]
        cls_scores, bbox_preds, *rest = head(self.detector.extract_feat(x))
        priors = head.prior_generator.grid_priors(
            [level.shape[-2:] for level in cls_scores],
            dtype=cls_scores[0].dtype,
            device=x.device,
        )
        # As one long list, which is how the coders take them.
        priors = torch.cat(priors).repeat(batch, 1)
        width = head.bbox_coder.encode_size
        deltas = _rows(bbox_preds, width).reshape(-1, width)
        boxes = head.bbox_coder.decode(priors, deltas)
        boxes = boxes.reshape(batch, -1, 4)
        if getattr(head.bbox_coder, 'clip_border', True):
            boxes = _clip(boxes, x.shape[2], x.shape[3])
        scores = [
            level.transpose(1, 2) for level in self._scores(cls_scores, rest)
        ]
        if rest and not self.is_face and not isinstance(head, RTMDetInsHead):
            factors = _rows(rest[0], 1).sigmoid()
            return boxes, *scores, factors.transpose(1, 2)
        if not self.has_landmarks:
            return boxes, *scores
        offsets = _rows(rest[0], 10).reshape(-1, 10)
        points = head.landmark_coder.decode(priors, offsets)
        return boxes, *scores, points.reshape(batch, -1, 5, 2)

    def _scores(self, cls_scores, rest) -> list[Tensor]:
        """Of each level, (B, n, num_classes)."""
        head = self.head
        rows = [_rows([level], head.cls_out_channels) for level in cls_scores]
        if self.is_face:
            others = [_rows([level], 1) for level in rest[1]]
            others = others or [None] * len(rows)
            return [head.scores_of(*level) for level in zip(rows, others)]
        if head.use_sigmoid_cls:
            return [level.sigmoid() for level in rows]
        return [level.softmax(2)[..., :-1] for level in rows]

    @torch.no_grad()
    def detect(self, x: Tensor) -> list[np.ndarray]:
        """Give what mmdet finds, on pictures that fill the input.

        Returns:
            list[ndarray]: Of each picture, (n, 6) or with landmarks (n, 16):
            x1, y1, x2, y2, score, label, x, y of each landmark.
        """
        size = tuple(x.shape[2:])
        meta = dict.fromkeys(
            ('img_shape', 'ori_shape', 'pad_shape', 'batch_input_shape'), size
        )
        samples = [
            DetDataSample(metainfo=dict(meta, scale_factor=(1.0, 1.0)))
            for _ in x
        ]
        found = []
        for sample in self.detector.predict(x, samples, rescale=False):
            each = sample.pred_instances
            columns = [each.bboxes, each.scores[:, None], each.labels[:, None]]
            if self.has_landmarks:
                columns.append(each.keypoints.flatten(1))
            found.append(torch.cat(columns, 1).numpy())
        return found


def _rows(maps: list[Tensor], width: int) -> Tensor:
    """Maps (B, A * width, h, w) as rows of anchors (B, n, width)."""
    return torch.cat(
        [
            # Not len(), which a tracer takes for a constant.
            level.permute(0, 2, 3, 1).reshape(level.shape[0], -1, width)
            for level in maps
        ],
        1,
    )


def _clip(boxes: Tensor, height: int, width: int) -> Tensor:
    """Clip boxes (..., 4) to a picture, not in place, as exporters ask."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack(
        [
            x1.clamp(0, width),
            y1.clamp(0, height),
            x2.clamp(0, width),
            y2.clamp(0, height),
        ],
        -1,
    )
