"""Average precision of WIDER Face as a metric of mmengine."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence

import numpy as np
import torch
from mmengine.evaluator import BaseMetric

from polynl_mm.registry import METRICS

from .ap import evaluate
from .files import load_wider_face_gt, prediction_path, write_predictions


@METRICS.register_module()
class WiderFaceMetric(BaseMetric):
    """AP of the settings easy, medium and hard, by the official protocol.

    For detectors of one class on :class:`~.dataset.WiderFaceDataset` (val),
    whatever the pipeline loads: the ground truth comes from the official
    files. The whole split is needed, as the scores of all pictures together
    set the thresholds::

        val_evaluator = dict(
            type='polynl_mm.WiderFaceMetric',
            gt_dir='data/WIDERFace/ground_truth')

    A data sample has ``img_id``, ``event/name`` without suffix (so
    ``meta_keys`` of ``PackDetInputs`` must list it), and ``pred_instances``
    with ``bboxes``, (n, 4) x1 y1 x2 y2 in pixels of the original picture,
    and ``scores``, (n,) of any finite range.

    Reports ``wider_face/easy``, ``wider_face/medium`` and
    ``wider_face/hard``: fractions in [0, 1], not rounded, nan where the
    setting keeps no face.

    Args:
        gt_dir (str, optional): ``eval_tools/ground_truth`` of the official
            evaluation, the folder with ``wider_face_val.mat`` and
            ``wider_{easy,medium,hard}_val.mat``. None only writes, for the
            test split, whose ground truth nobody has.
        out_dir (str, optional): Write the predictions here, before they are
            evaluated, in the form of the official tools: one
            ``event/name.txt`` per picture. What lies there of other pictures
            stays.
        missing_as_empty (bool): Count pictures that were not tested as
            pictures without detections, as the MATLAB toolbox does, instead
            of refusing.
        collect_device (str): See :class:`mmengine.evaluator.BaseMetric`.
        prefix (str, optional): See there; ``wider_face`` if None.
        collect_dir (str, optional): See there.

    Raises:
        FileNotFoundError: A file of the ground truth is not there.
        OSError: ``out_dir`` can not be made or written to.
        ValueError: Neither ``gt_dir`` nor ``out_dir`` is given; the ground
            truth is malformed; a sample is of no picture in it, without id,
            or of another class than 0, or its file would not lie in
            ``out_dir``; at the end, a picture was tested twice or not at all,
            or a number is not finite.
    """

    default_prefix = 'wider_face'

    def __init__(
        self,
        gt_dir: str | None,
        out_dir: str | None = None,
        missing_as_empty: bool = False,
        collect_device: str = 'cpu',
        prefix: str | None = None,
        collect_dir: str | None = None,
    ) -> None:
        """Read the ground truth, so that a wrong path shows at once."""
        super().__init__(collect_device, prefix, collect_dir)
        self.gt_dir = gt_dir
        if gt_dir is None and out_dir is None:
            raise ValueError('gt_dir or out_dir expected, got neither')
        self.gt = None if gt_dir is None else load_wider_face_gt(gt_dir)
        self._images = frozenset(self.gt.images if self.gt else ())
        if out_dir is not None:
            try:
                os.makedirs(out_dir, exist_ok=True)
                tempfile.TemporaryFile(dir=out_dir).close()
            except OSError as error:
                raise OSError(
                    f'out_dir={out_dir} can not be written: {error.strerror}'
                ) from error
        self.out_dir = out_dir
        self.missing_as_empty = missing_as_empty

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        """Keep the predictions of a batch.

        Args:
            data_batch (dict): Not used.
            data_samples (Sequence[dict]): See the class.
        """
        for sample in data_samples:
            image = sample.get('img_id')
            if self.gt is not None and image not in self._images:
                raise ValueError(
                    f'{self.gt_dir}: the ground truth has no picture '
                    f'img_id={image!r}, expected an event/name such as '
                    f'{self.gt.images[0]!r} (does meta_keys of the pipeline '
                    f'list img_id?)'
                )
            if self.out_dir is not None:
                # At once, not when all pictures are done.
                prediction_path(self.out_dir, image)
            found = sample['pred_instances']
            classes = np.unique(_numpy(found.get('labels', ()))).tolist()
            if classes not in ([], [0]):
                raise ValueError(
                    f'{image}: got detections of the classes {classes}, '
                    f'expected a detector of one class, 0'
                )
            # Of float32 corners the sides are exact in float64.
            corners = _numpy(found['bboxes']).reshape(-1, 4)
            sides = corners[:, 2:] - corners[:, :2]
            rows = [corners[:, :2], sides, _numpy(found['scores'])]
            self.results.append((image, np.column_stack(rows)))

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Write the predictions of all processes, if asked to; evaluate them.

        Args:
            results (list[tuple[str, ndarray]]): The picture and its (n, 5)
                predictions.

        Returns:
            dict[str, float]: ``easy``, ``medium``, ``hard``; nothing without
            ground truth.
        """
        predictions = dict(results)
        if self.out_dir is not None:
            write_predictions(self.out_dir, predictions)
        if len(predictions) < len(results):
            raise ValueError(
                f'{len(results)} pictures were tested, but only '
                f'{len(predictions)} different ones: some more than once'
            )
        if self.gt is None:
            return {}
        return evaluate(self.gt, predictions, self.missing_as_empty)


def _numpy(values) -> np.ndarray:
    """Give a tensor of any device and precision, or an array, as float64."""
    return torch.as_tensor(values).double().cpu().numpy()
