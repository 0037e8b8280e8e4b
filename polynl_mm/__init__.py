"""Poly-NL, a non-local layer of linear complexity, for OpenMMLab models.

The package itself imports nothing until :func:`fuse_poly_nl` is asked for:
:mod:`polynl_mm.ops` needs only torch,
:mod:`polynl_mm.layers` needs mmengine and mmcv, and what is bound to mmdet or
mmseg is imported only where that host is installed.
"""

__version__ = '0.1.0'


def __getattr__(name: str):
    if name == 'fuse_poly_nl':
        from .fusion import fuse_poly_nl

        return fuse_poly_nl
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
