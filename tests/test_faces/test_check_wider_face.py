import importlib.util
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

TOOL = Path(__file__).parents[2] / 'tools' / 'check_wider_face.py'
FACE = '5 6 20 30 1 0 0 0 0 0 \n'
TRAIN = (
    f'0--A/0_A_1.jpg\n3\n{FACE}9 9 12 12 1 0 0 1 0 0 \n'
    f'3 3 0 5 0 0 0 0 0 0 \n'
    f'0--A/0_A_2.jpg\n0\n0 0 0 0 0 0 0 0 0 0 \n'
)
VAL = f'0--A/0_A_3.jpg\n1\n{FACE}'
POINTS = ' '.join(['8 9 0'] * 5)
LABELS = f'# 0--A/0_A_1.jpg\n5 6 20 30 {POINTS} 0.9\n# 0--A/0_A_2.jpg\n'


@pytest.fixture(scope='module')
def tool():
    spec = importlib.util.spec_from_file_location('check_wider_face', TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(file, text):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


@pytest.fixture
def root(tmp_path):
    """Give a whole release in small, with labels for train."""
    split = tmp_path / 'wider_face_split'
    write(split / 'wider_face_train_bbx_gt.txt', TRAIN)
    write(split / 'wider_face_val_bbx_gt.txt', VAL)
    write(split / 'wider_face_test_filelist.txt', '0--A/0_A_4.jpg\n')
    write(tmp_path / 'retinaface_gt_v1.1/train/label.txt', LABELS)
    for part, number in (('train', 1), ('train', 2), ('val', 3), ('test', 4)):
        file = picture(tmp_path, part, number)
        file.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(file), np.full((40, 40, 3), 9 * number, np.uint8))
    return tmp_path


def picture(root, part, number):
    return root / f'WIDER_{part}/images/0--A/0_A_{number}.jpg'


@pytest.fixture
def check(tool, root, capsys):
    def check(*args):
        code = tool.main([str(root), *args])
        lines = capsys.readouterr().out.splitlines()
        broken = [line for line in lines if line.startswith('broken: ')]
        assert code == bool(broken)
        assert lines[-1] == (
            f'{len(broken)} broken' if broken else 'nothing is broken'
        )
        return lines, broken

    return check


def rows(lines):
    return [line.split() for line in lines]


@pytest.mark.parametrize('args', ([], ['--decode']))
def test_counts_of_a_whole_release(check, args):
    lines, broken = check(*args)
    assert not broken
    assert rows(lines)[1:-1] == [
        ['train', '2', '3', '1', '1', '1']
        + ['(retinaface_gt_v1.1/train/label.txt)', '1'],
        ['val', '1', '1', '0', '0', '-', '0'],
        ['test', '1', '-', '-', '-', '-', '-'],
    ]


def test_needs_neither_torch_nor_a_host(check, root, without_hosts):
    lines, _ = check('--decode')
    printed = without_hosts(TOOL, str(root), '--decode')
    assert printed.splitlines() == lines


def test_missing_and_extra_pictures(check, root):
    picture(root, 'train', 1).rename(picture(root, 'train', 9))
    picture(root, 'test', 4).unlink()
    lines, broken = check()
    assert broken == [
        f'broken: {picture(root, "train", 1)}: not there',
        f'broken: {picture(root, "test", 4)}: not there',
    ]
    (note,) = [line for line in lines if line.startswith('note: ')]
    assert f'{picture(root, "train", 9)}: not listed in' in note


def test_an_extra_picture_breaks_nothing(check, root):
    picture(root, 'val', 9).write_bytes(b'x')
    (root / 'WIDER_val/images/.DS_Store').write_bytes(b'x')
    lines, broken = check()
    assert not broken
    assert sum('not listed' in line for line in lines) == 1


def test_all_broken_lines_of_all_files(check, root):
    split = root / 'wider_face_split'
    train = split / 'wider_face_train_bbx_gt.txt'
    val = split / 'wider_face_val_bbx_gt.txt'
    label = root / 'retinaface_gt_v1.1/train/label.txt'
    train.write_text(TRAIN.replace('9 9 12', '9 9 x') + 'a.jpg\n')
    val.write_text(VAL + FACE)
    (split / 'wider_face_test_filelist.txt').write_text('0--A/0_A_4.jpg\n4\n')
    label.write_text(LABELS + '1 2 3\n1 2 3 4\n# a/b.jpg\n')
    _, broken = check()
    starts = [
        f'{train}, line 4: got ',
        f'{train}, line 9: got ',
        f'{label}, line 4: got ',
        f'{label}, line 5: got a face of 0--A/0_A_2.jpg with the box [1.0, ',
        f"{label}, line 6: got the picture 'a/b.jpg', which is not in ",
        f'{val}, line 4: got ',
        f'{split / "wider_face_test_filelist.txt"}, line 2: got ',
    ]
    assert len(broken) == len(starts)
    for line, start in zip(broken, starts):
        assert line.startswith(f'broken: {start}'), line


