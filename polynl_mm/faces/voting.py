"""Test-time augmentation with box voting."""

from __future__ import annotations

import torch
from mmcv.ops import nms
from mmdet.models.test_time_augs import DetTTAModel
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import bbox_flip
from mmengine.structures import InstanceData
from torch import Tensor

from polynl_mm.registry import MODELS

from .landmarks import FLIP_INDICES


def vote_boxes(
    boxes: Tensor,
    scores: Tensor,
    values: Tensor,
    iou_threshold: float = 0.4,
    keep_single: bool = True,
    max_num: int = 750,
) -> tuple[Tensor, Tensor]:
    """Merge overlapping boxes into score-weighted means.

    The best box and all that overlap it with at least ``iou_threshold`` make
    a cluster; then the best of the rest does, and so on. This is the box
    voting of RetinaFace's official test code, with its IoU that counts a
    width as x2 - x1 + 1. Pairs of boxes are looked at a million at a time.

    Args:
        boxes (Tensor): (n, 4), x1 y1 x2 y2 in pixels.
        scores (Tensor): (n,), not negative.
        values (Tensor): (n, d), what is averaged with the scores as weights;
            the boxes themselves may be among it.
        iou_threshold (float): In (0, 1].
        keep_single (bool): Whether a box that no other joined counts. The
            official code drops it, unless it is the last of the picture; that
            hides true faces that only one view has found.
        max_num (int): Give at most so many clusters, the best; above 0.

    Returns:
        tuple[Tensor, Tensor]: Averages (m, d), and the highest score of each
        cluster (m,), in descending order, equal ones in that of the input;
        m <= max_num.
    """
    if not len(boxes):
        return values[:0], scores[:0]
    # nms takes what is above its threshold, not equal to it, and puts equal
    # scores into any order: it gets ranks.
    below = torch.nextafter(torch.tensor(iou_threshold), torch.tensor(0.0))
    order = scores.argsort(descending=True, stable=True)
    ranks = torch.arange(len(order), 0, -1, device=order.device).float()
    best = nms(boxes[order].float(), ranks, below.item(), offset=1)[1]
    best = order[best]
    if keep_single:
        best = best[:max_num]
    cluster = _join(boxes.float(), boxes[best].float(), iou_threshold)
    # What is best in its own eyes may, by rounding, also overlap another.
    cluster[best] = torch.arange(len(best), device=best.device)

    joined = cluster < len(best)
    cluster, weights = cluster[joined], scores[joined].double()
    counts = cluster.bincount(minlength=len(best))
    # Any weight will do where all scores are 0.
    weights = weights.clamp(min=torch.finfo(torch.float32).tiny)
    sums = weights.new_zeros(len(best), 1 + values.shape[1])
    terms = torch.cat([weights[:, None], values[joined] * weights[:, None]], 1)
    sums.index_add_(0, cluster, terms)
    means = (sums[:, 1:] / sums[:, :1]).to(values.dtype)
    scores = scores[best]
    if not keep_single:
        kept = counts > 1
        kept[-1] = True
        means, scores = means[kept][:max_num], scores[kept][:max_num]
    return means, scores


