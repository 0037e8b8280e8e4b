"""Mutated files for every reader: a value, or one line that names the file.

    FUZZ=100000 nice python -m pytest tests/reliability/test_fuzz_readers.py

FUZZ is the number of inputs for each reader, FUZZ_FIRST that of the first one:
an input is made from its number alone, and a failure tells it. It is quicker
with --basetemp in memory, such as /dev/shm/fuzz.
"""

import io
import os
import random
import resource
import signal
import sys
import time
from collections import Counter

import cv2
import numpy as np
import pytest
from PIL import Image

from polynl_mm import limits
from polynl_mm.faces import files

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')

from polynl_mm.engine import checks, cli  # noqa: E402
from polynl_mm.segmentation import labels  # noqa: E402

COUNT = int(os.environ.get('FUZZ', 300))
FIRST = int(os.environ.get('FUZZ_FIRST', 0))
# The longest that an input of some kB may take, on a machine that does other
# things, too; and what the process may grow by over all of them.
SECONDS = 5
GROWTH_MIB = 300

TOKENS = (
    *(b'\n', b'\r', b'\r\n', b'\x00', b' ', b'\t', b'#', b'# ', b'/', b'-'),
    *(b'..', b'../', b'/etc/', b'a/b.jpg', b'.png', b'\\', b'~', b'%s', b','),
    *(b'nan', b'inf', b'-inf', b'1e999', b'1e300', b'-1', b'0', b'0x10'),
    *(b'9223372036854775807', b'9223372036854775808', b'1_0', b'1' * 5000),
    *(b'\xef\xbb\xbf', b'\xff\xfe', b'\xc3\xe6', '\u9762.jpg'.encode('gbk')),
    *(
        b'\xff',
        b'\xff\xd8',
        b'\xff\xd9',
        b'\xff\xda',
        b'\xff\xff',
        b'\xff\x00',
    ),
    *('\u0661 \u2028\u3000\x85'.encode(), b'[', b']', b'(', b')', b'{', b'='),
    *(
        b'\xff\xff',
        b'\xff\x00',
        b'"',
        b"'",
        b'dict(',
        b'type=',
        b'None',
        b'IHDR',
        b'PLTE',
        b'IDAT',
    ),
)


def mutated(rng, seeds):
    """One of the seeds after some changes, few as a rule."""
    content = bytearray(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        size = len(content)
        at = rng.randrange(size + 1)
        end = min(size, at + rng.choice((1, 2, 4, 16, 100, size)))
        kind = rng.randrange(8)
        if kind == 0:
            content[at:at] = rng.choice(TOKENS)
        elif kind == 1:
            content[at:end] = rng.choice(TOKENS)
        elif kind == 2:
            del content[at:end]
        elif kind == 3:
            content[at:at] = content[at:end] * rng.choice((1, 1, 2, 20))
        elif kind == 4 and at < size:
            content[at] ^= 1 << rng.randrange(8)
        elif kind == 5:
            content[at:end] = rng.randbytes(end - at)
        elif kind == 6:
            other = rng.choice(seeds)
            begin = rng.randrange(len(other) + 1)
            content[at:] = other[begin:]
        else:
            lines = content.split(b'\n')
            rng.shuffle(lines)
            content = bytearray(b'\n'.join(lines))
        # The time is for inputs, not for what doublings make of them.
        del content[20_000:]
    return bytes(content)


def pictures(*kinds):
    """Small pictures as encoders write them."""
    rng = np.random.default_rng(0)
    grey = Image.fromarray(rng.integers(0, 2, (9, 14), np.uint8))
    made = []
    for kind, mode, options in kinds:
        file = io.BytesIO()
        grey.convert(mode).save(file, kind, **options)
        made.append(file.getvalue())
    return made


JPEGS = pictures(
    ('jpeg', 'RGB', {}),
    ('jpeg', 'L', dict(progressive=True)),
    ('jpeg', 'RGB', dict(restart_marker_blocks=1, comment=b'\xff\xd9')),
)
PNGS = pictures(('png', 'L', {}), ('png', 'P', {}))
PREDICTIONS = (
    b'a/b.jpg\n2\n1 2 3 4 0.5\n-1.5e1 10. .5 +20 -7.25\n',
    b'a\r\n 0 \r\n\r\n',
)


def read_pixels(content):
    # How large a picture may be is another matter.
    width, height = Image.open(io.BytesIO(content)).size
    if width * height > 10**6:
        return None
    return cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)


