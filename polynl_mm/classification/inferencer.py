"""The best classes of a picture, drawn on it."""

from __future__ import annotations

import os

import mmcv
import numpy as np
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.infer import BaseInferencer
from mmengine.structures import BaseDataElement
from torch import nn

# The shorter side of a drawing in pixels, so that text is readable.
_LEAST_SIDE = 384


class ClsInferencer(BaseInferencer):
    """Draws the best classes of pictures, see ``tools/demo.py``.

    Its arguments are those of :class:`mmengine.infer.BaseInferencer`; inputs
    are paths of pictures. The names of the classes are those of the data set
    that the checkpoint was trained on; without one, they are numbers.
    """

    visualize_kwargs = {'out_dir', 'top'}

    def _load_weights_to_model(
        self, model: nn.Module, checkpoint: dict | None, cfg: Config
    ) -> None:
        super()._load_weights_to_model(model, checkpoint, cfg)
        meta = (checkpoint or {}).get('meta') or {}
        self.classes = (meta.get('dataset_meta') or {}).get('classes')

    def _init_pipeline(self, cfg: Config) -> Compose:
        steps = Compose(cfg.test_dataloader.dataset.pipeline)
        return Compose([_as_data, *steps.transforms])

    def visualize(
        self,
        inputs: list[str],
        preds: list[BaseDataElement],
        out_dir: str = '',
        top: int = 5,
    ) -> list[np.ndarray]:
        """Draw.

        Args:
            inputs: Paths of the pictures.
            preds: What the model gives of each.
            out_dir: Where ``vis/<name of the picture>`` is written; '' writes
                nothing.
            top: How many classes are drawn, at most as many as there are.

        Returns:
            The drawings, (H, W, 3) uint8 RGB.
        """
        drawings = []
        for path, sample in zip(inputs, preds):
            image = mmcv.imread(path, channel_order='rgb')
            factor = _LEAST_SIDE / min(image.shape[:2])
            if factor > 1:
                image = mmcv.imrescale(image, factor)
            self.visualizer.set_image(image)
            self.visualizer.draw_texts(
                '\n'.join(
                    f'{100 * score:5.1f} % {name}'
                    for name, score in self._best(sample, top)
                ),
                np.array([[8, 8]]),
                font_sizes=16,
                colors='white',
                font_families='monospace',
                bboxes=dict(facecolor='black', alpha=0.7, edgecolor='none'),
            )
            drawings.append(self.visualizer.get_image())
            if out_dir:
                mmcv.imwrite(
                    drawings[-1][..., ::-1],
                    os.path.join(out_dir, 'vis', os.path.basename(path)),
                )
        return drawings

    def _best(self, sample: BaseDataElement, top: int) -> list:
        scores = sample.pred_scores
        classes = self.classes or range(len(scores))
        best = scores.topk(min(top, len(scores)))
        return [
            (str(classes[i]), value)
            for value, i in zip(best.values.tolist(), best.indices.tolist())
        ]

    def postprocess(
        self,
        preds: list[BaseDataElement],
        visualization: list[np.ndarray],
        return_datasamples: bool = False,
    ) -> dict:
        """Give the predictions, as names and scores unless told otherwise."""
        if not return_datasamples:
            preds = [dict(self._best(sample, 5)) for sample in preds]
        return dict(predictions=preds, visualization=visualization)


def _as_data(path: str) -> dict:
    return dict(img_path=path)
