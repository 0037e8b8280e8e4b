"""RetinaFace's head: class, box, five landmarks and, if wanted, IoU.

The rest of the detector is mmdet's: ``SingleStageDetector`` with
``neck=[dict(type='FPN', ...), dict(type='SSH', ...)]``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

import torch
from mmcv.cnn import ConvModule
from mmdet.models.dense_heads import AnchorHead
from mmdet.models.utils import filter_scores_and_topk
from mmdet.registry import MODELS as DET_MODELS
from mmdet.registry import TASK_UTILS as DET_TASK_UTILS
from mmdet.structures.bbox import bbox_overlaps
from mmdet.utils import reduce_mean
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData
from torch import Tensor, nn

from polynl_mm.registry import MODELS, TASK_UTILS

from .landmarks import NUM_LANDMARKS

_LANDMARK_CODER = dict(type='polynl_mm.LandmarkCoder')
_INIT_CFG = dict(
    type='Normal',
    layer='Conv2d',
    std=0.01,
    override=dict(type='Normal', name='conv_cls', std=0.01, bias_prob=0.01),
)


@TASK_UTILS.register_module()
class LandmarkCoder:
    """Landmarks relative to an anchor.

    Per axis (point - centre of the anchor) / (std * size of the anchor), as
    in RetinaFace (Deng et al., CVPR 2020).

    Args:
        std (float): Above 0. 1 in the official code, 0.1 in its best-known
            port to PyTorch.

    Raises:
        ValueError: ``std`` is not above 0.
    """

    def __init__(self, std: float = 0.1) -> None:
        """Check the argument."""
        if not std > 0:
            raise ValueError(f'std must be above 0, got {std}')
        self.std = std

    def encode(self, anchors: Tensor, points: Tensor) -> Tensor:
        """Give the offsets of points.

        Shape:
            - anchors: (n, 4), x1 y1 x2 y2 in pixels, of positive size
            - points: (n, 5, 2), x y in pixels
            - output: (n, 5, 2)
        """
        centre, unit = self._frame(anchors)
        return (points - centre) / unit

    def decode(self, anchors: Tensor, offsets: Tensor) -> Tensor:
        """Give the points of offsets, the inverse of :meth:`encode`.

        Shape:
            - anchors: (n, 4), x1 y1 x2 y2 in pixels
            - offsets: (n, 10) or (n, 5, 2)
            - output: (n, 5, 2), x y in pixels
        """
        centre, unit = self._frame(anchors)
        return offsets.reshape(-1, NUM_LANDMARKS, 2) * unit + centre

    def _frame(self, anchors: Tensor) -> tuple[Tensor, Tensor]:
        low, high = anchors[:, None, :2], anchors[:, None, 2:]
        return (low + high) / 2, (high - low) * self.std


@MODELS.register_module()
class RetinaFaceHead(AnchorHead):
    """Head of RetinaFace and its relatives, TinaFace among them.

    RetinaFace: Deng et al., CVPR 2020, https://arxiv.org/abs/1905.00641;
    TinaFace: Zhu et al., https://arxiv.org/abs/2011.13183. Anchors, matching,
    sampling, box code and losses are mmdet's, by config.

    Training needs ``gt_instances.bboxes`` and ``labels``, and for the
    landmark branch ``keypoints`` (n, 5, 2), float pixels, and
    ``keypoints_visible`` (n, 5), above 0 where the point is annotated; what
    stands at other points is not read. Faces without width or height are
    passed over, and so is, with ``ignore_iof_thr`` of the assigner, what lies
    in ``ignored_instances``, in a picture without any other face, too (there,
    mmdet alone would take it for background).

    Losses: ``loss_cls`` and ``loss_bbox`` are sums over the batch divided by
    the number of its positive anchors, ``loss_landmark`` is divided by the
    number of those whose face has a landmark, ``loss_iou`` by the positives
    again; the numbers are means over all processes and at least 1. All
    predictions and losses are float32, under autocast, too.

    ``train_cfg`` is that of :class:`mmdet.models.AnchorHead` (``assigner``,
    ``sampler``, ``allowed_border``, ``pos_weight``), with one more:

    - ``neg_pos_ratio`` (float, optional): hard-negative mining as in SSD: per
      picture, only so many times as many negatives as positives enter the
      classification loss, those where it is largest. A picture without a
      positive then has no classification loss.

    ``test_cfg``: ``score_thr``, ``nms``, ``min_bbox_size`` as everywhere in
    mmdet; and

    - ``nms_pre`` (per level) and ``max_per_img``: -1, or none given, is no
      limit (elsewhere in mmdet, -1 cuts off the last detection);
    - ``min_height`` (float, optional): boxes that are less high than this, in
      pixels of the original picture, are dropped before NMS; TinaFace takes 9
      on WIDER Face.

    Args:
        num_classes (int): Without background.
        in_channels (int): Of all feature maps.
        stacked_convs (int): 3x3 convolutions of ``feat_channels`` in each of
            the two towers (class; box, landmarks and IoU), which all levels
            share. 0 in RetinaFace, 4 in TinaFace.
        conv_cfg, norm_cfg (dict, optional): Of the towers.
        kernel_size (int): Of the predictors, odd: 1 in RetinaFace, 3 in
            TinaFace.
        share_predictors (bool): One set of predictors for all levels, as in
            the paper, or one per level, as in the public codes.
        loss_landmark (dict, optional): Such as ``SmoothL1Loss``, on encoded
            landmarks. None: no branch.
        landmark_coder (dict): See :class:`LandmarkCoder`.
        loss_iou (dict, optional): ``CrossEntropyLoss`` with ``use_sigmoid``,
            against the IoU of the decoded box and its face. None: no branch.
        iou_score_exponents (tuple[float, float]): a, b. With the IoU branch,
            the score is class ** a * IoU ** b.
        init_cfg (dict, optional): The default starts the class at
            probability 0.01 where it is a sigmoid.
        **kwargs: Of :class:`mmdet.models.AnchorHead`: ``feat_channels``,
            ``anchor_generator``, ``bbox_coder``, ``train_cfg``, ``test_cfg``;
            ``loss_cls``, ``FocalLoss`` or ``CrossEntropyLoss``, whose
            ``use_sigmoid`` decides between sigmoid and softmax;
            ``loss_bbox``, on deltas, or with ``reg_decoded_bbox=True`` on
            boxes (``DIoULoss``, ``GIoULoss``, ...).

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        num_classes: int = 1,
        in_channels: int = 256,
        *,
        stacked_convs: int = 0,
        conv_cfg: dict | None = None,
        norm_cfg: dict | None = None,
        kernel_size: int = 1,
        share_predictors: bool = True,
        loss_landmark: dict | None = None,
        landmark_coder: dict = _LANDMARK_CODER,
        loss_iou: dict | None = None,
        iou_score_exponents: tuple[float, float] = (0.8, 1.2),
        init_cfg: dict | None = _INIT_CFG,
        **kwargs,
    ) -> None:
        """Check the arguments and build the parts."""
        if stacked_convs < 0:
            raise ValueError(
                f'stacked_convs must be 0 or more, got {stacked_convs}'
            )
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(
                f'kernel_size must be odd and above 0, got {kernel_size}'
            )
        if len(iou_score_exponents) != 2 or min(iou_score_exponents) < 0:
            raise ValueError(
                'iou_score_exponents must be two numbers of 0 or more, got '
                f'{iou_score_exponents}'
            )
        ratio = (kwargs.get('train_cfg') or {}).get('neg_pos_ratio')
        if ratio is not None and not ratio > 0:
            raise ValueError(
                f'neg_pos_ratio must be None or above 0, got {ratio}'
            )
        self.stacked_convs = stacked_convs
        self.conv_cfg = conv_cfg
        self.norm_cfg = norm_cfg
        self.kernel_size = kernel_size
        self.share_predictors = share_predictors
        self.with_landmarks = loss_landmark is not None
        self.with_iou = loss_iou is not None
        self.iou_score_exponents = iou_score_exponents
        self.neg_pos_ratio = ratio
        super().__init__(num_classes, in_channels, init_cfg=init_cfg, **kwargs)
        if self.with_landmarks:
            self.landmark_coder = DET_TASK_UTILS.build(landmark_coder)
            self.loss_landmark = DET_MODELS.build(loss_landmark)
        if self.with_iou:
            self.loss_iou = DET_MODELS.build(loss_iou)

    def _init_layers(self) -> None:
        self.cls_convs = self._tower()
        self.reg_convs = self._tower()
        self.conv_cls = self._predictors(self.cls_out_channels)
        self.conv_reg = self._predictors(self.bbox_coder.encode_size)
        if self.with_landmarks:
            self.conv_landmark = self._predictors(2 * NUM_LANDMARKS)
        if self.with_iou:
            self.conv_iou = self._predictors(1)

    def _tower(self) -> nn.Sequential:
        inputs = [self.in_channels, self.feat_channels]
        return nn.Sequential(
            *(
                ConvModule(
                    inputs[i > 0],
                    self.feat_channels,
                    3,
                    padding=1,
                    conv_cfg=self.conv_cfg,
                    norm_cfg=self.norm_cfg,
                )
                for i in range(self.stacked_convs)
            )
        )

    def _predictors(self, outputs: int) -> nn.ModuleList:
        levels = (
            1 if self.share_predictors else self.prior_generator.num_levels
        )
        channels = (
            self.feat_channels if self.stacked_convs else self.in_channels
        )
        return nn.ModuleList(
            nn.Conv2d(
                channels,
                self.num_base_priors * outputs,
                self.kernel_size,
                padding=self.kernel_size // 2,
            )
            for _ in range(levels)
        )

    def forward(self, x: Sequence[Tensor]) -> tuple:
        """Predict on all levels.

        Args:
            x (Sequence[Tensor]): A map (B, in_channels, H, W) per stride of
                the anchors, finest first.

        Returns:
            tuple: With A anchors per position, lists over the levels of
            ``cls_scores`` (B, A * num_classes, H, W) (for softmax: + A),
            ``bbox_preds`` (B, A * 4, H, W), ``landmark_preds``
            (B, A * 10, H, W) and ``iou_preds`` (B, A, H, W), before any
            activation, float32; the last two are empty without their branch.

        Raises:
            ValueError: There are not as many maps as strides.
        """
        if len(x) != self.prior_generator.num_levels:
            raise ValueError(
                f'{len(x)} feature maps, but anchor_generator has strides '
                f'{self.prior_generator.strides}'
            )
        cls_feats = [self.cls_convs(level) for level in x]
        reg_feats = [self.reg_convs(level) for level in x]
        return (
            _apply(self.conv_cls, cls_feats),
            _apply(self.conv_reg, reg_feats),
            _apply(self.conv_landmark, reg_feats)
            if self.with_landmarks
            else (),
            _apply(self.conv_iou, reg_feats) if self.with_iou else (),
        )

    def _get_targets_single(
        self,
        flat_anchors: Tensor,
        valid_flags: Tensor,
        gt_instances: InstanceData,
        img_meta: dict,
        gt_instances_ignore: InstanceData | None = None,
        unmap_outputs: bool = True,
    ) -> tuple:
        targets = super()._get_targets_single(
            flat_anchors,
            valid_flags,
            gt_instances,
            img_meta,
            gt_instances_ignore,
            unmap_outputs,
        )
        if gt_instances_ignore is None or len(gt_instances.bboxes):
            return targets
        # MaxIoUAssigner looks at ignored boxes only where there are others:
        # let them be both, and take what it marks as lying in them.
        both = InstanceData(
            bboxes=gt_instances_ignore.bboxes,
            labels=flat_anchors.new_zeros(
                len(gt_instances_ignore.bboxes), dtype=torch.long
            ),
        )
        assigned = self.assigner.assign(
            InstanceData(priors=flat_anchors), both, both
        )
        label_weights = targets[1]
        label_weights[assigned.max_overlaps < 0] = 0
        return targets

    def loss_by_feat(
        self,
        cls_scores: list[Tensor],
        bbox_preds: list[Tensor],
        landmark_preds: Sequence[Tensor],
        iou_preds: Sequence[Tensor],
        batch_gt_instances: list[InstanceData],
        batch_img_metas: list[dict],
        batch_gt_instances_ignore: list[InstanceData | None] | None = None,
    ) -> dict[str, Tensor]:
        """Compute the losses; see the class.

        Args:
            cls_scores, bbox_preds, landmark_preds, iou_preds (list[Tensor]):
                What :meth:`forward` gives.
            batch_gt_instances (list[InstanceData]): Faces of each picture.
            batch_img_metas (list[dict]): ``img_shape``, ``pad_shape``.
            batch_gt_instances_ignore (list, optional): What to ignore.

        Returns:
            dict[str, Tensor]: Scalars ``loss_cls``, ``loss_bbox`` and, with
            their branches, ``loss_landmark`` and ``loss_iou``.

        Raises:
            ValueError: The landmark branch is on and a picture with faces has
                no landmarks, or not five per face, or was resized after
                packing, by which boxes move and landmarks do not.
        """
        if self.with_landmarks:
            for faces, meta in zip(batch_gt_instances, batch_img_metas):
                _check_landmarks(faces, meta)
        # The code of a box without area holds log(0).
        batch_gt_instances = [
            faces[(faces.bboxes[:, 2:] > faces.bboxes[:, :2]).all(1)]
            for faces in batch_gt_instances
        ]
        anchor_list, valid_flag_list = self.get_anchors(
            [level.shape[-2:] for level in cls_scores],
            batch_img_metas,
            device=cls_scores[0].device,
        )
        labels, label_weights, bbox_targets, _, _, sampled = self.get_targets(
            anchor_list,
            valid_flag_list,
            batch_gt_instances,
            batch_img_metas,
            batch_gt_instances_ignore,
            return_sampling_results=True,
        )
        # From (B, anchors of the level, ...) per level to (B, anchors, ...).
        labels = torch.cat(labels, 1)
        label_weights = torch.cat(label_weights, 1)
        bbox_targets = torch.cat(bbox_targets, 1)
        positive = (labels >= 0) & (labels < self.num_classes)
        num_positives = _mean_count(positive)

        losses = dict(
            loss_cls=self._classification_loss(
                cls_scores, labels, label_weights, positive
            )
            / num_positives
        )
        # From here on, only positive anchors, p of them. They come picture
        # by picture and in the order of the anchors, as in `sampled`.
        anchors = torch.cat(anchor_list[0])[positive.nonzero()[:, 1]]
        deltas = _flatten(bbox_preds, self.bbox_coder.encode_size)[positive]
        boxes = None
        if self.reg_decoded_bbox or self.with_iou:
            boxes = self.bbox_coder.decode(anchors, deltas)
        losses['loss_bbox'] = self.loss_bbox(
            boxes if self.reg_decoded_bbox else deltas,
            bbox_targets[positive],
            avg_factor=num_positives,
        )
        if self.with_landmarks:
            keypoints, visible = _assigned_landmarks(
                batch_gt_instances, sampled
            )
            targets = self.landmark_coder.encode(anchors, keypoints)
            offsets = _flatten(landmark_preds, 2 * NUM_LANDMARKS)[positive]
            offsets = offsets.reshape(targets.shape)
            # Picked, not weighted by 0: an absent point may be anything.
            losses['loss_landmark'] = self.loss_landmark(
                offsets[visible],
                targets[visible],
                avg_factor=_mean_count(visible.any(1)),
            )
        if self.with_iou:
            faces = torch.cat([result.pos_gt_bboxes for result in sampled])
            overlaps = bbox_overlaps(boxes.detach(), faces, is_aligned=True)
            losses['loss_iou'] = self.loss_iou(
                _flatten(iou_preds, 1)[positive].squeeze(1),
                overlaps,
                avg_factor=num_positives,
            )
        return losses

    def _classification_loss(
        self,
        cls_scores: list[Tensor],
        labels: Tensor,
        label_weights: Tensor,
        positive: Tensor,
    ) -> Tensor:
        """Sum it over all anchors, or over positives and hard negatives.

        Shape: labels, label_weights, positive (B, anchors).
        """
        loss = self.loss_cls(
            _flatten(cls_scores, self.cls_out_channels).flatten(0, 1),
            labels.flatten(),
            label_weights.flatten(),
            reduction_override='none',
        )
        loss = loss.reshape(*labels.shape, -1).sum(2)
        if self.neg_pos_ratio is None:
            return loss.sum()
        # Hardest first; then anchors of weight 0, whose loss is 0; positives.
        hardness = loss.detach().masked_fill(positive, -1)
        rank = hardness.argsort(1, descending=True).argsort(1)
        wanted = self.neg_pos_ratio * positive.sum(1, keepdim=True)
        return loss[positive | (rank < wanted)].sum()

    def predict_by_feat(
        self,
        cls_scores: list[Tensor],
        bbox_preds: list[Tensor],
        landmark_preds: Sequence[Tensor],
        iou_preds: Sequence[Tensor],
        batch_img_metas: list[dict],
        cfg: dict | None = None,
        rescale: bool = False,
        with_nms: bool = True,
    ) -> list[InstanceData]:
        """Detect faces.

        Args:
            cls_scores, bbox_preds, landmark_preds, iou_preds (list[Tensor]):
                What :meth:`forward` gives.
            batch_img_metas (list[dict]): ``img_shape``, and ``scale_factor``
                if anything is asked in pixels of the original picture.
            cfg (dict, optional): Instead of ``test_cfg``; see the class.
            rescale (bool): Give pixels of the original picture instead of
                the network's input.
            with_nms (bool): Whether to suppress overlapping boxes.

        Returns:
            list[InstanceData]: Per picture, best first after NMS: ``bboxes``
            (n, 4), ``scores`` (n,), ``labels`` (n,), and with the landmark
            branch ``keypoints`` (n, 5, 2), all but the labels float32.
            Boxes are clipped to the picture if the box coder does so;
            landmarks never are, as a face may reach beyond the border.

        Raises:
            ValueError: ``nms_pre`` or ``max_per_img`` is 0 or below -1.
        """
        cfg = ConfigDict(self.test_cfg if cfg is None else cfg)
        for key in ('nms_pre', 'max_per_img'):
            cfg[key] = _limit(key, cfg.get(key, -1))
        priors = self.prior_generator.grid_priors(
            [level.shape[-2:] for level in cls_scores],
            dtype=cls_scores[0].dtype,
            device=cls_scores[0].device,
        )
        none = [None] * len(cls_scores)
        maps = (
            cls_scores,
            bbox_preds,
            landmark_preds or none,
            iou_preds or none,
        )
        return [
            self._bbox_post_process(
                InstanceData.cat(
                    [
                        self._candidates(
                            *(
                                None if pred is None else pred[i].detach()
                                for pred in level
                            ),
                            priors=anchors,
                            img_shape=meta['img_shape'],
                            cfg=cfg,
                        )
                        for *level, anchors in zip(*maps, priors)
                    ]
                ),
                cfg=cfg,
                rescale=rescale,
                with_nms=with_nms,
                img_meta=meta,
            )
            for i, meta in enumerate(batch_img_metas)
        ]

    def scores_of(
        self, cls_scores: Tensor, iou_preds: Tensor | None
    ) -> Tensor:
        """Give the scores of predictions, see ``iou_score_exponents``.

        Shape:
            - cls_scores: (..., num_classes), for softmax one more
            - iou_preds: (..., 1)
            - output: (..., num_classes), in [0, 1]
        """
        if self.use_sigmoid_cls:
            scores = cls_scores.sigmoid()
        else:
            scores = cls_scores.softmax(-1)[..., :-1]
        if iou_preds is None:
            return scores
        class_exponent, iou_exponent = self.iou_score_exponents
        return scores**class_exponent * iou_preds.sigmoid() ** iou_exponent

    def _candidates(
        self,
        cls_score: Tensor,
        bbox_pred: Tensor,
        landmark_pred: Tensor | None,
        iou_pred: Tensor | None,
        *,
        priors: Tensor,
        img_shape: tuple[int, int],
        cfg: ConfigDict,
    ) -> InstanceData:
        """Decode the best anchors of one level of one picture.

        Shape: predictions (A * ., H, W), priors (H * W * A, 4).
        """

        count = len(priors)

        def rows(pred):
            return pred.permute(1, 2, 0).reshape(count, -1)

        scores = self.scores_of(
            rows(cls_score), None if iou_pred is None else rows(iou_pred)
        )
        scores, labels, kept, _ = filter_scores_and_topk(
            scores, cfg.get('score_thr', 0), cfg.nms_pre
        )
        priors = priors[kept]
        found = InstanceData(
            bboxes=self.bbox_coder.decode(
                priors, rows(bbox_pred)[kept], max_shape=img_shape
            ),
            scores=scores,
            labels=labels,
        )
        if landmark_pred is not None:
            found.keypoints = self.landmark_coder.decode(
                priors, rows(landmark_pred)[kept]
            )
        return found

    def _bbox_post_process(
        self,
        results: InstanceData,
        cfg: ConfigDict,
        rescale: bool = False,
        with_nms: bool = True,
        img_meta: dict | None = None,
    ) -> InstanceData:
        min_height = cfg.get('min_height')
        if min_height is not None:
            heights = results.bboxes[:, 3] - results.bboxes[:, 1]
            heights = heights / img_meta['scale_factor'][1]
            results = results[heights >= min_height]
        if rescale and self.with_landmarks:
            results.keypoints = (
                results.keypoints
                / results.keypoints.new_tensor(img_meta['scale_factor'])
            )
        return super()._bbox_post_process(
            results, cfg, rescale, with_nms, img_meta
        )


