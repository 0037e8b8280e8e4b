"""The readers of the official text files, and what they say of broken ones."""

import numpy as np
import pytest
from release import KEYPOINTS, NAMES, OFFICIAL, RETINAFACE, SCRFD

from polynl_mm.faces.files import (
    read_bbx_gt,
    read_file_list,
    read_landmark_labels,
)


def rows(images):
    return {name: faces.tolist() for name, faces in images.items()}


@pytest.fixture
def read(tmp_path):
    def read(text):
        (tmp_path / 'gt.txt').write_bytes(text.encode())
        return read_bbx_gt(tmp_path / 'gt.txt')

    return read


def test_the_reader_gives_every_number(read):
    images = read(OFFICIAL)
    assert list(images) == NAMES
    assert [faces.shape for faces in images.values()] == [
        (3, 10),
        (0, 10),
        (3, 10),
        (1, 10),
    ]
    assert all(faces.dtype == np.int64 for faces in images.values())
    assert images[NAMES[0]][1].tolist() == [10, 20, 8, 30, 2, 1, 1, 0, 2, 1]
    assert images[NAMES[2]][:, :4].tolist() == [
        [7, 8, 0, 30],
        [9, 9, -2, 12],
        [-3, -4, 20, 21],
    ]


@pytest.mark.parametrize(
    'change',
    (
        lambda text: text.replace('0 0 0 0 0 0 0 0 0 0 \n', ''),
        lambda text: text.replace(' \n', '\n'),
        lambda text: text.replace('\n', '\r\n'),
        lambda text: text.replace('\n', '\n\n'),
        lambda text: text.rstrip(),
        lambda text: '\ufeff' + text,
        lambda text: text.replace(' ', '\t'),
    ),
    ids=[
        'no dummy',
        'no blank',
        'CRLF',
        'blank lines',
        'no end',
        'BOM',
        'tab',
    ],
)
def test_the_reader_takes_what_copies_made_of_the_file(read, change):
    changed = change(OFFICIAL)
    assert changed != OFFICIAL
    assert rows(read(changed)) == rows(read(OFFICIAL))


def test_the_last_picture_may_be_the_faceless_one(read):
    for dummy in ('', '0 0 0 0 0 0 0 0 0 0 \n'):
        assert rows(read(f'a/b.jpg\n0\n{dummy}')) == {'a/b.jpg': []}
    # With a count of 1 the zeros are a face, degenerate as it is.
    assert rows(read('a/b.jpg\n1\n0 0 0 0 0 0 0 0 0 0 \n')) == {
        'a/b.jpg': [[0] * 10]
    }


FACE = '1 2 3 4 0 0 0 0 0 0 '


@pytest.mark.parametrize(
    'text, line, got, expected',
    (
        (f'1\n{FACE}\n', 1, '1', 'event/name.jpg'),
        ('b.jpg\n0\n', 1, 'b.jpg', 'event/name.jpg'),
        ('a/b\n0\n', 1, 'a/b', 'event/name.jpg'),
        (f'a/b.jpg\n{FACE}\n', 2, FACE.strip(), 'number of faces of a/b.jpg'),
        ('a/b.jpg\ntwo\n', 2, 'two', 'number of faces'),
        ('a/b.jpg\n-1\n', 2, '-1', 'number of faces'),
        ('a/b.jpg\n1\n1 2 3 4 0 0 0 0 0\n', 3, '1 2 3 4 0', '10 integers'),
        (f'a/b.jpg\n1\n{FACE}0\n', 3, '1 2 3 4', '10 integers, x y w h blur'),
        ('a/b.jpg\n1\n1 2 3.5 4 0 0 0 0 0 0\n', 3, '1 2 3.5', '10 integers'),
        (f'a/b.jpg\n2\n{FACE}\nc/d.jpg\n', 4, 'c/d.jpg', 'face 2 of 2'),
        (f'a/b.jpg\n1\n{FACE}\n{FACE}\n', 4, '1 2 3 4', 'event/name.jpg'),
        (f'a/b.jpg\n0\n{FACE}\n', 3, '1 2 3 4', 'event/name.jpg'),
        ('a/b.jpg\n0\na/b.jpg\n0\n', 3, 'a/b.jpg', 'not come before'),
        ('\n\na/b.jpg\n\nx\n', 5, 'x', 'number of faces'),
        ('# a/b.txt 3 4\n', 1, '# a/b.txt 3 4', 'event/name.jpg'),
    ),
)
def test_a_malformed_line_is_shown(read, tmp_path, text, line, got, expected):
    with pytest.raises(ValueError) as error:
        read(text)
    message = str(error.value)
    start = f'{tmp_path / "gt.txt"}, line {line}: got {got!r}'[:-1]
    assert message.startswith(start), message
    assert expected in message and '\n' not in message


