"""Where configs of packages lie, for those that inherit them.

mmengine reads ``_base_ = 'mmdet::...'`` from OpenMMLab's own packages alone,
and of those by the names of OpenMMLab's own distributions.
"""

from __future__ import annotations

import os
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

__all__ = ['config_path', 'know_forks']

_HERE = Path(__file__).resolve().parent


def config_path(name: str | os.PathLike) -> str:
    """Give the path of a config of this package, by its name.

    A config outside the package inherits it so, without an import statement,
    which would make mmengine take the config for one of its new style::

        _base_ = __import__('polynl_mm').config_path(
            'mask-rcnn_r50-polynl-res4_fpn_1x_coco')

    Args:
        name: That of the file, with or without ``.py``, and with or
            without folders (``'_base_/polynl'``), or how it begins where no
            other begins so (``'mask-rcnn_r50-polynl-res4'``), or its path.

    Returns:
        str: An absolute path.

    Raises:
        ValueError: There is no config of that name, or several begin so.
    """
    know_forks()
    # In a wheel they lie in the package, in a checkout beside it.
    folder = next(
        path
        for path in (_HERE / 'configs', _HERE.parent / 'configs')
        if (path / '_base_' / 'polynl.py').is_file()
    )
    path = Path(name).resolve()
    if folder in path.parents and path.is_file():
        return str(path)
    # Each by its own name and by those with folders before it.
    named: dict[str, set[Path]] = {}
    for path in folder.rglob('*.py'):
        parts = path.relative_to(folder).with_suffix('').parts
        for start in range(len(parts)):
            named.setdefault('/'.join(parts[start:]), set()).add(path)
    wanted = os.fspath(name).removesuffix('.py')
    found = named.get(wanted) or {
        path
        for key, paths in named.items()
        if wanted and key.startswith(wanted)
        for path in paths
    }
    if len(found) == 1:
        return str(found.pop())
    files = [key for key in named if '/' not in key]
    names = sorted(path.stem for path in found) or get_close_matches(
        wanted, files, n=3, cutoff=0.3
    )
    said = 'several begin so' if found else 'there is none'
    if names:
        said += ': ' if found else ', nearest: '
    more = f' and {len(names) - 3} more' if len(names) > 3 else ''
    raise ValueError(
        f'{name!r}, expected the name of one config of polynl_mm: {said}'
        + ', '.join(names[:3])
        + more
    )


def know_forks() -> None:
    """Have mmengine find the configs of a mmseg that is not OpenMMLab's.

    For ``_base_ = 'mmseg::...'`` it asks for a distribution mmsegmentation;
    the maintained fork, onedl-mmsegmentation, has the same module.
    """
    try:
        distribution('mmsegmentation')
    except PackageNotFoundError:
        if find_spec('mmseg') and find_spec('mmengine'):
            from mmengine.config.utils import MODULE2PACKAGE

            MODULE2PACKAGE['mmseg'] = 'mmseg'
