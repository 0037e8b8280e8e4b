"""What the pages name is there: links, files of commands, Python names."""

import argparse
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections import Counter
from functools import cache
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from pkgutil import resolve_name

import pytest
import torch
import yaml
from torch import nn

import polynl_mm

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
            # In a wheel they lie in the package.
            found = re.sub('^polynl_mm/(?=configs|tools)', '', found)
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
    tool = name.removeprefix('polynl_mm.tools.')
    if tool != name:
        # In a wheel it is a module.
        return (ROOT / 'tools' / f'{tool}.py').is_file()
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


def test_bases_are_found_from_anywhere(tmp_path):
    """Of every whole config on the pages, in a file of the reader's own."""
    pytest.importorskip('mmdet')
    pytest.importorskip('mmseg')
    from mmengine.config import Config

    file, count = tmp_path / 'own.py', 0
    for page in PAGES:
        for code in re.findall(
            r'^```python\n(_base_ = .*?)^```$', page.read_text(), re.M | re.S
        ):
            if 'mmpretrain::' in code and not find_spec('mmpretrain'):
                continue
            file.write_text(code)
            cfg = Config.fromfile(file, import_custom_modules=False)
            assert cfg.model, page
            count += 1
    assert count > 10


def test_readme_fits_two_screens():
    lines = (ROOT / 'README.md').read_text().splitlines()
    assert len(lines) <= 120
    assert max(map(len, lines)) <= 120


def test_python_of_the_readme():
    """Each line of the section, on a network that has such a place."""
    pytest.importorskip('mmcv')
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


# ----------------------------------------------------------------- commands

REAL_DATA = re.compile(
    r'(configs/(wider_face|coco|cityscapes|imagenet)/\S+\.py'
    r'|data/(WIDERFace|coco|cityscapes|imagenet)(/|$))'
)
MARK = 'needs the real data set'
# What a line stands for that is no command of its own.
PLACEHOLDER = re.compile(r'[A-Z][A-Z_]*(\.\w+)?')
JOBS = {
    'dist_train.sh': 'train.py',
    'dist_test.sh': 'test.py',
    'slurm_train.sh': 'train.py',
    'slurm_test.sh': 'test.py',
}
READ_DATA = {
    *JOBS,
    'train.py',
    'test.py',
    'demo.py',
    'check_wider_face.py',
    'eval_wider_face.py',
    'eval_cityscapes.py',
}
# Has the shell expand what a page has, and records each command in its place.
RECORD = """
record() { { printf '%q ' "$MARKED" "$@"; echo; } >&3; }
python() { record python "$@"; }
bash() { record bash "$@"; }
mim() { record mim "$@"; }
exec 3>&1 >/dev/null 2>&1
"""


def blocks(page):
    """What is shown as code and is not Python, block by block."""
    text = page.read_text()
    fenced = re.findall(r'^```(\w*)\n(.*?)^```$', text, re.M | re.S)
    yield from (code for kind, code in fenced if kind in ('', 'sh', 'bash'))
    rest = FENCE.sub('', text)
    yield from re.findall(r'(?:^ {4}.*\n(?:\n(?= {4}))?)+', rest, re.M)


def shell_of(block):
    """The lines that set variables, repeat, or call a tool."""
    lines, goes_on = [], False
    for line in block.splitlines():
        line = line.strip()
        if (
            goes_on
            or re.match(r'(\w+=\S* +)*(python|bash|mim) ', line)
            or re.match(r'\w+=|for |done\b', line)
        ):
            # Braces that begin a word stand for a choice of one.
            before, *choice = re.split(r'(?<= )\{([^{}]*)\}', line, maxsplit=1)
            each, after = choice or ('', '')
            lines += [f'{before}{one}{after}' for one in each.split(',')]
            goes_on = line.endswith('\\')
    return '\n'.join(lines)


@cache
def commands(page):
    """(whether it is marked, its words) of every command on a page."""
    script = [RECORD]
    for block in blocks(page):
        marked = f'# {MARK}' in block
        script += [f'MARKED={"yes" if marked else ""}', shell_of(block)]
    mmdet = find_spec('mmdet')
    done = subprocess.run(
        ['bash', '-c', '\n'.join(s for s in script if '$(python' not in s)],
        cwd=ROOT,
        env={
            'PATH': os.environ['PATH'],
            'MIM': f'{Path(mmdet.origin).parent}/.mim' if mmdet else '',
        },
        capture_output=True,
        text=True,
    )
    words = map(shlex.split, done.stdout.splitlines())
    return [(each[0] == 'yes', each[1:]) for each in words]


