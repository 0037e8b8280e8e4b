"""Face detectors on mmdet's parts and their pictures."""

from .retinaface import LandmarkCoder, RetinaFaceHead
from .visualizer import FaceVisualizer

__all__ = [
    'FaceVisualizer',
    'LandmarkCoder',
    'RetinaFaceHead',
]
