"""Data sets that mmdet lacks, and transforms that know landmarks."""

from . import transforms
from .wider_face import (
    FLIP_INDICES,
    LANDMARKS,
    LandmarkLabels,
    WiderFaceDataset,
    read_bbx_gt,
    read_file_list,
    read_landmark_labels,
)

__all__ = [
    'FLIP_INDICES',
    'LANDMARKS',
    'LandmarkLabels',
    'WiderFaceDataset',
    'read_bbx_gt',
    'read_file_list',
    'read_landmark_labels',
    'transforms',
]