def read_any(path):
    """As WiderFaceDataset does, by the content."""
    kind = files.annotation_format(path)
    if kind == 'bbx_gt':
        faces = files.read_bbx_gt(path, folder=path.parent)
        assert all(rows.shape[1] == 10 for rows in faces.values())
        # As a corner is made of left and width.
        assert all((abs(rows) < 2**40).all() for rows in faces.values())
        return faces
    if kind == 'list':
        return files.read_file_list(path, folder=path.parent)
    found = files.read_landmark_labels(path, folder=path.parent)
    for faces in found.values():
        assert np.isfinite(faces.bboxes).all()
        assert np.isfinite(faces.keypoints).all()
        assert len(faces.bboxes) == len(faces.keypoints) == len(faces.lines)
    return found


def read_collecting(path):
    """As check_wider_face.py does: no error ends it, all name the file."""
    errors = []
    found = files.read_bbx_gt(path, errors)
    marks = files.read_landmark_labels(path, errors, allow_degenerate=True)
    files.match_landmarks(found, marks, path, path, errors)
    files.read_file_list(path, errors)
    assert all(str(path) in error and '\n' not in error for error in errors)
    return found


def read_names(path):
    """A list that gives names which all lie in the folder."""
    found = files.read_file_list(path, folder=path.parent)
    for name in found:
        stem = os.path.splitext(name)[0]
        files.prediction_path(path.parent / 'out', stem)
    return found


def read_rows(path):
    rows = files._read_rows(str(path))
    assert rows.shape[1] == 5 and np.isfinite(rows).all()


def read_jpeg(path):
    content = path.read_bytes()
    pixels = limits.decode_picture(content, path, read_pixels)
    # Whatever a phone appends.
    limits.decode_picture(content + b'\xff\xda\x00', path, lambda _: pixels)


class Data:
    """Of mmseg, as far as the check of a label looks at it."""

    metainfo = dict(classes=('a', 'b'))
    ignore_index = 255


def read_label(path):
    from mmseg.datasets.transforms import LoadAnnotations

    pair = dict(
        img_path=str(path),
        seg_map_path=str(path),
        reduce_zero_label=False,
        label_map=None,
    )
    labels._check_pair(Data, LoadAnnotations(), pair)


def read_mmseg_list(path):
    """What mmseg reads of a list that the check lets through is its text."""
    from mmengine.fileio import list_from_file

    checks._check_text(str(path), str(path))
    assert not any(
        line.startswith('\ufeff') for line in list_from_file(path)[:1]
    )