def test_pictures_are_read_if_told(check, root):
    whole = picture(root, 'train', 1).read_bytes()
    picture(root, 'train', 1).write_bytes(whole[:-20])
    picture(root, 'train', 2).write_bytes(b'')
    picture(root, 'val', 3).write_text('no picture')
    assert not check()[1]
    _, broken = check('--decode')
    assert [line.split(': ')[1:3] for line in broken] == [
        [str(picture(root, 'train', 1)), broken[0].split(': ')[2]],
        [str(picture(root, 'train', 2)), 'empty, expected a picture'],
        [str(picture(root, 'val', 3)), 'not a readable picture'],
    ]
    assert 'truncated' in broken[0]


def annotate(root, *boxes):
    """Give the only picture of val faces, and the file that says so."""
    file = root / 'wider_face_split/wider_face_val_bbx_gt.txt'
    lines = [f'{box} 1 0 0 0 0 0 \n' for box in boxes]
    file.write_text(f'0--A/0_A_3.jpg\n{len(boxes)}\n{"".join(lines)}')
    return file


@pytest.mark.parametrize('box', ('45 6 9 9', '5 40 9 9', '-9 6 9 9'))
def test_boxes_outside_their_picture(check, root, box):
    """Of 40 x 40 pixels. A slip in a hundred is told, more break the file."""
    file = annotate(root, *['5 6 20 30'] * 99, box)
    place = f'first 0--A/0_A_3.jpg [{box.replace(" ", ", ")}] (x y w h)'
    assert not check()[1]
    lines, broken = check('--decode')
    said = f'{file}: 1 of 100 boxes are wholly outside their picture, {place}'
    assert not broken and f'note: {said}' in lines
    file = annotate(root, *['5 6 20 30'] * 98, box)
    assert check('--decode')[1] == [f'broken: {said.replace("100", "99")}']
    annotate(root, '-5 -6 20 30', '30 31 20 30', '5 6 20 0')
    assert not check('--decode')[1]


def test_boxes_by_their_corners(check, root):
    file = annotate(root, '5 6 20 30', '25 20 39 38', '30 31 40 40')
    assert not check()[1]
    (broken,) = check('--decode')[1]
    assert broken == (
        f'broken: {file}: as x1 y1 x2 y2, 3 of 3 boxes are inside their '
        'pictures, as x y w h 1: expected x y w h'
    )


def test_landmarks_far_from_their_face(check, root):
    label = root / 'retinaface_gt_v1.1/train/label.txt'
    label.write_text(LABELS.replace('8 9 0', '24 63 0', 1))
    assert not check()[1]
    label.write_text(LABELS.replace('8 9 0', '8 67 0', 1))
    (broken,) = check()[1]
    assert broken == (
        f'broken: {label}: 1 of 1 faces with landmarks have one far outside '
        'their box, first 0--A/0_A_1.jpg [5, 6, 20, 30] (x y w h)'
    )
    # What is absent is nowhere.
    label.write_text(LABELS.replace('8 9 0', '-1 -1 -1', 1))
    assert not check()[1]


def test_what_is_not_there(check, tool, root, tmp_path, capsys):
    for file in root.glob('WIDER_test/images/*/*'):
        file.unlink()
    (root / 'WIDER_test/images/0--A').rmdir()
    (root / 'WIDER_test/images').rmdir()
    # The list of it came with the others.
    assert [line.split(': ')[-1] for line in check()[1]] == ['not there']
    assert not check('--splits', 'train', 'val')[1]
    (root / 'wider_face_split/wider_face_test_filelist.txt').unlink()
    lines, broken = check()
    assert not broken and 'note: test: nothing of it is there' in str(lines)
    assert len(check('--splits', 'test')[1]) == 2
    assert tool.main([str(tmp_path / 'none')]) == 1
    assert 'nothing of WIDER Face is there' in capsys.readouterr().out


def test_mini_wider_is_whole(tmp_path):
    make = TOOL.with_name('make_mini_data.py')
    sizes = ['--seed', '0', '--train', '6', '--val', '4']
    out = tmp_path / 'mini'
    for args in (
        [make, 'wider_face', '--out', out, *sizes],
        [TOOL, out, '--decode'],
    ):
        done = subprocess.run(
            [sys.executable, *map(str, args)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert 'nothing is broken' in done.stdout
    assert 'retinaface_gt_v1.1/train/label.txt' in done.stdout