@pytest.mark.parametrize(
    'text, expected',
    (
        ('', 'empty'),
        (' \n\n', 'empty'),
        ('a/b.jpg\n', 'ends where the number of faces of a/b.jpg'),
        (f'a/b.jpg\n2\n{FACE}\n', 'ends where face 2 of 2 of a/b.jpg'),
    ),
)
def test_a_file_that_ends_too_soon(read, tmp_path, text, expected):
    with pytest.raises(ValueError, match=expected) as error:
        read(text)
    assert str(tmp_path / 'gt.txt') in str(error.value)


def test_a_binary_file_is_refused(tmp_path):
    file = tmp_path / 'gt.mat'
    file.write_bytes(bytes(range(256)))
    with pytest.raises(ValueError, match=r'gt\.mat, line 1: got'):
        read_bbx_gt(file)


@pytest.fixture
def read_labels(tmp_path):
    def read(text, **kwargs):
        (tmp_path / 'label.txt').write_text(text)
        return read_landmark_labels(tmp_path / 'label.txt', **kwargs)

    return read


@pytest.mark.parametrize('text', (RETINAFACE, SCRFD))
def test_both_label_formats(read_labels, text):
    images = read_labels(text, allow_degenerate=True)
    assert list(images) == NAMES
    faces = images[NAMES[0]]
    assert faces.bboxes.tolist() == [[449, 330, 571, 479], [10, 20, 18, 50]]
    assert faces.keypoints[0].tolist() == KEYPOINTS
    assert faces.keypoints[1, :, 2].tolist() == [0] * 5
    assert faces.ignore.tolist() == [False, text == SCRFD]
    assert faces.lines.tolist() == [2, 3] and faces.header == 1
    assert images[NAMES[1]].bboxes.shape == (0, 4)
    assert images[NAMES[1]].keypoints.shape == (0, 5, 3)
    assert images[NAMES[2]].bboxes.tolist()[-1] == [-3, -4, 17, 17]
    assert not images[NAMES[2]].ignore.any()


def test_a_label_file_of_boxes_alone(read_labels):
    images = read_labels('# a/b.jpg\n1 2 3 4\n5 6 7 8\n')
    faces = images['a/b.jpg']
    assert faces.bboxes.tolist() == [[1, 2, 4, 6], [5, 6, 12, 14]]
    assert not faces.keypoints[..., 2].any()


def triples(flag):
    return ' '.join([f'1 2 {flag}'] * 5)