def required_and_all(words):
    """The words of a command without what is in brackets, and with it."""
    depth, required, every = 0, [], []
    for word in words:
        if word.startswith('[') or depth:
            depth += len(word) - len(word.lstrip('['))
            bare = word.strip('[]')
            depth -= len(word) - len(word.rstrip(']'))
        else:
            bare = word
            required += [word] * (word != '...')
        every += [bare] * (bare not in ('...', ''))
    return required, every


def tool_of(words):
    """Script and arguments, as the process that does the work has them."""
    runner, script, *args = words
    if runner == 'mim':
        if script == 'run':
            args[:2] = reversed(args[:2])
            script, *args = args
        if args[:1] != ['polynl_mm'] or script == 'search':
            return None, args
        script, args = f'tools/{script}.py', args[1:]
        assert (ROOT / script).is_file(), f'there is no {script}'
    elif script == '-m':
        script, *args = args
        script = script.replace('polynl_mm.tools.', 'tools/') + '.py'
    path = ROOT / script
    if path.name not in JOBS or path.suffix == '.py':
        return path if path.suffix == '.py' and path.is_file() else None, args
    if path.name.startswith('slurm'):
        args = args[2:]
        if path.name == 'slurm_train.sh':
            args.insert(1, '--work-dir')
    else:
        processes = args.pop(1 if path.name == 'dist_train.sh' else 2)
        assert re.fullmatch(r'[1-9]\d*|GPUS', processes), words
    return path.with_name(JOBS[path.name]), args


class Parsed(BaseException):
    """The tool has read its arguments; it does nothing more."""


@pytest.fixture
def parse(monkeypatch):
    """Give what a script makes of its arguments, PLACEHOLDERs as any value."""
    parser = argparse.ArgumentParser
    get, check, read = (
        getattr(parser, name)
        for name in ('_get_value', '_check_value', 'parse_args')
    )

    def get_value(self, action, text):
        return text if PLACEHOLDER.fullmatch(text) else get(self, action, text)

    def check_value(self, action, value):
        if not PLACEHOLDER.fullmatch(str(value)):
            check(self, action, value)

    def parse_args(self, args=None, namespace=None):
        raise Parsed(read(self, args, namespace))

    monkeypatch.setattr(parser, '_get_value', get_value)
    monkeypatch.setattr(parser, '_check_value', check_value)
    monkeypatch.setattr(parser, 'parse_args', parse_args)

    def parse(script, args):
        if 'parse_args' not in script.read_text():
            assert not args, f'{script} takes no arguments'
            return None
        monkeypatch.setattr(sys, 'argv', [str(script), *args])
        monkeypatch.setattr(sys, 'path', [str(script.parent), *sys.path])
        try:
            runpy.run_path(str(script), run_name='__main__')
        except Parsed as parsed:
            return parsed.args[0]
        raise AssertionError(f'{script} reads no arguments')

    return parse


def check_options(namespace):
    """That what ``--cfg-options`` sets has a place in the config."""
    options = getattr(namespace, 'cfg_options', None)
    config = getattr(namespace, 'config', None)
    if not options or PLACEHOLDER.fullmatch(config):
        return
    from mmengine.config import Config

    cfg = Config.fromfile(ROOT / config)
    for key in options:
        *parents, _ = key.split('.')
        place = cfg
        # mmengine knows that key, and mmseg's configs do not have it.
        for parent in parents if parents != ['auto_scale_lr'] else ():
            place = place[int(parent) if parent.isdigit() else parent]
    cfg.merge_from_dict(
        {k: v for k, v in options.items() if not PLACEHOLDER.fullmatch(str(v))}
    )


def wrong_commands(page, parse):
    """Those that the tool's own parser refuses, or with keys of no place."""
    wrong = []
    for _, words in commands(page):
        for each in required_and_all(words):
            try:
                script, args = tool_of(each)
                if script:
                    check_options(parse(script, args))
            except (Exception, SystemExit) as error:
                wrong.append((' '.join(each), str(error)))
    return wrong


def wrongly_marked(page):
    """Commands on real data that do not say so, on the mini sets that do."""
    wrong = []
    for marked, words in commands(page):
        tools = {Path(word).name for word in words[:2]} & READ_DATA
        real = any(REAL_DATA.match(word) for word in words)
        mini = any('/mini' in word for word in words)
        if tools and real and not marked:
            wrong.append(' '.join(words))
        if marked and mini:
            wrong.append(' '.join(words))
    return wrong


@each_page
def test_commands(page, parse):
    pytest.importorskip('mmdet')
    pytest.importorskip('mmseg')
    assert not wrong_commands(page, parse)


@each_page
def test_commands_are_marked(page):
    assert not wrongly_marked(page)


