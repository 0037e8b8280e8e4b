"""How often the class of a picture is among the best k."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mmengine.evaluator import BaseMetric
from torch import Tensor

from polynl_mm.registry import METRICS

TOP = (1, 5)


@METRICS.register_module()
class Accuracy(BaseMetric):
    """Top-k accuracy, in percent, by counting.

    A data sample has ``gt_label``, an int, and ``pred_scores``, (K,). What
    counts is the place of the truth among the scores, from 0; of equal
    scores, the lower class comes first, so that no result depends on a sort.
    (A softmax in float32 makes those equal, namely 0, that are more than 100
    below the best before it.)
    Places are collected, not means: any split of the samples over processes
    gives the same numbers.

    Reports ``accuracy/top1`` and so on, as mmpretrain does.

    Args:
        topk (Sequence[int]): The k.
        collect_device (str): See :class:`mmengine.evaluator.BaseMetric`.
        prefix (str, optional): See there; ``accuracy`` if None.
        collect_dir (str, optional): See there.

    Raises:
        ValueError: A k is below 1, or above the number of classes; a sample
            has no label; there are not as many scores as the data set has
            classes, or one is not finite.
    """

    default_prefix = 'accuracy'

    def __init__(
        self,
        topk: Sequence[int] = TOP,
        collect_device: str = 'cpu',
        prefix: str | None = None,
        collect_dir: str | None = None,
    ) -> None:
        """Check what is asked for."""
        super().__init__(collect_device, prefix, collect_dir)
        self.topk = tuple(topk)
        if not self.topk or min(self.topk) < 1:
            raise ValueError(f'topk must be numbers from 1, got {topk}')

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        """Keep the places of a batch.

        Args:
            data_batch: Not used.
            data_samples: See the class.
        """
        for sample in data_samples:
            path, scores = sample.get('img_path'), sample['pred_scores']
            classes = (self.dataset_meta or {}).get('classes')
            count = len(scores) if classes is None else len(classes)
            label = sample.get('gt_label')
            if label is None or not 0 <= label < len(scores) == count:
                raise ValueError(
                    f'{path}: class {label} of {count} in the data set, but '
                    f'the model has {len(scores)} (num_classes)'
                )
            check_topk(self.topk, count)
            if not scores.isfinite().all():
                raise ValueError(f'{path}: a score is not finite')
            self.results.append(place(scores, label))

    def compute_metrics(self, results: list[int]) -> dict[str, float]:
        """Count.

        Args:
            results: The places of all processes.
        """
        return {
            f'top{k}': 100 * sum(p < k for p in results) / len(results)
            for k in self.topk
        }


def check_topk(topk: Sequence[int], count: int) -> None:
    """Raise ValueError if there are not as many classes."""
    if max(topk) > count:
        raise ValueError(
            f'topk={tuple(topk)}, but there are only {count} classes'
        )


def place(scores: Tensor, label: int) -> int:
    """Give how many classes come before this one.

    Args:
        scores: (K,), finite.
        label: From 0.
    """
    before = scores > scores[label]
    before[:label] |= scores[:label] == scores[label]
    return int(torch.count_nonzero(before))