def _apply(predictors: nn.ModuleList, feats: list[Tensor]) -> list[Tensor]:
    """Apply the predictor of each level, or the only one, to its map."""
    return [
        predictors[level % len(predictors)](feat).float()
        for level, feat in enumerate(feats)
    ]


def _flatten(maps: Sequence[Tensor], width: int) -> Tensor:
    """Bring maps (B, A * width, H, W) into the order of all anchors.

    Shape: (B, anchors, width).
    """
    return torch.cat(
        [
            level.permute(0, 2, 3, 1).reshape(len(level), -1, width)
            for level in maps
        ],
        1,
    )


def _mean_count(mask: Tensor) -> Tensor:
    """Count, as a mean over all processes and at least 1."""
    return reduce_mean(mask.sum().float()).clamp(min=1)


def check_batch_augments(cfg: dict, phases: Iterable[str]) -> None:
    """Refuse to train landmarks on batches that are resized after packing.

    Args:
        cfg (dict): A config with ``model``.
        phases (Iterable[str]): Of the job; nothing is looked at unless
            'train' is among them.

    Raises:
        ValueError: An augmentation of batches moves boxes, or nobody knows
            that it does not; says which.
    """
    model = cfg['model']
    if 'train' not in phases:
        return
    if not (model.get('bbox_head') or {}).get('loss_landmark'):
        return
    owner = model.get('data_preprocessor') or cfg.get('data_preprocessor')
    for augment in (owner or {}).get('batch_augments') or ():
        if augment['type'].rpartition('.')[2] != 'BatchFixedSizePad':
            raise ValueError(
                f'data_preprocessor.batch_augments has {augment["type"]}, '
                'which moves no landmarks, expected BatchFixedSizePad or '
                'none; resize in the pipeline'
            )