BROKEN_LABELS = (
    ('1 2 3 4\n', 1, '# event/name.jpg or'),
    ('# b.jpg\n', 1, '# event/name.jpg or'),
    ('# a/b.jpg 4\n', 1, '# event/name.jpg or'),
    ('# a/b.jpg 4 0\n', 1, '# event/name.jpg or'),
    ('# a/b.jpg 4 x\n', 1, '# event/name.jpg or'),
    ('#\n', 1, '# event/name.jpg or'),
    ('# a/b.jpg\n# a/b.jpg\n', 2, 'not come before'),
    ('# a/b.jpg\n# a/c.jpg 3 4\n', 2, 'the format of the headers'),
    ('# a/b.jpg 3 4\n# a/c.jpg\n', 2, 'the format of the headers'),
    ('# a/b.jpg\n1 2 3\n', 2, '4 or 20 numbers: x y w h'),
    ('# a/b.jpg\n\n1 2 3 4 5\n', 3, '4 or 20 numbers: x y w h'),
    (f'# a/b.jpg\n1 2 3 4 {triples(0)}\n', 2, '4 or 20 numbers'),
    ('# a/b.jpg\n1 2 3 x\n', 2, '4 or 20 numbers'),
    ('# a/b.jpg\n1 2 3 nan\n', 2, '4 or 20 numbers'),
    ('# a/b.jpg\n1 2 inf 4\n', 2, '4 or 20 numbers'),
    ('# a/b.jpg\na/c.jpg\n', 2, '4 or 20 numbers'),
    ('# a/b.jpg\n1 2 -3 4\n', 2, 'w > 0 and h > 0'),
    ('# a/b.jpg\n1 2 3 0\n', 2, 'w > 0 and h > 0'),
    (f'# a/b.jpg\n1 2 3 4 {triples(2)} 0.5\n', 2, '-1, 0 or 1 as the flag'),
    ('# a/b.jpg 3 4\n1 2 3\n', 2, '4 or 5 or 19 numbers: x1 y1 x2 y2'),
    ('# a/b.jpg 3 4\n9 2 3 4\n', 2, 'x2 > x1 and y2 > y1'),
    ('# a/b.jpg 3 4\n1 2 3 2\n', 2, 'x2 > x1 and y2 > y1'),
    ('# a/b.jpg 3 4\n1 2 3 4 0.5\n', 2, '0 or 1 as the fifth number'),
    (f'# a/b.jpg 3 4\n1 2 3 4 {triples(-2)}\n', 2, '-1, 0 or 1 as the flag'),
)


@pytest.mark.parametrize('text, line, expected', BROKEN_LABELS)
def test_a_broken_label_line_is_shown(
    read_labels, tmp_path, text, line, expected
):
    with pytest.raises(ValueError) as error:
        read_labels(text)
    message = str(error.value)
    assert message.startswith(f'{tmp_path / "label.txt"}, line {line}: got ')
    assert expected in message and '\n' not in message
    errors = []
    read_labels(text, errors=errors)
    assert message in errors


def test_an_empty_label_file(read_labels):
    with pytest.raises(ValueError, match='label.txt: empty'):
        read_labels('\n')


def test_all_broken_label_lines_are_collected(read_labels):
    errors = []
    images = read_labels(
        '# a/b.jpg\n1 2 3\n1 2 3 4\n1 2 0 4\n'
        '# c\n1 2 3 4\nx\n# d/e.jpg\n5 6 7 8\n',
        errors=errors,
    )
    assert [e.split(', line ')[1].split(':')[0] for e in errors] == [
        '2',
        '4',
        '5',
        '7',
    ]
    assert {name: len(faces.bboxes) for name, faces in images.items()} == {
        'a/b.jpg': 1,
        'd/e.jpg': 1,
    }


def test_all_broken_official_lines_are_collected(tmp_path):
    file = tmp_path / 'gt.txt'
    file.write_text(
        f'a/b.jpg\n2\n{FACE}\n1 2 3\n'  # line 4
        f'c/d.jpg\nmany\n{FACE}\n'  # line 6
        f'e/f.jpg\n2\n{FACE}\n'
        f'g/h.jpg\n1\n{FACE}\n{FACE}\n'  # lines 11 and 14
        f'i/j.jpg\n1\n'  # the end
    )
    errors = []
    images = read_bbx_gt(file, errors)
    assert [e.split('line ')[-1].split(':')[0] for e in errors[:-1]] == [
        '4',
        '6',
        '11',
        '14',
    ]
    assert 'ends where face 1 of 1 of i/j.jpg' in errors[-1]
    assert {name: len(faces) for name, faces in images.items()} == {
        'a/b.jpg': 1,
        'e/f.jpg': 1,
        'g/h.jpg': 1,
        'i/j.jpg': 0,
    }


def test_the_list_of_test_pictures(tmp_path):
    file = tmp_path / 'list.txt'
    file.write_text('\n'.join(NAMES))
    assert read_file_list(file) == NAMES
    for text, message in (
        ('a/b.jpg\nb.jpg\n', "line 2: got 'b.jpg', expected a picture"),
        ('a/b.jpg\na/b.jpg\n', 'line 2: .* not come before'),
        ('', 'empty'),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_file_list(file)
        errors = []
        read_file_list(file, errors)
        assert len(errors) == 1