def test_wrong_commands_are_found(tmp_path, parse):
    pytest.importorskip('mmdet')
    page = tmp_path / 'page.md'
    coco = 'configs/coco/mask-rcnn_r50-plain_fpn_1x_coco.py'
    page.write_text(
        f"""
    # {MARK}
    C={coco}
    bash tools/dist_train.sh $C 8 [--amp]
    GPUS=2 bash tools/slurm_test.sh PARTITION JOB $C CKPT --tta
    python tools/test.py configs/mini/no.py CKPT

and

    for n in 1 2; do
        python tools/train.py $C --resum$n
    done
    python tools/train.py CONFIG --cfg-options \\
        model.backbone.depth=101 [--frobnicate]
    python tools/make_mini_data.py {{coco,cocoa}} --out DIR --seed N
    bash tools/dist_train.sh CONFIG many
    mim run polynl_mm test CONFIG CKPT --no-such
    mim run polynl_mm tests CONFIG CKPT
    python -m polynl_mm.tools.demo IMAGE CONFIG CKPT

```sh
# {MARK}
python tools/train.py {coco} --cfg-options model.backbon.depth=101
python tools/train.py {coco} --cfg-options "model.backbone.plugins=[]"
```
"""
    )
    wrong = [each.partition(' ')[2] for each, _ in wrong_commands(page, parse)]
    assert [*dict.fromkeys(wrong)] == [
        f'tools/train.py {coco} --cfg-options model.backbon.depth=101',
        f'tools/train.py {coco} --resum1',
        f'tools/train.py {coco} --resum2',
        'tools/train.py CONFIG --cfg-options model.backbone.depth=101 '
        '--frobnicate',
        'tools/make_mini_data.py cocoa --out DIR --seed N',
        'tools/dist_train.sh CONFIG many',
        'run polynl_mm test CONFIG CKPT --no-such',
        'run polynl_mm tests CONFIG CKPT',
        '-m polynl_mm.tools.demo IMAGE CONFIG CKPT',
    ]
    assert wrongly_marked(page) == [
        'python tools/test.py configs/mini/no.py CKPT',
        f'python tools/train.py {coco} --resum1',
        f'python tools/train.py {coco} --resum2',
    ]


def test_citation():
    """CITATION.cff and the BibTeX say the same, of this version."""
    cff = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
    paper = cff['preferred-citation']
    page = (ROOT / 'CONTRIBUTING.md').read_text()
    bib = dict(re.findall(r'^ {4}(\w+) = \{(.*)\},?$', page, re.M))
    names = (
        f'{author["family-names"]}, {author["given-names"]}'
        for author in paper['authors']
    )
    assert bib == {
        'author': ' and '.join(names),
        'title': paper['title'],
        'booktitle': paper['collection-title'],
        'year': str(paper['year']),
        'pages': f'{paper["start"]}-{paper["end"]}',
    }
    assert cff['version'] == polynl_mm.__version__
    assert f'## {polynl_mm.__version__}' in (ROOT / 'CHANGELOG.md').read_text()


def test_numbers_of_placement_are_those_measured():
    """Each stands in the row of the table that was measured."""
    page = (ROOT / 'configs' / 'placement.md').read_text()
    card = (ROOT / 'tools' / 'README.md').read_text()
    scaling = (ROOT / 'projects' / 'scaling' / 'README.md').read_text()

    def cells(text, row):
        line = re.search(rf'^\| {re.escape(row)} \|(.*)\|$', text, re.M)[1]
        return [cell.strip().partition(' ±')[0] for cell in line.split('|')]

    for row, on_card, on_cpu in (
        (
            'behind conv3, c3 to c5',
            'Poly-NL, 13 blocks',
            'Poly-NL, every block of c3 to c5',
        ),
        (
            'the same, [fused](fusing.md)',
            'Poly-NL fused, 13 blocks',
            'Poly-NL, fused, every block of c3 to c5',
        ),
        (
            'behind conv3, c4, fused',
            'Poly-NL fused, 6 blocks of c4',
            'Poly-NL, fused, every block of c4',
        ),
        ('behind the last conv3 of c4, fused', 'Poly-NL fused, end of c4', ''),
        (
            'end of res4, behind the residual sum',
            '',
            'Poly-NL, end of res4',
        ),
        (
            '(ContextBlock, c3 to c5)',
            'ContextBlock, 13 blocks',
            'ContextBlock, every block of c3 to c5',
        ),
    ):
        *_, training, inference, cpu = cells(page, row)
        measured = cells(card, on_card)[:2] if on_card else ['', '']
        assert [training, inference] == measured, row
        # The time at 800 x 1344, of six columns.
        assert cpu == (cells(scaling, on_cpu)[4] if on_cpu else ''), row
