"""Metrics that mmdet lacks; importing this needs numpy alone."""

from .wider_face_ap import (
    average_precision,
    evaluate,
    load_wider_face_gt,
    precision_recall,
    read_predictions,
    write_predictions,
)

__all__ = [
    'average_precision',
    'evaluate',
    'load_wider_face_gt',
    'precision_recall',
    'read_predictions',
    'write_predictions',
]
