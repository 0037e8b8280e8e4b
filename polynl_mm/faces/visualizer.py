"""Pictures of faces with their landmarks."""

from __future__ import annotations

import numpy as np
import torch
from mmdet.visualization import DetLocalVisualizer
from mmengine.structures import InstanceData

from polynl_mm.registry import VISUALIZERS

# Left and right eye, nose, left and right corner of the mouth; RGB.
_COLORS = (
    (255, 0, 0),
    (0, 0, 255),
    (0, 255, 0),
    (255, 0, 255),
    (255, 255, 0),
)


@VISUALIZERS.register_module()
class FaceVisualizer(DetLocalVisualizer):
    """Draws landmarks into the pictures of mmdet's visualiser.

    ``keypoints`` (n, 5, 2), pixels, of ground truth and of predictions become
    dots, in one colour per landmark and of a size that goes with the box; of
    the ground truth, those with ``keypoints_visible`` (n, 5) above 0. Where
    there are none, the picture is mmdet's. Used by mmdet's
    ``DetVisualizationHook``::

        visualizer=dict(type='polynl_mm.FaceVisualizer',
                        vis_backends=[dict(type='LocalVisBackend')],
                        name='visualizer')

    Args: see :class:`mmdet.visualization.DetLocalVisualizer`.
    """

    def _draw_instances(
        self,
        image: np.ndarray,
        instances: InstanceData,
        classes: list[str] | None,
        palette: list[tuple] | None,
    ) -> np.ndarray:
        drawn = super()._draw_instances(image, instances, classes, palette)
        if 'keypoints' not in instances or not len(instances):
            return drawn
        # mmdet's browse_dataset.py has them as arrays.
        boxes = torch.as_tensor(instances.bboxes)
        keypoints = torch.as_tensor(instances.keypoints)
        sides = (boxes[:, 2:] - boxes[:, :2]).amin(1)
        # Diameters in pixels, which matplotlib wants as squares of points.
        sizes = (sides / 12).clamp(2, 10) * 72 / self.dpi
        size = keypoints.new_tensor((self.width, self.height))
        for landmark, color in enumerate(_COLORS):
            points = keypoints[:, landmark]
            # A point beyond the border would make matplotlib zoom out.
            shown = ((points >= 0) & (points <= size)).all(1)
            if 'keypoints_visible' in instances:
                visible = torch.as_tensor(instances.keypoints_visible)
                shown &= visible[:, landmark] > 0
            if shown.any():
                self.draw_points(
                    points[shown],
                    # One each: matplotlib takes a single RGB for three
                    # values to be mapped, where there are three points.
                    [color] * int(shown.sum()),
                    sizes=(sizes[shown] ** 2).numpy(),
                )
        return self.get_image()
