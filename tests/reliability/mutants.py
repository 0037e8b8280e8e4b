"""Break a module in many small ways, and see whether its tests notice.

    python tests/reliability/mutants.py polynl_mm/faces/ap.py \
        tests/test_faces/test_ap.py [--count 100] [--seed 0] [--jobs 1]

Every mutant differs from the module in one place: an operator, a comparison,
a condition, a number, what a function returns, or a call whose result nobody
takes. It lives in a process of its own, in memory; no file is changed. It is
killed if a test fails, or if the tests take five times as long as they do.
The last line has the share that was killed, the lines before it each survivor,
to be read: some mean the same.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib.abc
import importlib.util
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SWAPS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
NAMES = {'min': 'max', 'max': 'min', 'any': 'all', 'all': 'any'}


def changed(node: ast.AST) -> Iterator[ast.AST]:
    """What may stand in place of a node."""
    if isinstance(node, (ast.BinOp, ast.BoolOp, ast.AugAssign)):
        if type(node.op) in SWAPS:
            yield replaced(node, op=SWAPS[type(node.op)]())
    elif isinstance(node, ast.Compare):
        for k, op in enumerate(node.ops):
            if type(op) in SWAPS:
                ops = [*node.ops[:k], SWAPS[type(op)](), *node.ops[k + 1 :]]
                yield replaced(node, ops=ops)
    elif isinstance(node, ast.UnaryOp):
        if isinstance(node.op, (ast.Not, ast.USub, ast.Invert)):
            yield node.operand
    elif isinstance(node, (ast.If, ast.IfExp, ast.While)):
        yield replaced(node, test=ast.UnaryOp(ast.Not(), node.test))
    elif isinstance(node, ast.Constant):
        if isinstance(node.value, bool):
            yield ast.Constant(not node.value)
        elif isinstance(node.value, (int, float)):
            yield ast.Constant(node.value + 1)
    elif isinstance(node, ast.Return) and node.value is not None:
        yield ast.Return(ast.Constant(None))
    elif isinstance(node, ast.Name) and node.id in NAMES:
        yield replaced(node, id=NAMES[node.id])
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield ast.Pass()


def replaced(node: ast.AST, **fields) -> ast.AST:
    """A copy of a node with other fields."""
    node = copy.copy(node)
    for name, value in fields.items():
        setattr(node, name, value)
    return node


def places(node: ast.AST) -> Iterator[tuple[ast.AST, str, int | None]]:
    """Where nodes stand: parent, field, index. Not what nobody runs."""
    for field, value in ast.iter_fields(node):
        if field in ('annotation', 'returns', 'decorator_list'):
            continue
        if isinstance(value, list):
            for k, child in enumerate(value):
                if isinstance(child, ast.AST) and not is_told(child):
                    yield node, field, k
                    yield from places(child)
        elif isinstance(value, ast.AST) and not is_told(value):
            yield node, field, None
            yield from places(value)


def is_told(node: ast.AST) -> bool:
    """Whether it is an error's words, or what the module offers."""
    if isinstance(node, ast.Assign):
        return getattr(node.targets[0], 'id', None) == '__all__'
    return isinstance(node, ast.JoinedStr)


def mutants(source: str) -> list[tuple[int, str, str]]:
    """Line, what was changed into what, and the whole module with it."""
    tree, found = ast.parse(source), []
    for parent, field, k in places(tree):
        node = getattr(parent, field)
        node = node if k is None else node[k]
        for other in changed(node):
            put(parent, field, k, other)
            whole = ast.unparse(ast.fix_missing_locations(tree))
            put(parent, field, k, node)
            words = [
                ast.unparse(ast.fix_missing_locations(n)).split('\n')[0]
                for n in (node, other)
            ]
            found.append((node.lineno, ' -> '.join(words), whole))
    return found


def put(parent: ast.AST, field: str, k: int | None, node: ast.AST) -> None:
    """Place a node in its parent."""
    if k is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[k] = node


class Instead(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """A module from another source."""

    def __init__(self, path: Path, source: str) -> None:
        self.name = '.'.join(path.with_suffix('').parts)
        self.path, self.source = path, source

    def find_spec(self, name, path, target=None):
        if name == self.name:
            return importlib.util.spec_from_loader(name, self)
        return None

    def get_source(self, name):
        return self.source

    def exec_module(self, module):
        module.__file__ = str(ROOT / self.path)
        exec(compile(self.source, module.__file__, 'exec'), module.__dict__)


def survives(path: Path, source: str, tests: list, limit: float) -> bool:
    """Whether all tests pass with this source of a module."""
    child = os.fork()
    if not child:
        os.setsid()
        void = os.open(os.devnull, os.O_WRONLY)
        os.dup2(void, 1)
        os.dup2(void, 2)
        sys.meta_path.insert(0, Instead(path, source))
        import pytest

        status = 1
        try:
            options = ['-x', '-q', '-p', 'no:cacheprovider', '--no-header']
            status = pytest.main([*options, *tests])
        finally:
            os._exit(int(status != 0))
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('module', type=Path)
    parser.add_argument('tests', nargs='+')
    parser.add_argument(
        '--count', type=int, help='draw so many; all, if not given'
    )
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--jobs', type=int, default=1)
    args = parser.parse_args()
    os.chdir(ROOT)
    sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]
    # Loaded once, for all that follow; nothing of the package itself.
    import mmdet.apis  # noqa: F401
    import mmseg.apis  # noqa: F401
    import pytest  # noqa: F401

    path = args.module.resolve().relative_to(ROOT)
    source = path.read_text()
    start = time.monotonic()
    if not survives(path, source, args.tests, float('inf')):
        sys.exit('mutants.py: error: the tests fail without a mutant')
    limit = 5 * (time.monotonic() - start) + 5
    drawn = mutants(source)
    total = len(drawn)
    if args.count is not None and args.count < total:
        drawn = random.Random(args.seed).sample(drawn, args.count)
    alive = []
    with ThreadPoolExecutor(args.jobs) as pool:
        told = pool.map(
            lambda m: survives(path, m[2], args.tests, limit), drawn
        )
        for (line, what, _), lives in zip(drawn, told):
            if lives:
                alive.append((line, what))
                print(f'survived: {path}:{line}: {what}', flush=True)
    killed = len(drawn) - len(alive)
    print(
        f'{path}: {killed} of {len(drawn)} killed '
        f'({100 * killed / len(drawn):.1f} %), {total} in all'
    )


if __name__ == '__main__':
    main()
