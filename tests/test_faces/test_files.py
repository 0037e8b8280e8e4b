"""The readers of the official files, and what they say of broken ones."""

import io
from pathlib import Path

import numpy as np
import pytest
from mini_data.wider_face import Face
from mini_data.wider_face_files import write_wider_mats
from PIL import Image
from release import KEYPOINTS, NAMES, OFFICIAL, RETINAFACE, SCRFD
from scipy.io import savemat

from polynl_mm.faces.files import (
    SETTINGS,
    annotation_format,
    load_wider_face_gt,
    read_bbx_gt,
    read_file_list,
    read_landmark_labels,
    read_predictions,
    write_predictions,
)
from polynl_mm.limits import decode_picture

ROOT = Path(__file__).parents[2]


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
    'column, value', ((4, 3), (5, 2), (6, 2), (7, 2), (8, 3), (9, 2), (9, -1))
)
def test_an_attribute_out_of_range_is_named(read, column, value):
    words = '10 20 8 30 2 1 1 0 2 1'.split()
    line = ' '.join(words)
    words[column] = str(value)
    broken = ' '.join(words)
    with pytest.raises(ValueError) as caught:
        read(OFFICIAL.replace(line, broken))
    assert f"line 4: got '{broken}', expected x y w h and blur 0 to 2" in str(
        caught.value
    )


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
        (f'a/{"b" * 999}.jpg\n0\n', 1, 'a/bbb', 'event/name.jpg'),
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
        (
            f'a/b.jpg\n1\n{2**63} 2 3 4 0 0 0 0 0 0\n',
            3,
            '9223372036854775808 2',
            'of at most 10 digits',
        ),
        ('a/b.jpg\n9223372036854775808\n', 2, '9223372036854775808', 'number'),
        ('a/b.jpg\n0\na/b.png\n0\n', 3, 'a/b.png', 'not come before'),
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
    ('# a/b.jpg\n1 2 3 1e9\n', 2, 'below 1e9'),
    ('# a/b.jpg 4 5 6\n', 1, '# event/name.jpg or'),
    ('# a/b.jpg\n# a/b.png\n', 2, 'not come before'),
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


@pytest.mark.parametrize(
    'name', ('../b.jpg', 'a/../../b.jpg', '/abs/a/b.jpg', 'a/..', '..')
)
@pytest.mark.parametrize(
    'read, text, line',
    (
        (read_file_list, 'a/b.jpg\n{}\n', 2),
        (read_bbx_gt, 'a/b.jpg\n0\n{}\n0\n', 3),
        (read_landmark_labels, '# a/b.jpg\n1 2 3 4\n# {}\n', 3),
    ),
)
def test_a_name_that_leads_elsewhere(tmp_path, read, text, line, name):
    file = tmp_path / 'some.txt'
    file.write_text(text.format(name))
    folder = tmp_path / 'images'
    with pytest.raises(ValueError) as error:
        read(file, folder=folder)
    message = str(error.value)
    assert message.startswith(f'{file}, line {line}: got ')
    assert (f'a path below {folder}' in message) == name.startswith('/')


@pytest.mark.parametrize('linked', (False, True))
def test_absolute_names_below_the_folder_become_relative(tmp_path, linked):
    """As ``find`` writes them; an annotation of any kind has them alike."""
    real = tmp_path / 'real/images'
    real.mkdir(parents=True)
    (tmp_path / 'link').symlink_to(tmp_path / 'real')
    folder = tmp_path / 'link/images' if linked else real
    file = tmp_path / 'some.txt'
    for name, want in (
        (f'{folder}/a/b c.jpg', 'a/b c.jpg'),
        (f'{real}//a/b.jpg', 'a/b.jpg'),
        ('./a/b.jpg', 'a/b.jpg'),
    ):
        file.write_text(name)
        assert annotation_format(file) == 'list'
        assert read_file_list(file, folder=folder) == [want]
        file.write_text(f'{name}\n0\n')
        assert annotation_format(file) == 'bbx_gt'
        assert list(read_bbx_gt(file, folder=folder)) == [want]
        for size in ('', ' 3 4'):
            file.write_text(f'# {name}{size}')
            assert annotation_format(file) == 'landmarks'
            assert list(read_landmark_labels(file, folder=folder)) == [want]
    file.write_text(f'{real}x/a/b.jpg')
    with pytest.raises(ValueError, match='line 1: got .* a path below'):
        read_file_list(file, folder=folder)


