"""Poly-NL, a non-local layer of linear complexity, for OpenMMLab models.

The package itself imports nothing: :mod:`polynl_mm.ops` needs only torch,
:mod:`polynl_mm.layers` needs mmengine and mmcv, and what is bound to mmdet or
mmseg is imported only where that host is installed.
"""

__version__ = '0.1.0'
