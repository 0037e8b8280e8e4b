"""What the safe loader reads, and what it still refuses."""

import io
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip('torch')
HistoryBuffer = pytest.importorskip('mmengine.logging').HistoryBuffer

from helpers import FORKS  # noqa: E402
from mmengine.utils import digit_version  # noqa: E402

from polynl_mm.engine import safe_load  # noqa: E402
from polynl_mm.limits import MB, call_in_child  # noqa: E402

ROOT = Path(__file__).parents[2]
NL_HEAD = 'nl-head_r50-d8_4xb2-40k_cityscapes-512x1024'

pytestmark = pytest.mark.skipif(
    digit_version(torch.__version__) < digit_version('2.6.0'),
    reason='torch.load is not restricted before 2.6',
)


def save(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def load(data):
    return torch.load(io.BytesIO(data), weights_only=True)


def repickle(data, old, new):
    """Exchange bytes in the pickle inside a checkpoint."""
    result = io.BytesIO()
    source = zipfile.ZipFile(io.BytesIO(data))
    with zipfile.ZipFile(result, 'w') as target:
        for info in source.infolist():
            content = source.read(info)
            if info.filename.endswith('/data.pkl'):
                assert old in content
                content = content.replace(old, new)
            target.writestr(info, content)
    return result.getvalue()


PLAIN = {
    'matrix': np.arange(6.0).reshape(2, 3),
    'fortran': np.asfortranarray(np.arange(6).reshape(2, 3)),
    'big endian': np.arange(5, dtype='>f4'),
    'bool': np.array([True, False]),
    'half': np.arange(3, dtype=np.float16),
    'complex': np.array([1j]),
    'text': np.array(['a', 'héé']),
    'bytes': np.array([b'a', b'bcd']),
    'empty': np.zeros((0, 3)),
    'no axis': np.array(3.5),
    'scalar': np.float64(3.5),
    'int scalar': np.int64(-4),
    'bool scalar': np.bool_(True),
    'text scalar': np.str_('héé'),
}


@pytest.mark.parametrize('name', PLAIN)
def test_plain_values_come_back(name):
    value = PLAIN[name]
    expected = pickle.loads(pickle.dumps(value))
    loaded = load(save(value))
    np.testing.assert_array_equal(loaded, expected, strict=True)
    assert np.shape(loaded) == np.shape(expected)


def test_arrays_are_saved_again_as_numpy_arrays():
    data = save(load(save(PLAIN)))
    assert b'polynl_mm' not in data
    assert b'PlainArray' not in data
    array = load(save(PLAIN['matrix']))
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        again = pickle.loads(pickle.dumps(array, protocol))
        assert type(again) is np.ndarray
        np.testing.assert_array_equal(again, array)


def test_log_history_comes_back_and_goes_on():
    loaded = load(save(HistoryBuffer([1, 2], [1, 1])))
    assert type(loaded) is HistoryBuffer
    loaded.update(6)
    assert loaded.statistics('mean') == 3
    assert loaded.statistics('max') == 6
    assert loaded.statistics('min') == 1
    assert loaded.statistics('current') == 6


@pytest.mark.parametrize('other', ['core', '_core'])
def test_names_of_both_numpy_versions(other):
    mine = '_core' if hasattr(np, '_core') else 'core'
    value = [PLAIN['matrix'], PLAIN['scalar']]
    data = save(value)
    if other != mine:
        data = repickle(
            data, f'numpy.{mine}.'.encode(), f'numpy.{other}.'.encode()
        )
    array, scalar = load(data)
    np.testing.assert_array_equal(array, value[0], strict=True)
    assert scalar == value[1]


class Call:
    """Pickles as a call of ``function(*args)``, then a state."""

    def __init__(self, function, *args, state=None):
        self.result = (function, args, state)

    def __reduce__(self):
        return self.result


def dtype_of(code, state):
    return Call(np.dtype, code, False, True, state=state)


CRAFTED = {
    'globals of a method': lambda: Call(
        getattr, Call(getattr, HistoryBuffer, 'mean'), '__globals__'
    ),
    'init of the buffer': lambda: Call(getattr, HistoryBuffer, '__init__'),
    'register_statistics': lambda: Call(
        getattr, HistoryBuffer, 'register_statistics'
    ),
    'the same name elsewhere': lambda: Call(
        getattr, torch.nn.Parameter, 'mean'
    ),
    'getattr of an array': lambda: Call(getattr, np.zeros(1), 'tofile'),
    'system': lambda: Call(__import__('os').system, 'echo crafted'),
    'eval': lambda: Call(eval, '1'),
    'bytes as object pointers': lambda: Call(
        np.ndarray, (1,), 'O', bytes(range(1, 9))
    ),
    'object dtype': lambda: Call(np.dtype, 'O', False, True),
    'object array': lambda: np.array([None, {}], dtype=object),
    'structured dtype': lambda: np.zeros(1, 'i4,f4'),
    'object flag on numbers': lambda: dtype_of(
        'f8', (3, '<', None, None, None, -1, -1, 63)
    ),
    'field outside of the item': lambda: dtype_of(
        'i8', (3, '<', None, ('a',), {'a': (np.dtype('f8'), 800)}, -1, -1, 0)
    ),
    'text of another size': lambda: dtype_of(
        'S1', (3, '|', None, None, None, 9999, 1, 0)
    ),
    'many bytes': lambda: Call(bytes, 10),
}


@pytest.mark.parametrize('name', CRAFTED)
def test_crafted_files_are_refused(name, capfd):
    data = save({'state_dict': {}, 'message_hub': CRAFTED[name]()})
    with pytest.raises(Exception) as caught:
        load(data)
    assert isinstance(
        caught.value,
        (ValueError, TypeError, AttributeError, pickle.UnpicklingError),
    )
    assert 'crafted' not in capfd.readouterr().out


def test_getattr_refusal_is_clear():
    data = save(CRAFTED['globals of a method']())
    with pytest.raises(ValueError, match=r'only min, max, mean, current of H'):
        load(data)


def fresh(code):
    return subprocess.run(
        [sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True
    )


@pytest.fixture
def load_after(tmp_path):
    """Load a log history in a fresh process, after some code.

    As under the unmodified tools of a host.
    """
    file = tmp_path / 'history.pth'
    torch.save({'log': HistoryBuffer([1.0], [1])}, file)

    def load_after(code):
        return fresh(
            f'import sys, torch, mmengine; {code}; '
            f'torch.load({str(file)!r}, weights_only=True)'
        )

    return load_after


def test_mmengine_alone_is_not_enough(load_after):
    done = load_after('pass')
    assert done.returncode != 0
    assert 'HistoryBuffer' in done.stderr


def test_looking_up_a_type_of_ours_is_enough(load_after):
    done = load_after('mmengine.MODELS.get("polynl_mm.PolyNL2d")')
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    'host, config',
    [
        ('mmdet', 'coco/mask-rcnn_r50-plain_fpn_1x_coco.py'),
        ('mmdet', 'mini/retinaface_r50-polynl_mini-wider.py'),
        pytest.param(
            *('mmseg', f'cityscapes/{NL_HEAD}.py'),
            marks=pytest.mark.skipif(
                FORKS, reason='mmengine alone finds no mmseg:: base of a fork'
            ),
        ),
    ],
)
def test_reading_a_config_of_ours_is_enough(load_after, host, config):
    """Before any type is looked up, by ``custom_imports``."""
    pytest.importorskip(host)
    done = load_after(
        f'mmengine.Config.fromfile("configs/{config}"); '
        'assert "polynl_mm.registry" not in sys.modules'
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize('room', ['checks', 'start'])
def test_what_reads_checkpoints_is_enough(load_after, room):
    """For a config that names nothing of ours, under our tools."""
    done = load_after(f'import polynl_mm.engine.{room}')
    assert done.returncode == 0, done.stderr


def test_unsafe_fallback_of_a_distribution_is_replaced():
    """Another distribution of mmengine has it under this name."""
    done = fresh(
        'import torch, mmengine.runner.checkpoint as loading; '
        'loading._safe_torch_load = None; import polynl_mm.engine.safe_load; '
        'assert loading._safe_torch_load is torch.load'
    )
    assert done.returncode == 0, done.stderr


# What is built of harmless types alone


def text(value):
    return b'X' + struct.pack('<I', len(value)) + value.encode()


def sized(kind, size):
    """Pickle a call of a type with a number."""
    number = b'\x8a\x08' + size.to_bytes(8, 'little')
    return f'c{kind}\n'.encode() + number + b'\x85R'


def doubled(times):
    """Pickle a text whose length is doubled at every turn."""
    encode = b'c_codecs\nencode\nq\x00'
    first = encode + text('a' * 64) + text('latin1') + b'\x86Rq\x01'
    turn = b'h\x00h\x01' + text('hex') + b'\x86Rq\x01'
    return first + times * turn


HOSTILE = {
    'bytearray': sized('builtins\nbytearray', 2**33),
    'storage': sized('torch.storage\nUntypedStorage', 2**33),
    'tensor': sized('torch\nTensor', 2**31),
    'hex of hex': doubled(24),
    # Each of 60 tuples holds the one before twice.
    'wide': b')q\x00' + 60 * b'h\x00h\x00\x86q\x00',
    # A tuple in a million tuples, as a key: hash() exhausts the stack.
    'deep': b'}N' + 10**6 * b'\x85' + b'K\x01s',
}


@pytest.fixture
def limit(monkeypatch):
    """Set smaller limits."""

    def limit(**limits):
        monkeypatch.setattr(
            safe_load,
            'call_in_child',
            lambda *args, **usual: call_in_child(*args, **{**usual, **limits}),
        )

    return limit


@pytest.fixture
def refusal(tmp_path):
    """Say why a file is not read."""

    def refusal(data):
        file = tmp_path / 'hostile.pth'
        file.write_bytes(data)
        with pytest.raises(ValueError) as caught:
            safe_load.read_checkpoint(str(file))
        return str(caught.value)

    return refusal


@pytest.mark.parametrize('name', HOSTILE)
def test_hostile_files_are_refused(name, limit, refusal):
    limit(memory=64 * MB, seconds=3 if name == 'wide' else 60)
    said = refusal(repickle(save(None), b'N.', HOSTILE[name] + b'.'))
    other = {
        'deep': 'reading it ends in SIGSEGV',
        'wide': 'reading it takes more than 3 s',
    }.get(name)
    assert said in ('reading it takes more than 64 MB', other)


def test_a_zip_that_swells_is_refused(limit, refusal):
    limit(memory=64 * MB)
    # More than this process may have freed and not given back.
    whole = save(torch.zeros(512 * MB, dtype=torch.int8))
    source = zipfile.ZipFile(io.BytesIO(whole))
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, 'w', zipfile.ZIP_DEFLATED) as target:
        for info in source.infolist():
            target.writestr(info.filename, source.read(info))
    assert len(bomb.getvalue()) < MB
    assert refusal(bomb.getvalue()) == 'reading it takes more than 64 MB'


def test_limits_are_by_the_size_of_the_file(monkeypatch, tmp_path):
    """Memory: four times that, and 1 GB."""
    met = {}
    monkeypatch.setattr(
        safe_load, 'call_in_child', lambda *args, **limits: met.update(limits)
    )
    file = tmp_path / 'large.pth'
    file.write_bytes(save(torch.zeros(25 * MB, dtype=torch.int8)))
    assert len(safe_load.read_checkpoint(str(file))) == 25 * MB
    size = file.stat().st_size
    assert met == dict(memory=1024 * MB + 4 * size, seconds=62)
