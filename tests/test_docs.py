"""What the pages name is there: links, files of commands, Python names."""

import re
import subprocess
from collections import Counter
from functools import cache
from itertools import product
from pathlib import Path
from pkgutil import resolve_name

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent

if not (ROOT / '.git').exists():
    pytest.skip('git tells what the pages are', allow_module_level=True)

FENCE = re.compile(r'^```.*?^```$', re.M | re.S)
LINK = re.compile(r'\]\(([^()\s]+)\)')
# Of this repository: not below another folder, such as a host's.
PATH = re.compile(
    r'(?<![\w./$}-])(?:configs|projects|polynl_mm|tests|tools)/[\w./{},*-]+'
)
NAME = re.compile(r'(?<![\w./-])polynl_mm(?:\.\w+)+')


@cache
def sources():
    """Files that are or may be committed, and their folders."""
    command = ['git', 'ls-files', '-coz', '--exclude-standard']
    listed = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split('\0')
    files = {ROOT / name for name in listed if (ROOT / name).is_file()}
    return files | {folder for file in files for folder in file.parents}


PAGES = sorted(path for path in sources() if path.suffix == '.md')
each_page = pytest.mark.parametrize(
    'page', PAGES, ids=lambda page: page.relative_to(ROOT).as_posix()
)


def prose(text):
    """A page without what is shown as code."""
    text = re.sub(r'^    .*$', '', FENCE.sub('', text), flags=re.M)
    return re.sub(r'`[^`\n]*`', '', text)


@cache
def anchors(page):
    """Those that GitHub gives the headings of a page."""
    found, times = set(), Counter()
    for title in re.findall(
        r'^#{1,6} +(.+?)[ #]*$', FENCE.sub('', page.read_text()), re.M
    ):
        title = re.sub(r'!?\[([^]]*)\]\([^)]*\)', r'\1', title)
        slug = re.sub(r'[^\w\- ]', '', title.lower()).replace(' ', '-')
        found.add(f'{slug}-{times[slug]}' if times[slug] else slug)
        times[slug] += 1
    return found


def broken_links(page):
    broken = []
    for link in LINK.findall(prose(page.read_text())):
        if re.match(r'https?://', link):
            continue
        name, _, anchor = link.partition('#')
        target = (page.parent / name).resolve() if name else page
        there = target in sources() or not name
        if not there or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


def alternatives(path):
    """What a shell makes of the braces in a path."""
    parts = [
        part.split(',') if i % 2 else [part]
        for i, part in enumerate(re.split(r'\{([^{}]*)\}', path))
    ]
    return map(''.join, product(*parts))


def missing_paths(page):
    missing, variables = [], {}
    for line in page.read_text().splitlines():
        assignment = re.fullmatch(r' {4}(\w+)=(\S+)', line)
        if assignment:
            variables.update([assignment.groups()])
            continue
        line = re.sub(
            r'\$(?:\{(\w+)\}|(\w+))',
            lambda m: variables.get(m[1] or m[2], m[0]),
            line,
        )
        for found in PATH.findall(line):
            for path in alternatives(found.rstrip('.,')):
                if sources().isdisjoint(ROOT.glob(path)):
                    missing.append(path)
    return missing


def unresolved_names(page):
    import polynl_mm.registry as children

    registries = [
        value
        for value in vars(children).values()
        if isinstance(value, children.Registry)
    ]
    names = set(NAME.findall(page.read_text()))
    return sorted(name for name in names if not resolves(name, registries))


def resolves(name, registries):
    """As a Python object, or as a type in a config."""
    try:
        resolve_name(name)
    except (AttributeError, ImportError):
        return any(name in registry for registry in registries)
    return True


def test_pages_are_found():
    names = {page.relative_to(ROOT).as_posix() for page in PAGES}
    assert {'README.md', 'configs/README.md', 'tools/README.md'} <= names


@each_page
def test_links(page):
    assert not broken_links(page)


@each_page
def test_paths(page):
    assert not missing_paths(page)


@each_page
def test_names(page):
    pytest.importorskip('mmdet')
    pytest.importorskip('mmseg')
    assert not unresolved_names(page)


def test_what_is_not_there_is_found(tmp_path):
    """In a page beside those that are there."""
    pytest.importorskip('mmengine')
    page = tmp_path / 'page.md'
    there = ROOT / 'tools' / 'README.md'
    page.write_text(
        f"""# A `b` [c](http://d), e-f!
## Twice
## Twice
[a](#a-b-c-e-f) [b](#twice-1) [c](#twice-2) [d]({there}#the-quick-start)
[e]({there}#nowhere) [f](no.md) [`g`]({tmp_path}) `[h](code.md)`

    X=configs/mini
    python tools/train.py $X/polynl_r18-d4_{{mini,tiny}}-cityscapes.py
    bash tools/dist_trial.sh $Y/tools/other.py configs/c*/README.md tools/*.pl

`polynl_mm.PolyNL2d`, `polynl_mm.Insert`, `polynl_mm.ops.choice.choose`,
`polynl_mm.PolyNL4d`, `polynl_mm.ops.choose_form`
"""
    )
    assert broken_links(page) == [
        '#twice-2',
        f'{there}#nowhere',
        'no.md',
        str(tmp_path),
    ]
    assert missing_paths(page) == [
        'configs/mini/polynl_r18-d4_tiny-cityscapes.py',
        'tools/dist_trial.sh',
        'tools/*.pl',
    ]
    assert unresolved_names(page) == [
        'polynl_mm.PolyNL4d',
        'polynl_mm.ops.choose_form',
    ]


def test_readme_fits_two_screens():
    lines = (ROOT / 'README.md').read_text().splitlines()
    assert len(lines) <= 120
    assert max(map(len, lines)) <= 120


def test_python_of_the_readme():
    """Each line of the section, on a network that has such a place."""
    pytest.importorskip('mmcv')
    import polynl_mm

    section = (ROOT / 'README.md').read_text().split('## In Python\n')[1]
    code = section.split('```python\n')[1].split('```')[0]
    model = nn.Sequential()
    model.add_module('layer3', nn.Conv2d(3, 256, 1))
    names = dict(polynl_mm=polynl_mm, model=model.eval(), alpha=0.5, beta=2.0)
    names['x'] = torch.randn(1, 256, 3, 2)
    names.update(zip(('w1', 'w2', 'w3'), torch.randn(3, 256, 256)))
    exec(code, names)
    assert names['y'].shape == names['x'].shape
    assert names['report'].fused == ['layer3.poly_nl']
