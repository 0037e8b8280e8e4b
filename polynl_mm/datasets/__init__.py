"""Data sets that mmdet lacks."""

from .wider_face import WiderFaceDataset, read_bbx_gt

__all__ = ['WiderFaceDataset', 'read_bbx_gt']
