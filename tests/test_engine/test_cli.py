"""How a tool ends; test_tools/test_bad_input.py has its command line."""

import subprocess
import sys

import pytest

pytest.importorskip('torch')
pytest.importorskip('mmengine')

from mmengine.config import Config, DictAction  # noqa: E402

from polynl_mm.engine import cli  # noqa: E402

LEAVING = """
import atexit

import torch
from polynl_mm.engine import cli


class Kept:
    def __del__(self):
        print('finalised')


def tool():
    torch.distributed.init_process_group(
        'gloo', init_method='file://' + FILE, rank=0, world_size=1)
    print('done')
    if ERROR:
        raise cli.StartError('why')


kept = Kept()
atexit.register(print, 'at exit')
cli.run(tool)
print('not reached')
"""


@pytest.mark.parametrize('error', [False, True])
def test_leaves_before_python_is_finalised(tmp_path, error):
    """A thread of gloo that meets the finalisation aborts the process."""
    code = f'FILE = {str(tmp_path / "store")!r}\nERROR = {error}\n' + LEAVING
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True
    )
    assert done.returncode == (2 if error else 0), done.stderr
    assert ('error: why' in done.stderr) == error
    assert done.stdout.split('\n') == ['done', 'at exit', '']


def read(*settings):
    parser = cli.Parser()
    parser.add_config_options()
    return parser.parse_args(['--cfg-options', *settings]).cfg_options


def test_settings_are_read_as_mmengine_reads_them():
    for text in (
        *('1', '-1', '1e-3', '0x10', 'a', 'true', 'False', 'None', ''),
        *('1,2,3', '[1,2,3]', '(1,2)', '(1,)', '1,', '[]', '()', ',', '[,1]'),
        *('[(1,2),(3,4)]', '[(a,b),(c,d)]', '((1,2),)', '(a,[b,c])'),
        *('"x"', "'a,b'", "['a','b']", '[ a, b ]', '~/x', 'mmdet::a/b.py'),
        *('x(1)', 'a=b', '[a,(b)]', '[[1,2],[3]]'),
    ):
        (value,) = read(f'key={text}').values()
        assert repr(value) == repr(DictAction._parse_iterable(text)), text


def test_settings_that_mmengine_stumbles_on():
    """Lists of dicts, blanks, and lists without a bracket around them."""
    for text, want in (
        ('/data/my set', '/data/my set'),
        ('[my set, b  c]', ['my set', 'b  c']),
        ("[dict(type='A', x=[1, 2]), {'b': None}]",
         [dict(type='A', x=[1, 2]), dict(b=None)]),
        ("dict(a=dict(b='c d'))", dict(a=dict(b='c d'))),
        ('[1,2],[3]', [[1, 2], [3]]),
        ('a(b,c)', 'a(b,c)'),
    ):  # fmt: skip
        assert read(f'a.b={text}') == {'a.b': want}
    cfg = Config(dict(data=dict(pipeline=[dict(type='Old')])))
    cfg.merge_from_dict(read("data.pipeline=[dict(type='New')]"))
    assert cfg.data.pipeline[0].type == 'New'


@pytest.mark.parametrize(
    'setting, said',
    (
        ('a.b', "'a.b' has no ="),
        ('a=[1,(2]', 'Imbalanced brackets'),
        ('a=1)', 'Imbalanced brackets'),
        ('a=(1', 'Imbalanced brackets'),
        ('a=' + '[' * 999 + ']' * 999, 'recursion'),
        ('a=dict(type=A)', 'strings in quotes'),
        ('a={', 'strings in quotes'),
        ("a=[dict(**{'b': 1})]", 'strings in quotes'),
        ("a={'b': __import__('os')}", 'strings in quotes'),
    ),
)
def test_a_setting_that_can_not_be_read(setting, said):
    with pytest.raises(cli.StartError, match='KEY=VALUE') as error:
        read(setting)
    assert said in str(error.value) and '\n' not in str(error.value)
    assert len(str(error.value)) < 300


def test_a_tool_gives_the_exit_code():
    with pytest.raises(SystemExit) as caught:
        cli.run(lambda: 1)
    assert caught.value.code == 1
    cli.run(lambda: None)
