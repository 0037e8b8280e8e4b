"""The data sets, and how one is made whole or not at all."""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from . import REVISION, UserError
from .cityscapes import cityscapes
from .coco import coco
from .image_folders import digits, lfw_patches
from .wider_face import wider_face

MARKER = 'mini_data.json'


class DataSet(NamedTuple):
    """How to make a data set: called with folder, seed, sizes by split."""

    make: Callable
    train: int
    val: int


DATASETS = {
    'wider_face': DataSet(wider_face, train=400, val=80),
    'coco': DataSet(coco, train=400, val=80),
    'cityscapes': DataSet(cityscapes, train=400, val=80),
    'digits': DataSet(digits, train=200, val=850),
    'lfw_patches': DataSet(lfw_patches, train=40, val=100),
}


def build(name: str, out: Path, seed: int, sizes: dict) -> bool:
    """Make a data set in ``out``, or find that it is there already.

    Returns:
        bool: Whether it had to be made.

    Raises:
        UserError: ``out`` holds something else.
    """
    settings = dict(dataset=name, revision=REVISION, seed=seed, **sizes)
    marker = out / MARKER
    if marker.is_file():
        try:
            found = json.loads(marker.read_text())
        except ValueError:
            found = 'no JSON'
        if found == settings:
            return False
        raise UserError(
            f'{out} was made with other settings; delete it or give another '
            f'--out (there: {found}, asked: {settings})'
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(
            f'{out} exists and was not made by this tool (no {MARKER} in '
            f'it); give another --out, or an empty or new folder'
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=f'.{out.name}.', suffix='.partial', dir=out.parent
    ) as temporary:
        # One folder further down, since mkdtemp's own is private (0700).
        work = Path(temporary) / out.name
        work.mkdir()
        DATASETS[name].make(work, seed, sizes)
        (work / MARKER).write_text(json.dumps(settings) + '\n')
        os.rename(work, out)
    return True
