"""What is published of a checkpoint, and that anybody can read it."""

import hashlib
import re
import runpy
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('mmengine')

from mmengine.logging import HistoryBuffer  # noqa: E402

from polynl_mm.engine import cli  # noqa: E402

TOOL = Path(__file__).parents[2] / 'tools/publish_model.py'


@pytest.fixture
def publish(tmp_path, monkeypatch, capfd):
    """Run the tool in this process; give exit code, output, error lines."""
    monkeypatch.chdir(tmp_path)

    def publish(*args):
        monkeypatch.setattr(sys, 'argv', [TOOL.name, *map(str, args)])
        monkeypatch.setattr(sys, 'path', sys.path[:])
        monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
        code = 0
        try:
            cli.run(runpy.run_path(str(TOOL))['main'])
        except SystemExit as end:
            code = end.code
        out, err = capfd.readouterr()
        return code, out, err.splitlines()

    return publish


def trained():
    """As mmengine saves it: the averaged weights stand in state_dict."""
    state = OrderedDict(a=torch.arange(6.0)[:2], b=torch.ones(2, 3))
    state._metadata = OrderedDict({'': dict(version=np.int64(2))})
    history = HistoryBuffer([1.0, 2.0], [1, 1])
    return dict(
        meta=dict(
            epoch=np.int64(3),
            cfg='a = 1',
            dataset_meta=dict(
                classes=('x', 'y'), palette=np.array([[1, 2, 3], [4, 5, 6]])
            ),
            best=np.float64(0.5),
            seen=history,
        ),
        state_dict=state,
        ema_state_dict=OrderedDict(a=torch.zeros(2)),
        optimizer=dict(state={0: torch.zeros(9)}, param_groups=[]),
        message_hub=dict(log_scalars={'train/loss': history}),
    )


def test_weights_and_plain_meta(tmp_path, publish):
    torch.save(trained(), 'epoch_3.pth')
    code, out, err = publish('epoch_3.pth', 'out/model.pth')
    assert code == 0, err
    (path,) = (tmp_path / 'out').iterdir()
    digits = re.fullmatch(r'model-([0-9a-f]{8})\.pth', path.name)[1]
    content = path.read_bytes()
    assert hashlib.sha256(content).hexdigest().startswith(digits)
    assert out.startswith(f'out/{path.name}: {len(content):,} bytes; left out')
    assert out.strip().endswith('ema_state_dict, message_hub, optimizer')
    assert err == ["publish_model.py: left out: meta['seen'], a HistoryBuffer"]
    # The whole of the tensor that a is a part of would take 24 bytes.
    read = """
    import sys, torch
    found = torch.load(sys.argv[1], weights_only=True)
    assert not {'polynl_mm', 'mmengine'} & set(sys.modules)
    assert found['state_dict']['a'].untyped_storage().nbytes() == 8
    assert found['state_dict']._metadata == {'': {'version': 2}}
    print(found['meta'], found['state_dict']['b'].sum().item(), set(found))
    """.replace('    ', '')
    done = subprocess.run(
        [sys.executable, '-c', read, path], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    meta = dict(
        epoch=3,
        cfg='a = 1',
        dataset_meta=dict(classes=('x', 'y'), palette=[[1, 2, 3], [4, 5, 6]]),
        best=0.5,
    )
    assert done.stdout.startswith(f'{meta} 6.0 ')
    # The same again from what was published, under the same name.
    code, _, err = publish(path, 'out/model')
    assert (code, err) == (0, [])
    assert [*(tmp_path / 'out').iterdir()] == [path]


@pytest.mark.parametrize('out', ('there', 'there/', 'made/a/', '.', './'))
def test_in_a_folder_it_is_called_as_it_was(tmp_path, publish, out):
    Path('in').mkdir()
    torch.save(trained(), 'in/epoch_3.pth')
    Path('there').mkdir()
    before = {*tmp_path.rglob('*.pth')}
    code, said, _ = publish('in/epoch_3.pth', out)
    (path,) = {*tmp_path.rglob('*.pth')} - before
    assert code == 0 and path.parent == (tmp_path / out).resolve()
    assert re.fullmatch(r'epoch_3-[0-9a-f]{8}\.pth', path.name)
    assert Path(said.partition(':')[0]).resolve() == path


@pytest.mark.parametrize(
    'content, said',
    (
        (None, 'checkpoint in.pth does not exist'),
        (b'PK', 'checkpoint in.pth can not be read: '),
        ([1], 'checkpoint in.pth has no state_dict'),
        (
            dict(state_dict=dict(a=3)),
            "its state_dict holds a int as 'a', expected tensors alone",
        ),
    ),
)
def test_what_can_not_be_published(tmp_path, publish, content, said):
    if isinstance(content, bytes):
        Path('in.pth').write_bytes(content)
    elif content is not None:
        torch.save(content, 'in.pth')
    code, out, (line,) = publish('in.pth', 'out.pth')
    assert (code, out) == (2, '')
    assert line.startswith('publish_model.py: error: ') and said in line
    assert {path.name for path in tmp_path.iterdir()} <= {'in.pth'}


def test_where_it_can_not_be_written(tmp_path, publish):
    torch.save(trained(), 'in.pth')
    Path('out').write_text('')
    code, _, lines = publish('in.pth', 'out/model.pth')
    assert code == 2
    assert 'can not be written' in lines[-1]
