"""Imports go one way through the package, and none leads to what uses it.

A room is a module or a folder right below the package. All imports of its
files count, those inside functions, too.
"""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / 'polynl_mm'

LAYER = {'ops', 'padding', 'layers', 'attention', 'registry', 'stack'}
BLOCK = LAYER | {'context', 'samples', 'plugins', 'insertion', 'fusion'}
BLOCK |= {'limits', 'loading', 'hosting', 'replacement', 'progress'}
BLOCK |= {'shipped'}
# Which other rooms each may import. One task never imports another.
MAY_IMPORT = {
    'limits': set(),
    'progress': set(),
    'ops': set(),
    'padding': {'ops'},
    'layers': {'ops', 'padding'},
    'attention': {'ops', 'layers'},
    'registry': {'layers', 'attention', 'stack'},
    'shipped': set(),
    'stack': set(),
    'samples': {'ops', 'padding', 'layers'},
    'context': {'ops', 'padding', 'layers'},
    'influence': {'ops', 'layers'},
    'plugins': {'layers'},
    'loading': {'limits', 'registry'},
    'peers': {'registry'},
    'hosting': set(),
    'insertion': LAYER | {'hosting', 'samples'},
    'replacement': LAYER | {'hosting', 'insertion', 'samples'},
    'fusion': LAYER | {'insertion', 'plugins'},
    'detection': BLOCK,
    'classification': BLOCK,
    'faces': BLOCK,
    'segmentation': BLOCK,
    'engine': BLOCK
    | {'influence', 'classification', 'detection', 'faces', 'segmentation'},
}
# What a room may import from elsewhere, beside the standard library, where
# that is not left to it.
ELSEWHERE = {
    'ops': {'torch', 'triton'},
    'padding': {'torch'},
    'layers': {'torch', 'mmcv'},
    'attention': {'torch'},
    'context': {'torch'},
    'influence': {'torch'},
    'plugins': {'torch'},
    'shipped': {'mmengine'},
    'stack': set(),
}


def users():
    """Names by which tools, projects and tests could be imported."""
    files = [
        file
        for pattern in ('tools/*', 'projects/*', 'projects/*/*', 'tests/*')
        for file in ROOT.glob(pattern)
        if file.suffix == '.py' or any(file.glob('*.py'))
    ]
    return {'tools', 'projects', 'tests', *(file.stem for file in files)}


def imported(file, package):
    """Give the full names of what a file of a package imports."""
    parents = file.relative_to(package.parent).parts[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [node.module] if node.module else []
            if node.level:
                base[:0] = parents[: len(parents) - node.level + 1]
            yield from ('.'.join([*base, a.name]) for a in node.names)


def offences(package):
    """Give a line for every import of a package that breaks a rule."""
    found = []
    for file in sorted(package.rglob('*.py')):
        place = file.relative_to(package)
        room = place.parts[0].removesuffix('.py')
        for name in imported(file, package):
            top, *inner = name.split('.')
            if top == package.name:
                # Its own names are lazy: they may stand for any room.
                target = inner[0] if inner else None
                allowed = room in ('__init__', target) or (
                    target in MAY_IMPORT.get(room, ())
                )
            else:
                allowed = top not in users() and (
                    room not in ELSEWHERE
                    or top in ELSEWHERE[room] | sys.stdlib_module_names
                )
            if not allowed:
                found.append(f'{place} imports {name}')
    return found


def test_imports_go_one_way():
    assert offences(PACKAGE) == []


def test_every_room_has_its_rule():
    rooms = {
        path.stem
        for path in PACKAGE.iterdir()
        if path.suffix == '.py' or (path / '__init__.py').exists()
    }
    assert rooms - {'__init__'} == set(MAY_IMPORT)


@pytest.mark.parametrize(
    'place, line, target',
    (
        ('ops.py', 'from .layers import PolyNL', 'layers.PolyNL'),
        ('ops/gate.py', 'from ..registry import MODELS', 'registry.MODELS'),
        ('ops/__init__.py', 'def f():\n    import mmcv.ops', 'mmcv.ops'),
        ('registry.py', 'from . import fusion', 'fusion'),
        ('layers.py', 'from .registry import MODELS', 'registry.MODELS'),
        ('layers.py', 'from . import ops, fusion', 'fusion'),
        ('insertion.py', 'import polynl_mm.fusion as f', 'fusion'),
        ('faces/head.py', 'from .. import segmentation', 'segmentation'),
        ('faces/ap.py', 'from ..engine.start import a', 'engine.start.a'),
        ('segmentation/__init__.py', 'from ..faces import ap', 'faces.ap'),
        ('segmentation/head.py', 'from polynl_mm import engine', 'engine'),
        ('engine/start.py', 'from polynl_mm import poly_nl', 'poly_nl'),
        ('engine/start.py', 'import polynl_mm', None),
        ('engine/start.py', 'import polynl_mm.tools.test', 'tools.test'),
        ('engine/start.py', 'from tools import test', 'tools.test'),
        ('engine/start.py', 'import train', 'train'),
        ('engine/start.py', 'from scaling import a', 'scaling.a'),
        ('__init__.py', 'import oracles', 'oracles'),
    ),
)
def test_a_wrong_import_is_seen(tmp_path, place, line, target):
    file = tmp_path / 'polynl_mm' / place
    file.parent.mkdir(parents=True)
    file.write_text(line)
    (found,) = offences(tmp_path / 'polynl_mm')
    assert found.startswith(f'{place} imports ')
    assert found.endswith(target or 'polynl_mm')


@pytest.mark.parametrize(
    'place, line',
    (
        ('__init__.py', 'def f():\n    from .fusion import fuse_poly_nl'),
        ('ops/__init__.py', 'import math, torch\nfrom .gate import Params'),
        ('layers.py', 'from .ops import poly_nl\nimport mmcv'),
        ('faces/head.py', 'from . import ap\nfrom .landmarks import a'),
        ('faces/head.py', 'from polynl_mm.layers import PolyNL2d'),
        ('engine/checks.py', 'from ..segmentation.labels import a'),
    ),
)
def test_a_right_import_is_not(tmp_path, place, line):
    file = tmp_path / 'polynl_mm' / place
    file.parent.mkdir(parents=True)
    file.write_text(line)
    assert offences(tmp_path / 'polynl_mm') == []
