"""Poly-NL and Poly-SA, layers of linear complexity, for OpenMMLab models.

The package itself imports nothing until one of its names is asked for.
:mod:`polynl_mm.ops`, :mod:`polynl_mm.layers` and :mod:`polynl_mm.attention`
need only torch, :mod:`polynl_mm.insertion` and :mod:`polynl_mm.fusion`
mmengine, and what is bound to mmdet or mmseg is imported only where that host
is installed.
"""

from importlib import import_module

__version__ = '0.1.0'

_HOME_OF = {
    'Params': '.ops',
    'PolyNL1d': '.layers',
    'PolyNL2d': '.layers',
    'PolyNL3d': '.layers',
    'PolySA': '.attention',
    'SAParams': '.ops.attention',
    'config_path': '.shipped',
    'fuse_poly_nl': '.fusion',
    'insert_blocks': '.insertion',
    'poly_nl': '.ops',
    'poly_sa': '.ops.attention',
    'replace_attention': '.replacement',
    'shared_context': '.context',
}


def __getattr__(name: str):
    if name in _HOME_OF:
        return getattr(import_module(_HOME_OF[name], __name__), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__():
    return sorted([*globals(), *_HOME_OF])
