"""Every message of the package and the tools says enough, or a page does.

What is raised, warned of or said is collected from the sources. A message is
self-explanatory if it

1. names what it is about: a value it was given, or a key, an option, a name in
   code; and
2. says what was expected, what to do, or what is not there.

Which words say the second is the list below. All others must be in the last
table of tools/troubleshooting.md, with cause and remedy, and nothing else is
in that table.
"""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / 'tools' / 'troubleshooting.md'
SOURCES = ('polynl_mm', 'tools', 'projects/mini_data')
# Stands for what a message is given.
VALUE = '…'

EXCEPTION = re.compile(r'(Error|Mismatch|Exception|Disagreement)$')
# Methods, of warnings and of loggers.
TOLD = {'warn', 'warning', 'error'}

# Says where, before another message, or is that message alone.
PLACE = re.compile(rf'((.*: )?{VALUE})+')

NAMES = re.compile(
    rf'{VALUE}|\d|\w=|\w_\w|\w\.\w|\w\(|--\w|\'[^\']+\''
    r'|[a-z][A-Z]|[A-Z]{2}|pip install'
)
SAYS = re.compile(
    r'\b('
    # what was expected
    r'expected|must|needs?|at most|at least|belongs? to|takes? (the|a|an|no)'
    r'|is for|are for|goes with|one of|only|than|but|instead|nearest'
    # what to do
    r'|give|set|take|call|write|save|use|leave|make|put|add|rename|move'
    r'|install|insert|start|delete|convert|remove|see|test them'
    # what is not there, or not so
    r'|does not|do not|is no|are no|is not|are not|has no|have no|has not'
    r'|can ?not|not (a|an|the|of|there)|there is|without|already'
    # what was done about it
    r'|passed over'
    r')\b'
)


@cache
def messages():
    """(file and line, text) of each, values as VALUE."""
    found = {}
    for folder in SOURCES:
        for file in sorted((ROOT / folder).rglob('*.py')):
            name = file.relative_to(ROOT).as_posix()
            tree = ast.parse(file.read_text())
            for scope in ast.walk(tree):
                if isinstance(scope, (ast.FunctionDef, ast.Lambda)):
                    collect(scope, name, found)
    return sorted(found.items())


def collect(scope, name, found):
    for node in ast.walk(scope):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        method = getattr(node.func, 'attr', '')
        called = method or getattr(node.func, 'id', '')
        is_error = EXCEPTION.search(called) or method in TOLD
        if not is_error and called != 'say':
            continue
        for text in texts(node.args[0], scope):
            text = ' '.join(text.split())
            if not PLACE.fullmatch(text) and (
                is_error or text.startswith('warning')
            ):
                found[f'{name}:{node.lineno} {text}'] = text


def texts(node, scope):
    """What an expression may say; names are looked up once."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.JoinedStr):
        parts = [
            part.value if isinstance(part, ast.Constant) else VALUE
            for part in node.values
        ]
        return [''.join(parts)]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [
            a + b
            for a in texts(node.left, scope)
            for b in texts(node.right, scope)
        ]
    if isinstance(node, ast.IfExp):
        return texts(node.body, scope) + texts(node.orelse, scope)
    if isinstance(node, ast.Name) and scope is not None:
        assigned = [
            text
            for other in ast.walk(scope)
            if isinstance(other, ast.Assign)
            and any(getattr(t, 'id', None) == node.id for t in other.targets)
            for text in texts(other.value, None)
        ]
        return assigned or [VALUE]
    return [VALUE]


def explains_itself(text):
    return bool(NAMES.search(text) and SAYS.search(text))


def rows():
    """Messages of the last table of the page."""
    table = PAGE.read_text().rpartition('\n## ')[2]
    return re.findall(r'^\| `(.+?)` \|', table, re.M)


def is_of(row, text):
    """Whether the words of a row are in a message, in their order."""
    parts = [re.escape(part.strip()) for part in row.split(VALUE)]
    return bool(re.search('.*'.join(parts), text))


def test_messages_are_found():
    texts = [text for _, text in messages()]
    assert len(texts) > 250
    assert any('is no label ids' in t or 'label ids' in t for t in texts)


def test_each_explains_itself_or_the_page_does():
    bare = [
        where
        for where, text in messages()
        if not explains_itself(text)
        and not any(is_of(row, text) for row in rows())
    ]
    assert not bare, '\n'.join(['', *bare])


def test_the_page_has_no_other():
    """No row of a message that is gone, or says enough by itself."""
    for row in rows():
        assert any(
            is_of(row, text) and not explains_itself(text)
            for _, text in messages()
        ), row


@pytest.mark.parametrize(
    'text, enough',
    [
        ('could not be processed', False),
        ('wrong value …', False),
        ('a config is given twice', False),
        ('… is not a folder', True),
        ('--shape …: expected two sizes >= 1', True),
    ],
)
def test_the_rule(text, enough):
    assert explains_itself(text) == enough