def test_names_in_another_encoding(tmp_path):
    file = tmp_path / 'list.txt'
    file.write_bytes('a/b.jpg\na/\u9762\u5b54.jpg\n'.encode('gbk'))
    assert annotation_format(file) == 'list'
    with pytest.raises(ValueError, match='line 2: .*name.jpg, in UTF-8'):
        read_file_list(file)
    file.write_text('a/b.jpg\na/\u9762\u5b54.jpg\n')
    assert read_file_list(file)[1] == 'a/\u9762\u5b54.jpg'


def test_blanks_in_the_names_of_labels(read_labels):
    for size in ('', ' 640 480'):
        images = read_labels(f'# a b/c  d 1 2.jpg{size}\n1 2 3 4\n')
        assert list(images) == ['a b/c  d 1 2.jpg']


# Pictures


def jpeg(**options):
    """A JPEG with a thumbnail, which is a JPEG, too."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (60, 50, 3), np.uint8))
    thumbnail, whole = io.BytesIO(), io.BytesIO()
    image.resize((8, 8)).save(thumbnail, 'jpeg')
    image.save(whole, 'jpeg', comment=thumbnail.getvalue(), **options)
    return whole.getvalue()


def decode(content, name='some.jpg'):
    return decode_picture(content, name, lambda c: np.zeros(len(c)))


@pytest.mark.parametrize(
    'options',
    ({}, dict(progressive=True), dict(quality=100, restart_marker_blocks=2)),
)
def test_the_end_of_a_jpeg(options):
    """Whatever a phone appends; no part of a picture passes for a whole."""
    whole = jpeg(**options)
    trailer = np.random.default_rng(1).bytes(5000)
    for more in (b'', trailer, b'\xff\xda' + trailer, b'\xff\xd8' * 9):
        assert len(decode(whole + more)) == len(whole + more)
    for size in range(2, len(whole)):
        with pytest.raises(ValueError, match=f'truncated, {size} bytes'):
            decode(whole[:size])
    # Nor an end without a scan before it.
    with pytest.raises(ValueError, match='truncated, 4 bytes'):
        decode(b'\xff\xd8\xff\xd9')


# Prediction files


@pytest.fixture
def files(three, tmp_path, write):
    """A good set of files, and what reads it."""
    gt, rows = three
    folder = write.rows(tmp_path / 'predictions', rows)
    return folder, lambda **how: read_predictions(folder, gt.images, **how)


def test_files_are_read_in_their_order(files, three):
    rows = files[1]()
    assert list(rows) == list(three[0].images)
    for image, expected in three[1].items():
        assert rows[image].dtype == np.float64
        np.testing.assert_array_equal(
            rows[image], np.array(expected).reshape(-1, 5)
        )


def test_what_other_detectors_write(files):
    folder, read = files
    (folder / 'a--A/A.txt').write_bytes(
        b'A\r\n 4 \r\n'
        b'12 10 20 20 1\r\n'
        b'\t-1.5e1  10. .5 +20 -7.25\r\n'
        b'\r\n'
        b'1 2 3 4 0.1 \r\n'
        b'1 2 0 -4 12.1  \r\n\r\n'
    )
    (folder / 'b--B/C.txt').write_bytes(b'C\n0\n\n \r\n')
    (folder / 'a--A/notes.md').write_text('not a prediction')
    (folder / 'pictures').mkdir()
    (folder / 'pictures/a.png').write_bytes(b'')
    np.testing.assert_array_equal(
        read()['a--A/A'],
        [
            [12, 10, 20, 20, 1],
            [-15, 10, 0.5, 20, -7.25],
            [1, 2, 3, 4, 0.1],
            [1, 2, 0, -4, 12.1],
        ],
    )
    assert read()['b--B/C'].shape == (0, 5)


def test_written_files_read_as_the_same_numbers(three, tmp_path):
    gt, _ = three
    rng = np.random.default_rng(0)
    rows = {
        image: rng.normal(0, 10.0 ** rng.integers(-9, 9, (n, 5)))
        for image, n in zip(gt.images, (0, 1, 500))
    }
    write_predictions(tmp_path / 'new/folder', rows)
    again = read_predictions(tmp_path / 'new/folder', gt.images)
    for image in rows:
        # The best first.
        order = np.argsort(-rows[image][:, 4])
        np.testing.assert_array_equal(again[image], rows[image][order])
    lines = (tmp_path / 'new/folder/b--B/B.txt').read_text().split('\n')
    assert lines[:2] == ['b--B/B.jpg', '1'] and lines[3:] == ['']
    assert (tmp_path / 'new/folder/a--A/A.txt').read_text() == (
        'a--A/A.jpg\n0\n'
    )


@pytest.mark.parametrize('image', ('../escaped', '{}/abs/x', 'a/../../x'))
def test_predictions_stay_in_their_folder(tmp_path, image):
    image = image.format(tmp_path)
    rows = np.zeros((1, 5))
    with pytest.raises(ValueError, match='outside') as error:
        write_predictions(tmp_path / 'out', {'a/b': rows, image: rows})
    assert repr(image) in str(error.value)
    assert not any(tmp_path.rglob('*.txt'))


@pytest.mark.parametrize('what', ('event', 'a/b.txt'))
def test_predictions_follow_no_link_out_of_their_folder(tmp_path, what):
    (tmp_path / 'out/a').mkdir(parents=True)
    (tmp_path / 'elsewhere').mkdir()
    target = tmp_path / 'elsewhere' / ('x.txt' if what == 'a/b.txt' else '')
    (tmp_path / 'out' / what).symlink_to(target)
    rows = {'a/b': np.zeros((0, 5)), 'event/b': np.zeros((0, 5))}
    with pytest.raises(ValueError, match='elsewhere.*, outside '):
        write_predictions(tmp_path / 'out', rows)
    assert not any(target.parent.glob('elsewhere/*'))
    # The folder itself may be one.
    (tmp_path / 'link').symlink_to(tmp_path / 'elsewhere')
    write_predictions(tmp_path / 'link', rows)
    assert (tmp_path / 'elsewhere/a/b.txt').read_text() == 'a/b.jpg\n0\n'


GOOD = '12 10 20 20 0.7'


@pytest.mark.parametrize(
    'lines, message',
    (
        ([], ': ends after 0 lines, expected a line with the picture'),
        (['A'], ': ends after 1 lines'),
        (['A', 'two', GOOD], ", line 2: got 'two', expected the number"),
        ([GOOD, GOOD], f", line 2: got '{GOOD}', expected the number"),
        (['A', '1.0', GOOD], ", line 2: got '1.0'"),
        (['A', '2', GOOD], ', line 2: says 2 detections, expected 1,'),
        (['A', '-1'], ', line 2: says -1 detections, expected 0,'),
        (['A', '1' * 99], f', line 2: says {"1" * 80} detections, exp'),
        (['A', '0', GOOD], ', line 2: says 0 detections, expected 1,'),
        (['A', '3', GOOD, '', '1 2 3 4'], ", line 5: got '1 2 3 4', expected"),
        (['A', '1', '1 2 3 4'], ", line 3: got '1 2 3 4'"),
        (['A', '1', '1 2 3 4 5 6'], ", line 3: got '1 2 3 4 5 6'"),
        (['A', '2', '1 2 3 4', '1 2 3 4 5 6'], ", line 3: got '1 2 3 4'"),
        (['A', '2', GOOD, '1 2 3 4 nan'], ", line 4: got '1 2 3 4 nan'"),
        (['A', '2', GOOD, '1 inf 3 4 5'], ", line 4: got '1 inf 3 4 5'"),
        (['A', '1', '1 2 3 4 -1e999'], ", line 3: got '1 2 3 4 -1e999'"),
        (['A', '1', '1,2,3,4,5'], ", line 3: got '1,2,3,4,5', expected 5 f"),
        (['A', '1', '1 2 3 4 0_5'], ", line 3: got '1 2 3 4 0_5'"),
        (['A', '1', '1 2 3 4 0.5 # a'], ', line 3'),
        (['A', '1', '# 1 2 3 4 5'], ', line 3'),
        (['A', '1', 'é 2 3 4 5'], ', line 3'),
    ),
)
def test_malformed_file(files, lines, message):
    folder, read = files
    file = folder / 'a--A' / 'A.txt'
    file.write_text('\n'.join(lines))
    with pytest.raises(ValueError) as error:
        read()
    assert str(error.value).startswith(f'{file}{message}')


def test_missing_files(files):
    folder, read = files
    (folder / 'a--A/A.txt').unlink()
    (folder / 'b--B/C.txt').unlink()
    with pytest.raises(FileNotFoundError, match='2 of 3') as error:
        read()
    assert str(error.value).startswith(str(folder / 'a--A/A.txt'))
    rows = read(missing_as_empty=True)
    assert [rows[image].shape for image in rows] == [(0, 5)] * 3


def test_missing_event_folder(files):
    folder, read = files
    (folder / 'a--A').rename(folder.parent / 'elsewhere')
    with pytest.raises(FileNotFoundError, match='a--A/A.txt: not there'):
        read()


def test_missing_folder(files):
    folder, read = files
    folder.rename(folder.parent / 'elsewhere')
    for missing_as_empty in (False, True):
        with pytest.raises(FileNotFoundError, match='folder of the pred'):
            read(missing_as_empty=missing_as_empty)


@pytest.mark.parametrize('name', ('a--A/B.txt', 'c--C/A.txt', 'A.txt'))
@pytest.mark.parametrize('missing_as_empty', (False, True))
def test_file_of_an_unknown_picture(files, name, missing_as_empty):
    folder, read = files
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text('A\n0\n')
    with pytest.raises(ValueError, match='has no picture') as error:
        read(missing_as_empty=missing_as_empty)
    assert str(error.value).startswith(f'{folder / name}: ')


# Ground truth files


def test_mini_wider_is_read(tmp_path):
    faces = [
        Face(3, 4, 20, h, *[0] * 3, invalid, 0, 0)
        for h, invalid in ((50, 0), (50, 1), (25, 0), (11, 0), (8, 0))
    ]
    crowd = [faces[0]] * 300
    events = {'0--A': {'x': faces, 'y': []}, '1--B': {'z': crowd}}
    write_wider_mats(tmp_path, events)
    gt = load_wider_face_gt(tmp_path)
    assert gt.images == ('0--A/x', '0--A/y', '1--B/z')
    assert gt.starts.tolist() == [0, 5, 6, 306]
    assert gt.boxes.dtype == np.float64
    assert gt.boxes[:6, 3].tolist() == [50, 50, 25, 11, 8, 0]
    kept = {s: np.flatnonzero(k[:6]).tolist() for s, k in gt.kept.items()}
    assert kept == dict(easy=[0], medium=[0, 2], hard=[0, 2, 3])
    assert gt.kept['easy'][6:].all()


@pytest.mark.parametrize('name', ('face', *SETTINGS))
def test_missing_ground_truth(three, tmp_path, name):
    file = tmp_path / 'gt' / f'wider_{name}_val.mat'
    file.unlink()
    with pytest.raises(FileNotFoundError) as error:
        load_wider_face_gt(tmp_path / 'gt')
    assert str(error.value).startswith(f'{file}: not there')


@pytest.mark.parametrize('name', ('face', *SETTINGS))
def test_damaged_ground_truth(three, tmp_path, name):
    file = tmp_path / 'gt' / f'wider_{name}_val.mat'
    whole = file.read_bytes()
    for part in (b'', b'hello', whole[: len(whole) // 2]):
        file.write_bytes(part)
        with pytest.raises(ValueError) as error:
            load_wider_face_gt(tmp_path / 'gt')
        assert str(error.value).startswith(f'{file}: ')


def test_a_byte_that_crashes_scipy(three, tmp_path):
    """A cell array that says it is one of numbers."""
    file = tmp_path / 'gt' / 'wider_face_val.mat'
    events = np.empty((1, 1), object)
    events[0, 0] = np.array([[3]], np.uint8)
    savemat(file, dict(event_list=events))
    content = bytearray(file.read_bytes())
    flags = content.index(b'\x06\0\0\0\x08\0\0\0\x01') + 8
    content[flags] = 9
    file.write_bytes(content)
    with pytest.raises(ValueError) as error:
        load_wider_face_gt(tmp_path / 'gt')
    assert str(error.value) == f'{file}: reading it ends in SIGSEGV'


def test_ground_truth_that_swells(three, tmp_path):
    file = tmp_path / 'gt' / 'wider_face_val.mat'
    # Much more than a long test run leaves free for a child to use.
    bomb = np.zeros((2**28,), np.uint8)
    savemat(file, dict(event_list=bomb), do_compression=True)
    assert file.stat().st_size < 2**19
    with pytest.raises(ValueError) as error:
        load_wider_face_gt(tmp_path / 'gt', max_memory=2**24)
    assert str(error.value) == f'{file}: reading it takes more than 16 MB'


def test_ground_truth_of_text(three, tmp_path):
    file = tmp_path / 'gt' / 'wider_hard_val.mat'
    cell = np.empty((1, 1), object)
    cell[0, 0] = 'text'
    lists = np.empty((1, 1), object)
    lists[0, 0] = cell
    savemat(file, dict(event_list=lists, file_list=lists, gt_list=lists))
    with pytest.raises(ValueError) as error:
        load_wider_face_gt(tmp_path / 'gt')
    assert str(error.value).endswith('has dtype <U4, expected numbers')


def test_ground_truth_of_something_else(three, tmp_path, write):
    gt = tmp_path / 'gt'
    good = (gt / 'wider_hard_val.mat').read_bytes()
    boxes = (gt / 'wider_face_val.mat').read_bytes()
    # Without gt_list.
    (gt / 'wider_hard_val.mat').write_bytes(boxes)
    with pytest.raises(ValueError, match='wider_hard_val.mat: .*gt_list'):
        load_wider_face_gt(gt)
    # Of other pictures.
    write.gt(tmp_path / 'other', {'e/i': ([(0, 0, 9, 9)], {})})
    other = tmp_path / 'other' / 'wider_hard_val.mat'
    (gt / 'wider_hard_val.mat').write_bytes(other.read_bytes())
    with pytest.raises(ValueError, match='pictures are not those of'):
        load_wider_face_gt(gt)
    (gt / 'wider_hard_val.mat').write_bytes(good)
    load_wider_face_gt(gt)


@pytest.mark.parametrize(
    'kept, message',
    (
        ([2], 'gt_list of e/i has 2 to 2, expected indices of its 1 faces'),
        ([0], 'gt_list of e/i has 0 to 0'),
        ([1, 1], 'gt_list of e/i has an index more than once'),
    ),
)
def test_wrong_indices(tmp_path, write, kept, message):
    write.gt(tmp_path, {'e/i': ([(0, 0, 9, 9)], {'medium': kept})})
    with pytest.raises(ValueError, match=f'wider_medium_val.mat: {message}'):
        load_wider_face_gt(tmp_path)


def test_reading_and_evaluating_need_numpy_alone(without_hosts):
    code = """
import numpy
before = set(sys.modules)
from polynl_mm.faces import ap, files, landmarks
roots = {name.partition('.')[0] for name in set(sys.modules) - before}
print(roots - sys.stdlib_module_names - {'numpy'})
"""
    assert without_hosts(code) == "{'polynl_mm'}\n"
