"""Label files of ImageNet: what is read, and what is said of a wrong line."""

import numpy as np
import pytest

pytest.importorskip('scipy')

from scipy.io import savemat  # noqa: E402

from polynl_mm.classification.files import (  # noqa: E402
    Label,
    read_labels,
    read_synsets,
)

CLASSES = ('n01', 'n02', 'n03')


def save_meta(path, ids=((1, 'n03'), (2, 'n01'), (3, 'n02'))):
    """As the official one: groups of classes come last, with children."""
    rows = [(i, name, 0) for i, name in ids] + [(4, 'n00', 3)]
    kinds = [('ILSVRC2012_ID', 'O'), ('WNID', 'O'), ('num_children', 'O')]
    synsets = np.array(rows, kinds).reshape(-1, 1)
    savemat(path, dict(synsets=synsets))
    return path


@pytest.fixture
def read(tmp_path):
    def read(text, pictures=('x.JPEG', 'y.JPEG', 'z.JPEG')):
        (tmp_path / 'val.txt').write_bytes(text.encode())
        path, meta = tmp_path / 'val.txt', tmp_path / 'meta.mat'
        return read_labels(path, CLASSES, pictures, meta)

    return read


def test_names_and_indices(read):
    assert read('\ufeffb c.JPEG 2\r\n\n a.JPEG   0\n') == [
        Label('b c.JPEG', 2, 1),
        Label('a.JPEG', 0, 3),
    ]


def test_those_of_the_development_kit(read, tmp_path):
    save_meta(tmp_path / 'meta.mat')
    assert read('2\n1\n3\n') == [
        Label('x.JPEG', 0, 1),
        Label('y.JPEG', 2, 2),
        Label('z.JPEG', 1, 3),
    ]


@pytest.mark.parametrize(
    'text, message',
    [
        ('', 'val.txt: empty, expected a picture and its class'),
        ('a 0\nb\n', "val.txt, line 2: got 'b', expected a picture and its"),
        ('a 0\nb -1\n', "line 2: got 'b -1', expected a picture and its"),
        ('a 0\n\nb 3\n', "line 3: got 'b 3', expected a class from 0 to 2"),
        ('a 0\nb 1\na 2\n', 'val.txt, line 3: a was in line 1'),
        ('1\n2\n', 'val.txt: 2 labels, expected one for each of the 3'),
        ('1\n4\n2\n', "line 2: got '4', expected one of the 3 ILSVRC2012_ID"),
        ('1\nx 2\n2\n', "val.txt, line 2: got 'x 2', expected one of the 3"),
    ],
)
def test_a_wrong_line(read, tmp_path, text, message):
    save_meta(tmp_path / 'meta.mat')
    with pytest.raises(ValueError) as caught:
        read(text)
    assert message in str(caught.value)


def test_a_class_without_a_folder(read, tmp_path):
    save_meta(tmp_path / 'meta.mat', ((1, 'n01'), (2, 'n02'), (3, 'n99')))
    with pytest.raises(ValueError, match='line 2: 3 is n99 in .*meta.mat, of'):
        read('1\n3\n2\n')


def test_meta_that_is_none(tmp_path):
    with pytest.raises(FileNotFoundError, match='meta.mat: not there'):
        read_synsets(tmp_path / 'meta.mat')
    (tmp_path / 'meta.mat').write_bytes(b'MATLAB 5.0' + b'\0' * 200)
    with pytest.raises(ValueError, match='meta.mat: expected a MATLAB 5'):
        read_synsets(tmp_path / 'meta.mat')
    savemat(tmp_path / 'meta.mat', dict(synsets=np.zeros(3)))
    with pytest.raises(ValueError, match='ILSVRC2012_ID, WNID and num_ch'):
        read_synsets(tmp_path / 'meta.mat')