def read_setting(path):
    text = path.read_bytes().decode(errors='replace')
    try:
        cli._read_value(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{path}: {error}') from error


POINTS = b' '.join([b'30.5 40.25 %d'] * 5) % (0, 1, 0, 1, -1)
TEXTS = (
    b'a/b.jpg\n2\n449 330 122 149 0 0 0 0 0 0 \n-3 -4 20 21 2 1 1 1 2 1 \n'
    b'c d/e f.jpg\n0\n0 0 0 0 0 0 0 0 0 0 \n'
    b'g/h.png\n1\n7 8 0 30 0 0 0 0 0 0\n',
    b'# a/b.jpg\n449 330 122 149 ' + POINTS + b' 0.82\n1 2 3 4\n# g/h.jpg\n',
    b'# a/b.jpg 640 480\n1 2 30 40 '
    + POINTS
    + b'\n5 6 7 8 1\n# g/h.png 9 9\n',
)
LIST = b'a/b.jpg\nc d/e f.jpg\n./g/h.png\n'
SETTINGS = (
    b"[dict(type='A', x=[1, 2]), {'b': None}]",
    b'[(a,b),(c,d)]',
    b'1,2.5,true,None,"x y",mmdet::a/b.py',
)
READERS = {
    'annotations': (read_any, [*TEXTS, LIST], 'txt'),
    'all of a text': (read_collecting, [*TEXTS, LIST], 'txt'),
    'picture lists': (read_names, [LIST, b'\n'.join([LIST, b'/x/'])], 'txt'),
    'predictions': (read_rows, PREDICTIONS, 'txt'),
    'jpegs': (read_jpeg, JPEGS, 'jpg'),
    'labels of mmseg': (read_label, PNGS, 'png'),
    'lists of mmseg': (read_mmseg_list, [b'a/0\na/1\n', LIST], 'txt'),
    '--cfg-options': (read_setting, SETTINGS, 'txt'),
}


def late(*_):
    raise AssertionError(f'more than {SECONDS} s')


def fuzz(name, folder, numbers):
    """Count what became of the inputs; AssertionError at what may not be."""
    read, seeds, suffix = READERS[name]
    path = folder / f'some.{suffix}'
    for seed in seeds:
        path.write_bytes(seed)
        # Each is read, or refused for what it is a mixture of.
        counted(read, path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    counts = Counter()
    signal.signal(signal.SIGALRM, late)
    for number in numbers:
        content = mutated(random.Random(f'{name} {number}'), seeds)
        path.write_bytes(content)
        signal.alarm(SECONDS)
        try:
            counts[counted(read, path)] += 1
        except BaseException as error:
            raise AssertionError(
                f'input {number} of {name}: {content[:300]!r}: {error!r}'
            ) from error
        finally:
            signal.alarm(0)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # In bytes on a Mac.
    grown = (after - before) / (1024 if sys.platform == 'linux' else 2**20)
    assert grown < GROWTH_MIB, f'{name}: {grown:.0f} MiB more'
    return counts


def counted(read, path):
    try:
        read(path)
    except (ValueError, cli.StartError) as error:
        message = str(error)
        assert str(path) in message, message
        assert len(message) < 2000, message[:300]
        return 'refused'
    return 'read'


@pytest.mark.parametrize('name', READERS)
def test_mutated_files(name, tmp_path, capfd):
    begin = time.perf_counter()
    counts = fuzz(name, tmp_path, range(FIRST, FIRST + COUNT))
    seconds = time.perf_counter() - begin
    if 'FUZZ' in os.environ:
        with capfd.disabled():
            print(f'{name}: {dict(counts)}, {seconds:.0f} s', flush=True)
    assert sum(counts.values()) == COUNT
    # Neither is what a mutation always leads to, but where all that is wrong
    # is collected.
    assert len(counts) == 1 + (name != 'all of a text')


def test_a_failure_tells_its_number(tmp_path, monkeypatch):
    def hangs(path):
        if path.read_bytes() != b'seed':
            time.sleep(60)

    def forgets(path):
        if path.read_bytes() != b'seed':
            raise KeyError('width')

    def anonymous(path):
        if path.read_bytes() != b'seed':
            raise ValueError('something is wrong')

    monkeypatch.setattr(sys.modules[__name__], 'SECONDS', 1)
    for read, said in (
        (hangs, 'more than 1 s'),
        (forgets, 'width'),
        (anonymous, 'something is wrong'),
    ):
        monkeypatch.setitem(READERS, 'it', (read, [b'seed'], 'txt'))
        with pytest.raises(AssertionError, match=f'input 7 of it: .*{said}'):
            fuzz('it', tmp_path, range(7, 9))
