"""Installed packages that do not fit each other, told in a line.

Each says so in words of its own, some deep in a model that is being built, and
few name both the package and the way out. This file needs Python alone, as
there may be nothing else that can be imported.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from traceback import walk_tb

__all__ = ['StackError', 'end_in_a_line', 'explained', 'reason']

# What errors say, and what it means. {package} is that whose code raised the
# error, with its version where it knows that; {torch} and {numpy} are the
# versions installed, {0} is what the pattern holds.
_MEANINGS = {
    r"No module named '(torch|mmengine|mmcv|mmdet|mmseg)'": (
        '{package} needs {0}, which is not installed: configs/from_pip.md of '
        'polynl_mm says how'
    ),
    r"No module named 'pkg_resources'": (
        '{package} needs pkg_resources, which setuptools has no more since '
        "version 81: pip install 'setuptools<81'"
    ),
    r"No module named '(ftfy|regex)'": (
        '{package} needs {0}, which it does not install itself: pip install '
        'ftfy regex'
    ),
    r"No module named 'mmcv\._ext'": (
        '{package} was installed without its compiled operators (mmcv-lite '
        'has none): pip uninstall mmcv mmcv-lite, then install a wheel of '
        'mmcv for torch {torch}, or build it'
    ),
    r'MMCV==(\S+) is used but incompatible': (
        "{package} does not work with mmcv {0}: pip install 'mmcv>=2.0.0,"
        "<2.2.0'"
    ),
    r'MMEngine==(\S+) is used but incompatible': (
        "{package} does not work with mmengine {0}: pip install 'mmengine>="
        "0.10,<1.0.0'"
    ),
    r'undefined symbol|operator torchvision::\w+ does not exist': (
        '{package} was built for another torch than {torch}, which is '
        'installed: install a build for that, or build it anew'
    ),
    r'numpy\.dtype size changed|compiled using NumPy 1|'
    r'numpy\.core\.(multiarray|umath|_multiarray_umath) failed to import|'
    r'_ARRAY_API not found|Numpy is not available': (
        '{package} was built for another numpy than {numpy}, which is '
        "installed: install a newer {package}, or pip install 'numpy<2'"
    ),
}


class StackError(RuntimeError):
    """Installed packages do not fit each other; the message says what to do.

    No ImportError, which mmengine takes for "not registered".
    """


def reason(error: BaseException | None) -> str | None:
    """Say what an error means if packages that do not fit are behind it.

    Args:
        error: It, or one that it was raised from or beside.

    Returns:
        A line that names the package, why, and what to do; None for all else.
    """
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, StackError):
            return str(error)
        for pattern, meaning in _MEANINGS.items():
            found = re.search(pattern, str(error))
            if found:
                return meaning.format(
                    *found.groups(),
                    package=_package(error),
                    torch=_version('torch'),
                    numpy=_version('numpy'),
                )
        hidden = error.__suppress_context__
        error = error.__cause__ or (None if hidden else error.__context__)
    return None


@contextmanager
def explained() -> Iterator[None]:
    """Raise a :class:`StackError` in the place of what it explains."""
    try:
        yield
    except Exception as error:
        line = reason(error)
        if line is None or isinstance(error, StackError):
            raise
        raise StackError(line) from error


def end_in_a_line() -> None:
    """Have a tool end so where its imports fail, with the exit code 2."""

    before = sys.excepthook

    def end(kind, error, trace) -> None:
        line = reason(error)
        if line is None:
            before(kind, error, trace)
            return
        tool = os.path.basename(sys.argv[0])
        print(f'{tool}: error: {line}', file=sys.stderr, flush=True)
        raise SystemExit(2)

    sys.excepthook = end


def _package(error: BaseException) -> str:
    """Give the package whose code raised it, with its version if it has."""
    package = 'this program'
    for frame, _ in walk_tb(error.__traceback__):
        names = frame.f_globals
        name = names.get('__name__', '').partition('.')[0]
        # Those of the import system stand behind the import.
        if name not in ('', '__main__', 'importlib'):
            module = sys.modules.get(name)
            version = getattr(module, '__version__', None) or names.get(
                '__version__'
            )
            package = f'{name} {version}' if version else name
    return package


def _version(package: str) -> str:
    return getattr(sys.modules.get(package), '__version__', '(unknown)')