def _check_landmarks(faces: InstanceData, meta: dict) -> None:
    picture = meta.get('img_path', 'a picture')
    if not len(faces.bboxes):
        return
    for key, shape in (
        ('bboxes', (4,)),
        ('keypoints', (NUM_LANDMARKS, 2)),
        ('keypoints_visible', (NUM_LANDMARKS,)),
    ):
        value = faces.get(key)
        expected = (len(faces.bboxes), *shape)
        if value is None or value.shape != expected:
            got = 'none' if value is None else tuple(value.shape)
            raise ValueError(
                f'{picture}: gt_instances.{key} must have the shape '
                f'{expected}, got {got}; polynl_mm.LoadAnnotations('
                'with_keypoints=True) and polynl_mm.PackDetInputs give it, '
                'and without landmarks train with loss_landmark=None'
            )
    shape = tuple(meta['img_shape'][:2])
    if tuple(meta.get('landmark_shape', shape)) != shape:
        raise ValueError(
            f'{picture}: resized from {meta["landmark_shape"]} to {shape} '
            'after packing, by which boxes move and landmarks do not: take '
            'what resizes a batch, such as BatchSyncRandomResize, out of '
            'data_preprocessor.batch_augments, and resize in the pipeline'
        )


def _assigned_landmarks(
    batch_gt_instances: list[InstanceData], sampled: list
) -> tuple[Tensor, Tensor]:
    """Give the landmarks of each positive anchor's face.

    Returns:
        tuple[Tensor, Tensor]: Points (p, 5, 2) and whether they are there,
        bool (p, 5).
    """
    points, visible = [], []
    for faces, result in zip(batch_gt_instances, sampled):
        if not len(faces.bboxes):
            continue
        points.append(faces.keypoints[result.pos_assigned_gt_inds])
        visible.append(faces.keypoints_visible[result.pos_assigned_gt_inds])
    if not points:
        none = sampled[0].pos_priors.new_zeros(0, NUM_LANDMARKS, 2)
        return none, none[..., 0] > 0
    return torch.cat(points).float(), torch.cat(visible) > 0


def _limit(key: str, value: int) -> int:
    """Read a number of detections, where -1 is no limit."""
    if value == -1:
        return sys.maxsize
    if value < 1:
        raise ValueError(
            f'test_cfg.{key} must be above 0, or -1 for no limit, got {value}'
        )
    return value
