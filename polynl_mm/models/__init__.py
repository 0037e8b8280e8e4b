"""Face detectors on mmdet's parts, their test-time model and pictures."""

from .retinaface import LandmarkCoder, RetinaFaceHead
from .tta import BoxVotingTTAModel, vote_boxes
from .visualizer import FaceVisualizer

__all__ = [
    'BoxVotingTTAModel',
    'FaceVisualizer',
    'LandmarkCoder',
    'RetinaFaceHead',
    'vote_boxes',
]
