"""The command line: one JSON line, one line of an error, drawn curves."""

import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import cv2
import pytest

from polynl_mm.faces.ap import evaluate
from polynl_mm.faces.files import load_wider_face_gt

TOOL = Path(__file__).parents[2] / 'tools' / 'eval_wider_face.py'
PICTURES = {
    '0--A/x': (
        [(0, 0, 20, 20), (60, 0, 20, 30), (99, 99, 5, 5)],
        {'medium': [1], 'hard': [1, 2]},
        [
            (60, 1, 20, 30, -2.5),
            (1, 0, 20, 20, 7),
            (200, 0, 9, 9, 3.1),
            (99, 99, 5, 5, 5),
        ],
    ),
    '1--B/y': ([(5, 5, 9, 9)], {'hard': [1]}, []),
}


@pytest.fixture
def here(tmp_path, write):
    write.gt(tmp_path / 'gt', PICTURES)
    write.rows(tmp_path / 'pred', {i: p[2] for i, p in PICTURES.items()})
    return tmp_path


@pytest.fixture
def run(here):
    def run(*args, stderr=subprocess.PIPE):
        return subprocess.run(
            [sys.executable, str(TOOL), 'pred', 'gt', *args],
            cwd=here,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            # Without a display.
            env={k: v for k, v in os.environ.items() if k != 'DISPLAY'},
        )

    return run


def test_last_line_is_the_json_object_with_all_digits(run, here):
    done = run()
    assert done.returncode == 0, done.stderr
    ap = evaluate(
        load_wider_face_gt(here / 'gt'),
        {image: picture[2] for image, picture in PICTURES.items()},
    )
    # Medium: found at once. Hard: the second find after one false.
    assert ap['medium'] == 1 and ap['hard'] == pytest.approx(5 / 9)
    assert json.loads(done.stdout.splitlines()[-1]) == {
        'easy': None,
        'medium': ap['medium'],
        'hard': ap['hard'],
    }
    # Quiet off a terminal, but for what was evaluated.
    assert done.stderr.splitlines() == [
        '2 pictures, 4 detections in 1 of them'
    ]


def test_needs_neither_torch_nor_a_host(run, here, without_hosts):
    assert without_hosts(TOOL, 'pred', 'gt') == run().stdout


def test_json_file_and_curves(run, here):
    done = run('--json', 'new/ap.json', '--plot', 'new/curves.png')
    assert done.returncode == 0, done.stderr
    assert (here / 'new/ap.json').read_text() == done.stdout
    picture = cv2.imread(str(here / 'new/curves.png'))
    assert min(picture.shape[:2]) > 400
    # The second and the third colour of matplotlib, blue first: nothing is
    # kept in easy.
    colours = {tuple(c) for c in picture.reshape(-1, 3).tolist()}
    assert {(0x0E, 0x7F, 0xFF), (0x2C, 0xA0, 0x2C)} <= colours


def test_figures_come_before_the_picture(run):
    done = run('--plot', 'curves.strange', '--json', 'ap.json')
    assert done.returncode == 2
    assert json.loads(done.stdout.splitlines()[-1])['medium'] == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith('eval_wider_face.py: error: ')
    assert 'strange' in last


def test_progress_on_a_terminal(run):
    ours, theirs = pty.openpty()
    size = struct.pack('4H', 24, 80, 0, 0)
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, size)
    done = run(stderr=theirs)
    os.close(theirs)
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert done.returncode == 0
    assert 'reading' in shown and 'matching' in shown
    assert json.loads(done.stdout)['medium'] == 1


def refused(done):
    """Give the only line of a run that was refused."""
    assert (done.returncode, done.stdout) == (2, '')
    (line,) = done.stderr.splitlines()
    prefix = 'eval_wider_face.py: error: '
    assert line.startswith(prefix)
    return line[len(prefix) :]


@pytest.mark.parametrize(
    'layout, change',
    (
        ('x1 y1 x2 y2', lambda x, y, w, h: (x, y, x + w, y + h)),
        (
            'the centre, width, height',
            lambda x, y, w, h: (x + w / 2, y + h / 2, w, h),
        ),
    ),
)
def test_boxes_of_another_layout_are_refused(run, here, write, layout, change):
    image = '0--A/x'
    *box, score = PICTURES[image][2][0]
    rows = [(*change(*box), score)]
    write.rows(here / 'pred', {image: rows})
    done = run('--json', 'ap.json')
    (_, line) = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, '')
    assert line == (
        'eval_wider_face.py: error: pred: 0 of 4 faces are met by a '
        f'detection (IoU of at least 0.5), and as {layout} many more: '
        'expected left top width height'
    )
    assert not (here / 'ap.json').exists()


def test_fractions_of_the_picture_are_refused(run, here, write):
    write.rows(here / 'pred', {'0--A/x': [(0.1, 0.2, 0.5, 1, 0.9)]})
    assert refused(run()).startswith('pred: no left, top, width or height is')


def test_detections_that_meet_hardly_a_face_are_told(run, here, write):
    write.rows(here / 'pred', {'0--A/x': [(400, 0, 9, 9, 0.9)]})
    done = run()
    assert done.returncode == 0 and json.loads(done.stdout)['hard'] == 0
    assert done.stderr.splitlines()[1:] == [
        'eval_wider_face.py: warning: pred: 0 of 4 faces are met by a '
        'detection (IoU of at least 0.5)'
    ]


def test_broken_line(run, here):
    (here / 'pred/0--A/x.txt').write_text('x\n1\n1 2 3 4\n')
    line = refused(run('--json', 'ap.json'))
    assert line.startswith("pred/0--A/x.txt, line 3: got '1 2 3 4', expected")
    assert not (here / 'ap.json').exists()


def test_unknown_picture(run, here):
    (here / 'pred/0--A/z.txt').write_text('z\n0\n')
    assert refused(run()).startswith('pred/0--A/z.txt: the ground truth has')


def test_missing_file(run, here):
    (here / 'pred/1--B/y.txt').unlink()
    assert refused(run()).startswith('pred/1--B/y.txt: not there; missing')
    done = run('--missing-as-empty')
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)['hard'] == pytest.approx(5 / 9)


def test_wrong_folders(run, here):
    (here / 'gt').rename(here / 'elsewhere')
    assert refused(run()).startswith('gt/wider_face_val.mat: not there')
    (here / 'elsewhere').rename(here / 'gt')
    (here / 'pred').rename(here / 'elsewhere')
    assert refused(run()).startswith('pred: not there')
