"""Packages that do not fit each other are told in a line, by whoever fails."""

import ast
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
from helpers import FORKS
from test_registry import HIDE

from polynl_mm import stack

ROOT = Path(__file__).resolve().parent.parent
NUMPY = 'numpy.core.multiarray failed to import'

of_openmmlab = pytest.mark.skipif(
    FORKS, reason='the forks need neither pkg_resources nor an older mmcv'
)


@pytest.fixture
def fails(tmp_path, monkeypatch):
    """Give a function: what an import of a package of this text raises."""

    def fails(text):
        (tmp_path / 'some').mkdir()
        (tmp_path / 'some/__init__.py').write_text("__version__ = '1.2'\n")
        (tmp_path / 'some/part.py').write_text(dedent(text))
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(Exception) as caught:
            import some.part  # noqa: F401
        return caught.value

    yield fails
    sys.modules.pop('some', None)


@pytest.mark.parametrize(
    'text, said',
    (
        (
            'raise ModuleNotFoundError("No module named \'pkg_resources\'")',
            'some 1.2 needs pkg_resources, which setuptools has no more since '
            "version 81: pip install 'setuptools<81'",
        ),
        (
            'raise ModuleNotFoundError("No module named \'ftfy\'")',
            'some 1.2 needs ftfy, which it does not install itself: pip '
            'install ftfy regex',
        ),
        (
            'assert False, ("MMCV==2.2.0 is used but incompatible. "\n'
            '    "Please install mmcv>=2.0.0rc4.")',
            'some 1.2 does not work with mmcv 2.2.0: pip install '
            "'mmcv>=2.0.0,<2.2.0'",
        ),
        (
            'assert False, "MMEngine==0.4.0 is used but incompatible."',
            'some 1.2 does not work with mmengine 0.4.0: pip install '
            "'mmengine>=0.10,<1.0.0'",
        ),
        (
            'raise ImportError("_ext.so: undefined symbol: _ZN3c10")',
            'some 1.2 was built for another torch than ',
        ),
        (
            'raise ValueError("numpy.dtype size changed, may indicate "\n'
            '    "binary incompatibility.")',
            'some 1.2 was built for another numpy than ',
        ),
        (
            'raise ImportError("A module that was compiled using NumPy 1.x "\n'
            '    "cannot be run in NumPy 2.4.6 as it may crash.")',
            'some 1.2 was built for another numpy than ',
        ),
        (
            f'raise ImportError({NUMPY!r})',
            'some 1.2 was built for another numpy than ',
        ),
    ),
)
def test_what_it_means(fails, text, said):
    assert stack.reason(fails(text)).startswith(said)


def test_of_what_it_was_raised_from(fails):
    error = fails(f"""
        try:
            raise ImportError({NUMPY!r})
        except ImportError as error:
            raise RuntimeError('some') from error
    """)
    assert 'another numpy' in stack.reason(error)
    with pytest.raises(stack.StackError, match='another numpy'):
        with stack.explained():
            raise error


def test_all_else_is_left_alone(fails):
    error = fails("""
        try:
            raise ImportError("No module named 'pkg_resources'")
        except ImportError:
            raise ValueError('another reason') from None
    """)
    assert stack.reason(error) is None
    with pytest.raises(ValueError, match='another reason'):
        with stack.explained():
            raise error


def test_a_tool_ends_in_it(capfd):
    pytest.importorskip('mmengine')
    from polynl_mm.engine import cli

    def tool():
        raise ImportError(NUMPY)

    with pytest.raises(SystemExit) as caught:
        cli.run(tool)
    assert caught.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert 'error: test_stack was built for another numpy than' in line


def run(*command, stub):
    """In a fresh process, which finds the stub before all else."""
    path = os.pathsep.join((str(stub), str(ROOT)))
    env = {**os.environ, 'PYTHONPATH': path, 'OMP_NUM_THREADS': '1'}
    return subprocess.run(
        [sys.executable, '-W', 'ignore', *map(str, command)],
        cwd=stub,
        env=env,
        capture_output=True,
        text=True,
    )


def test_where_a_tool_imports(tmp_path):
    (tmp_path / 'cv2.py').write_text(f'raise ImportError({NUMPY!r})')
    done = run(ROOT / 'tools/test.py', 'a.py', 'a.pth', stub=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith('test.py: error: cv2 was built for another numpy')


def late(script):
    """What a tool imports that could fail, before it would end in a line."""
    found = []
    for node in ast.parse(script).body:
        if ast.unparse(node) == 'stack.end_in_a_line()':
            return found
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append(node.module)
    ours = ('polynl_mm', 'benchmarks', 'mmengine')
    return found if any(name.startswith(ours) for name in found) else []


@pytest.mark.parametrize(
    'tool', sorted((ROOT / 'tools').glob('*.py')), ids=lambda tool: tool.name
)
def test_every_tool_would(tool):
    names = {name.partition('.')[0] for name in late(tool.read_text())}
    assert names <= sys.stdlib_module_names | {'polynl_mm'}


def test_a_tool_that_would_not():
    assert late('import cv2\nfrom mmengine import a') == ['cv2', 'mmengine']


@of_openmmlab
def test_where_mmengine_imports(tmp_path):
    pytest.importorskip('mmdet')
    # Python runs this file first of all.
    (tmp_path / 'sitecustomize.py').write_text(
        HIDE.format(hidden={'pkg_resources'})
    )
    (tmp_path / 'a.py').write_text("_base_ = 'mmdet::_base_/models/ssd300.py'")
    done = run(ROOT / 'tools/train.py', 'a.py', stub=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith('train.py: error: ')
    assert 'mmengine' in line
    assert line.endswith("pip install 'setuptools<81'")


@of_openmmlab
def test_where_a_type_is_looked_up(tmp_path):
    """By tools of others, in which an error keeps its traceback."""
    pytest.importorskip('mmseg')
    (tmp_path / 'mmcv').mkdir()
    (tmp_path / 'mmcv/__init__.py').write_text("__version__ = '2.2.0'")
    (tmp_path / 'mmcv/transforms.py').write_text(
        dedent("""
        from mmengine.registry import TRANSFORMS
        from mmseg import __version__
        """)
    )
    code = """
    from mmengine.registry import MODELS
    MODELS.build(dict(type='polynl_mm.PolyNL2d', in_channels=2))
    """
    done = run('-c', dedent(code), stub=tmp_path)
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert line.startswith('polynl_mm.stack.StackError: mmseg ')
    assert line.endswith(
        "does not work with mmcv 2.2.0: pip install 'mmcv>=2.0.0,<2.2.0'"
    )