def _join(boxes: Tensor, best: Tensor, iou_threshold: float) -> Tensor:
    """Give the first of ``best`` that each box overlaps, or their number.

    Shape: boxes (n, 4), best (k, 4), output (n,).
    """

    def area(x1, y1, x2, y2):
        return (x2 - x1 + 1).clamp(min=0) * (y2 - y1 + 1).clamp(min=0)

    others = best.unbind(1)
    first = []
    for part in boxes.split(max(1, 10**6 // len(best))):
        own = part[..., None].unbind(1)
        shared = area(
            *(torch.maximum(own[i], others[i]) for i in (0, 1)),
            *(torch.minimum(own[i], others[i]) for i in (2, 3)),
        )
        overlaps = shared / (area(*own) + area(*others) - shared)
        joins = overlaps >= iou_threshold
        first.append(
            torch.where(joins.any(1), joins.int().argmax(1), len(best))
        )
    return torch.cat(first)


@MODELS.register_module()
class BoxVotingTTAModel(DetTTAModel):
    """Merge the detections of several views of a picture by box voting.

    Boxes of all views, plain and mirrored, are brought back onto the original
    picture, pooled per class and merged by :func:`vote_boxes`; with them
    their ``keypoints`` (n, 5, 2), if there are any, left and right swapped
    where the view was mirrored. Run by ``tools/test.py --tta`` with this in
    the config::

        tta_model = dict(type='polynl_mm.BoxVotingTTAModel')
        tta_pipeline = [
            dict(type='LoadImageFromFile'),
            dict(type='TestTimeAug', transforms=[
                [dict(type='Resize', scale=scale, keep_ratio=True)
                 for scale in [(750, 500), (1200, 800), (1650, 1100),
                               (2100, 1400), (2550, 1700)]],
                [dict(type='RandomFlip', prob=0.),
                 dict(type='RandomFlip', prob=1.)],
                [dict(type='PackDetInputs')]])]

    Those are RetinaFace's scales. The views go through the network one after
    another, so the largest, not their number, decides the memory; ``Resize``
    bounds it, whatever the original's size: here, 2550 x 1700 pixels. A view
    without ``Resize`` to a ``scale`` is not bounded.

    Args:
        iou_threshold (float): To join the best box of a cluster, in (0, 1].
        keep_single (bool): Whether a box found in a single view counts; False
            is the official code's rule, see :func:`vote_boxes`.
        max_per_img (int): Detections per picture at most, above 0.
        **kwargs: ``module`` and ``data_preprocessor``, see
            :class:`mmengine.model.BaseTTAModel`.

    Raises:
        ValueError: An argument is out of range; in use: a view does not tell
            whether it is mirrored, or is so in another direction than
            'horizontal'.
    """

    def __init__(
        self,
        iou_threshold: float = 0.4,
        keep_single: bool = True,
        max_per_img: int = 750,
        **kwargs,
    ) -> None:
        """Check the arguments."""
        if not 0 < iou_threshold <= 1:
            raise ValueError(
                f'iou_threshold must be in (0, 1], got {iou_threshold}'
            )
        if max_per_img < 1:
            raise ValueError(f'max_per_img must be above 0, got {max_per_img}')
        super().__init__(**kwargs)
        self.iou_threshold = iou_threshold
        self.keep_single = keep_single
        self.max_per_img = max_per_img

    def _merge_single_sample(
        self, data_samples: list[DetDataSample]
    ) -> DetDataSample:
        views = InstanceData.cat([_unflipped(view) for view in data_samples])
        merged = InstanceData.cat(
            [
                self._merge(views[views.labels == label])
                for label in views.labels.unique()
            ]
            or [views]
        )
        order = merged.scores.argsort(descending=True, stable=True)
        result = data_samples[0]
        result.pred_instances = merged[order[: self.max_per_img]]
        return result

    def _merge(self, views: InstanceData) -> InstanceData:
        """Vote among the detections of one class."""
        values = [views.bboxes]
        if 'keypoints' in views:
            values.append(views.keypoints.flatten(1))
        means, scores = vote_boxes(
            views.bboxes,
            views.scores,
            torch.cat(values, 1),
            self.iou_threshold,
            self.keep_single,
            self.max_per_img,
        )
        merged = InstanceData(
            bboxes=means[:, :4],
            scores=scores,
            labels=views.labels[: len(means)],
        )
        if 'keypoints' in views:
            merged.keypoints = means[:, 4:].unflatten(
                1, views.keypoints.shape[1:]
            )
        return merged


def _unflipped(view: DetDataSample) -> InstanceData:
    """Give a view's detections on the picture that is not mirrored."""
    found = view.pred_instances
    if 'flip' not in view.metainfo:
        raise ValueError(
            f"{view.get('img_path', 'a picture')}: a view has no 'flip'; "
            'tta_pipeline needs RandomFlip (prob=0. is enough), and flip and '
            'flip_direction in meta_keys of PackDetInputs'
        )
    if not view.flip:
        return found
    if view.get('flip_direction') != 'horizontal':
        raise ValueError(
            f"flip_direction must be 'horizontal' in tta_pipeline, got "
            f'{view.get("flip_direction")!r}'
        )
    width = view.ori_shape[1]
    unflipped = InstanceData(
        bboxes=bbox_flip(found.bboxes, view.ori_shape),
        scores=found.scores,
        labels=found.labels,
    )
    if 'keypoints' in found:
        points = found.keypoints[:, list(FLIP_INDICES)]
        unflipped.keypoints = torch.stack(
            [width - points[..., 0], points[..., 1]], -1
        )
    return unflipped
