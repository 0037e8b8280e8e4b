import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from mini_data import (
    build,
    coco,
    image_folders,
    lfw,
    pictures,
    sources,
    wider_face,
    wider_face_files,
)
from scipy.io import loadmat

TOOL = Path(__file__).parents[2] / 'tools' / 'make_mini_data.py'
SIZES = dict(train=20, val=18)
ARGS = ['--seed', '3', '--train', '20', '--val', '18']
SETTINGS = ('easy', 'medium', 'hard')
ATTRIBUTES = (
    'blur',
    'expression',
    'illumination',
    'invalid',
    'occlusion',
    'pose',
)


@pytest.fixture(scope='session')
def tool():
    return SimpleNamespace(**runpy.run_path(str(TOOL)))


@pytest.fixture(scope='session')
def wider(tool, tmp_path_factory):
    out = tmp_path_factory.mktemp('made') / 'wider'
    tool.main(['wider_face', '--out', str(out), *ARGS])
    return out


def contents(folder):
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob('*'))
        if file.is_file()
    }


def parse(root, split):
    """Read the text annotation as strictly as it is written."""
    file = root / 'wider_face_split' / f'wider_face_{split}_bbx_gt.txt'
    lines = file.read_text().split('\n')
    assert lines.pop() == ''
    images = {}
    while lines:
        name, count = lines.pop(0), int(lines.pop(0))
        rows = [lines.pop(0) for _ in range(max(count, 1))]
        assert all(row.endswith(' ') for row in rows)
        rows = [[int(word) for word in row[:-1].split(' ')] for row in rows]
        assert all(len(row) == 10 for row in rows)
        if count == 0:
            assert rows == [[0] * 10]
        images[name] = rows[:count]
    return images


def run(*args):
    return subprocess.run(
        [sys.executable, str(TOOL), *map(str, args)],
        capture_output=True,
        text=True,
    )


def test_same_seed_same_bytes_in_another_process(wider, tmp_path):
    done = run('wider_face', '--out', tmp_path / 'again', *ARGS)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / 'again') == contents(wider)


def test_other_seed_other_pictures_and_more_pictures_change_none(
    wider, tmp_path
):
    names = ['WIDER_train/images/' + name for name in parse(wider, 'train')]
    wider_face.wider_face(tmp_path / 'more', 3, dict(train=24, val=2))
    for name in names:
        same = (tmp_path / 'more' / name).read_bytes()
        assert same == (wider / name).read_bytes()
    wider_face.wider_face(tmp_path / 'other', 4, SIZES)
    # Not only the patches: photographs and all.
    assert set(parse(tmp_path / 'other', 'train')) != set(
        parse(wider, 'train')
    )
    other = contents(tmp_path / 'other')
    assert all(other.get(n) != (wider / n).read_bytes() for n in names)


def test_files_are_those_of_the_official_release(wider):
    files = set(contents(wider))
    expected = {
        'mini_data.json',
        'wider_face_split/wider_face_train_bbx_gt.txt',
        'wider_face_split/wider_face_val_bbx_gt.txt',
        'ground_truth/wider_face_val.mat',
        *(f'ground_truth/wider_{s}_val.mat' for s in SETTINGS),
        'retinaface_gt_v1.1/train/label.txt',
        'retinaface_gt_v1.1/val/label.txt',
    }
    for split in SIZES:
        expected |= {
            f'WIDER_{split}/images/{name}' for name in parse(wider, split)
        }
    assert files == expected


@pytest.mark.parametrize('split', SIZES)
def test_text_annotation(wider, split):
    images = parse(wider, split)
    assert len(images) == SIZES[split]
    faceless = [name for name, faces in images.items() if not faces]
    assert 1 <= len(faceless) < 4
    for name, faces in images.items():
        event, file = name.split('/')
        number, title = event.split('--')
        assert file.startswith(f'{number}_{title}_') and ' ' not in file
        picture = cv2.imread(str(wider / f'WIDER_{split}/images/{name}'))
        height, width = picture.shape[:2]
        for x, y, w, h, *attributes in faces:
            assert 0 <= x < x + w <= width and 0 <= y < y + h <= height
            limits = (2, 1, 1, 1, 2, 1)
            assert all(0 <= a <= m for a, m in zip(attributes, limits))


def test_mat_files_have_the_official_form_and_say_what_the_text_says(wider):
    images = parse(wider, 'val')
    for setting in ('face', *SETTINGS):
        mat = loadmat(wider / 'ground_truth' / f'wider_{setting}_val.mat')
        mat = {k: v for k, v in mat.items() if not k.startswith('__')}
        lists = ['event_list', 'file_list', 'face_bbx_list']
        lists += [f'{name}_label_list' for name in ATTRIBUTES]
        assert set(mat) == {*lists, *(['gt_list'] * (setting != 'face'))}
        events = len({name.split('/')[0] for name in images})
        assert all(
            v.shape == (events, 1) and v.dtype == object for v in mat.values()
        )
        seen = []
        for i in range(events):
            event = mat['event_list'][i][0]
            assert event.shape == (1,) and event.dtype.kind == 'U'
            files = mat['file_list'][i][0]
            assert files.dtype == object
            for j in range(len(files)):
                cell = {
                    key: mat[key][i][0][j][0]
                    for key in mat
                    if key != 'event_list'
                }
                stem = cell['file_list']
                assert stem.shape == (1,) and stem.dtype.kind == 'U'
                name = f'{event[0]}/{stem[0]}.jpg'
                seen.append(name)
                faces = np.array(images[name] or [[0] * 10])
                boxes = cell['face_bbx_list']
                assert boxes.dtype == np.int32
                np.testing.assert_array_equal(boxes, faces[:, :4])
                for k, attribute in enumerate(ATTRIBUTES, 4):
                    column = cell[f'{attribute}_label_list']
                    assert column.dtype == np.uint8
                    np.testing.assert_array_equal(column, faces[:, k : k + 1])
        assert seen == list(images)


def test_settings_are_nested_by_height_and_count_from_1(wider):
    images = parse(wider, 'val')
    kept, sizes = {}, {}
    for setting in SETTINGS:
        mat = loadmat(wider / 'ground_truth' / f'wider_{setting}_val.mat')
        kept[setting] = set()
        for i, event in enumerate(mat['event_list']):
            for j, stem in enumerate(mat['file_list'][i][0]):
                name = f'{event[0][0]}/{stem[0][0]}.jpg'
                indices = mat['gt_list'][i][0][j][0]
                assert indices.dtype == np.uint8
                assert indices.shape[1:] == (1,) or indices.size == 0
                for index in indices.ravel().tolist():
                    assert 1 <= index <= len(images[name])
                    kept[setting].add((name, index))
        faces = {
            (name, i): face
            for name, rows in images.items()
            for i, face in enumerate(rows, 1)
        }
        assert not any(faces[key][7] for key in kept[setting])
        sizes[setting] = [faces[key][3] for key in kept[setting]]
    assert kept['easy'] < kept['medium'] < kept['hard']
    assert min(sizes['easy']) >= 36 > min(sizes['medium']) >= 22
    assert 22 > min(sizes['hard']) >= 10
    # What is in no setting is flagged invalid or too small.
    left = set(faces) - kept['hard']
    assert left and all(faces[k][7] or faces[k][3] < 10 for k in left)


def test_an_invalid_face_is_in_no_setting():
    faces = [
        wider_face.Face(0, 0, 40, height, 0, 0, 0, invalid, 0, 0)
        for height, invalid in ((50, 0), (50, 1), (35, 0), (36, 0))
    ]
    assert wider_face_files.kept_of(faces, 36).tolist() == [[1], [4]]
    assert wider_face_files.kept_of(faces[1:2], 36).shape == (0, 1)


def test_uint16_indices_where_a_picture_needs_them():
    face = wider_face.Face(0, 0, 50, 50, 0, 0, 0, 0, 0, 0)
    assert wider_face_files.kept_of([face] * 255, 36).dtype == np.uint8
    kept = wider_face_files.kept_of([face] * 256, 36)
    assert kept.dtype == np.uint16 and kept[-1, 0] == 256


def test_train_and_val_share_no_patch_and_no_pixel():
    for seed in range(3):
        train = lfw.load_patches('train', seed)
        val = lfw.load_patches('val', seed)
        assert len(train.faces) == 75 and len(val.faces) == 25
        for a, b in ((train.faces, val.faces), (train.others, val.others)):
            assert len(a) and len(b)
            assert not {p.tobytes() for p in a} & {p.tobytes() for p in b}
        ids = {*train.face_ids.tolist(), *val.face_ids.tolist()}
        assert ids == set(range(100))
    for name, photo in sources.PHOTOS.items():
        file = sources.package_file(photo.package, photo.path)
        whole = cv2.imread(str(file))
        top = round(photo.window[0] * len(whole))
        left, right = (sources.load_photo(name, s) for s in SIZES)
        joined = np.hstack([left, right])
        np.testing.assert_array_equal(joined, whole[top:])


def test_faces_come_from_the_patches_of_the_split(monkeypatch, tmp_path):
    real = lfw.load_patches
    seen = {}

    def load(split, seed):
        patches = real(split, seed)
        seen[split] = []
        return lfw.Patches(
            Recorder(patches.faces, seen[split]),
            patches.face_ids,
            patches.others,
        )

    class Recorder:
        def __init__(self, faces, log):
            self.faces, self.log = faces, log

        def __len__(self):
            return len(self.faces)

        def __getitem__(self, k):
            self.log.append(self.faces[k].tobytes())
            return self.faces[k]

    monkeypatch.setattr(wider_face, 'load_patches', load)
    wider_face.wider_face(tmp_path, 5, dict(train=6, val=6))
    assert seen['train'] and seen['val']
    assert not set(seen['train']) & set(seen['val'])


@pytest.mark.parametrize('roll', (0.0, 0.3, -0.9))
@pytest.mark.parametrize('size', (14.0, 33.3, 70.0))
def test_box_is_around_what_is_seen(roll, size):
    canvas = np.zeros((120, 130, 3), np.float32)
    white = np.ones((25, 25, 3), np.float32)
    place = pictures.stamp(canvas, white, (64.2, 58.7), size, roll)
    ys, xs = np.nonzero(canvas[..., 0] > 0.35)
    seen = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
    np.testing.assert_allclose(place.box, seen, atol=1.1)
    assert place.area == place.opaque.sum()


def test_a_turned_patch_is_turned_clockwise_like_its_oval():
    canvas = np.zeros((100, 100, 3), np.float32)
    patch = np.zeros((25, 25, 3), np.float32)
    patch[:12] = 1  # bright above
    pictures.stamp(canvas, patch, (50, 50), 60, np.pi / 2)
    bright = np.nonzero(canvas[..., 0] > 0.5)[1].mean()
    assert bright > 55  # above turned to the right


def labels(*placed):
    """Label white stamps at (x, y, size) that all are faces."""
    canvas = np.zeros((100, 100, 3), np.float32)
    white = np.ones((25, 25, 3), np.float32)
    stamps = [pictures.stamp(canvas, white, p[:2], p[2], 0.0) for p in placed]
    look = [0, 0, 0, 0, None, 0]
    return wider_face.wider_faces(stamps, [look] * len(stamps), 100, 100)


def test_occlusion_is_what_later_stamps_cover():
    apart = labels((20, 50, 30), (70, 50, 30))
    assert [f.occlusion for f in apart] == [0, 0]
    partly = labels((40, 50, 40), (62, 50, 30))
    assert [f.occlusion for f in partly] == [1, 0]
    # The other way round the large one covers a good part of the small one.
    heavy = labels((62, 50, 30), (44, 50, 40))
    assert [(f.occlusion, f.invalid) for f in heavy] == [(2, 0), (0, 0)]
    hidden = labels((50, 50, 30), (51, 50, 34))
    assert (hidden[0].occlusion, hidden[0].invalid) == (2, 1)


def test_a_face_over_the_edge_is_cut_and_counts_as_occluded():
    (face,) = labels((2, 50, 40))
    assert (face.x, face.w) == (0, round(2 + 40 * 0.95 * 0.42))
    assert face.occlusion == 2
    (face,) = labels((-5, 50, 40))
    assert face.invalid == 1


def test_tiny_faces_are_invalid():
    assert labels((50, 50, 8))[0].invalid == 1
    assert labels((50, 50, 12))[0].invalid == 0


def test_up_to_date_is_left_alone(wider, tool, capsys):
    before = {f: f.stat().st_mtime_ns for f in wider.rglob('*')}
    tool.main(['wider_face', '--out', str(wider), *ARGS])
    assert 'up to date' in capsys.readouterr().out
    assert {f: f.stat().st_mtime_ns for f in wider.rglob('*')} == before


@pytest.mark.parametrize(
    'change', (['--seed', '4'], ['--train', '21'], ['--val', '3'])
)
def test_other_settings_are_refused(wider, tool, change):
    before = contents(wider)
    with pytest.raises(SystemExit, match='made with other settings') as error:
        tool.main(['wider_face', '--out', str(wider), *ARGS, *change])
    assert '\n' not in str(error.value)
    assert contents(wider) == before


def test_an_older_revision_is_refused(wider, tool, monkeypatch):
    monkeypatch.setattr(build, 'REVISION', build.REVISION + 1)
    with pytest.raises(SystemExit, match='made with other settings'):
        tool.main(['wider_face', '--out', str(wider), *ARGS])


def test_a_folder_of_somebody_else_is_refused(tool, tmp_path):
    (tmp_path / 'thesis.txt').write_text('years of work')
    with pytest.raises(SystemExit, match='not made by this tool'):
        tool.main(['wider_face', '--out', str(tmp_path), *ARGS])
    assert contents(tmp_path) == {'thesis.txt': b'years of work'}
    file = tmp_path / 'thesis.txt'
    with pytest.raises(SystemExit, match='not made by this tool'):
        tool.main(['wider_face', '--out', str(file), *ARGS])
    assert file.read_text() == 'years of work'


def test_a_link_is_followed(wider, tool, tmp_path):
    """To a folder that is there or not; one to itself is said in a line."""
    (tmp_path / 'there').mkdir()
    for name in ('there', 'new/later'):
        (tmp_path / 'link').symlink_to(tmp_path / name)
        tool.main(['wider_face', '--out', str(tmp_path / 'link'), *ARGS])
        assert contents(tmp_path / name) == contents(wider)
        assert (tmp_path / 'link').is_symlink()
        (tmp_path / 'link').unlink()
    (tmp_path / 'loop').symlink_to(tmp_path / 'loop')
    for out in ('loop', 'there/mini_data.json/x'):
        with pytest.raises(SystemExit, match='make_mini_data.py: ') as error:
            tool.main(['wider_face', '--out', str(tmp_path / out), *ARGS])
        assert '\n' not in str(error.value)


def test_an_empty_folder_is_taken(wider, tool, tmp_path):
    out = tmp_path / 'empty'
    out.mkdir()
    tool.main(['wider_face', '--out', str(out), *ARGS])
    assert contents(out) == contents(wider)
    other = tmp_path / 'other'
    other.mkdir()
    # Not as private as a temporary folder.
    assert out.stat().st_mode == other.stat().st_mode
    assert sorted(os.listdir(tmp_path)) == ['empty', 'other']


def test_a_failure_half_way_leaves_nothing(tool, tmp_path, monkeypatch):
    def make(out, seed, sizes):
        (out / 'half').write_text('')
        raise KeyboardInterrupt

    monkeypatch.setitem(
        build.DATASETS, 'wider_face', build.DataSet(make, 20, 18)
    )
    with pytest.raises(KeyboardInterrupt):
        tool.main(['wider_face', '--out', str(tmp_path / 'out'), *ARGS])
    assert os.listdir(tmp_path) == []


def test_a_killed_run_is_not_taken_for_finished(tmp_path):
    out = tmp_path / 'out'
    args = ['wider_face', '--out', out, '--seed', 0, '--train', 5000]
    killed = subprocess.Popen([sys.executable, TOOL, *map(str, args)])
    deadline = time.time() + 30
    while not list(tmp_path.rglob('*.jpg')) and time.time() < deadline:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert list(tmp_path.rglob('*.jpg')) and not out.exists()
    done = run('wider_face', '--out', out, *ARGS)
    assert done.returncode == 0 and 'made' in done.stdout
    assert json.loads((out / 'mini_data.json').read_text())['seed'] == 3


@pytest.mark.parametrize(
    'args, message',
    (
        (['wider_face', '--out', 'x'], '--seed'),
        (['wider_face', '--seed', '0'], '--out'),
        (['wider_face', '--out', 'x', '--seed', '-1'], '-1 is below 0'),
        (['wider_face', '--out', 'x', '--seed', '0', '--val', '1'], 'below 2'),
        (['imagenet', '--out', 'x', '--seed', '0'], 'imagenet'),
        ([], 'dataset'),
    ),
)
def test_wrong_arguments(tool, capsys, args, message):
    with pytest.raises(SystemExit) as error:
        tool.main(args)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_a_missing_package_is_named(tool, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, 'find_spec', lambda name: None)
    with pytest.raises(SystemExit, match='scikit-image is not installed'):
        tool.main(['wider_face', '--out', str(tmp_path / 'out'), *ARGS])
    assert os.listdir(tmp_path) == []


LABELS = 'retinaface_gt_v1.1'


def parse_labels(root, split):
    """Read RetinaFace's label file as strictly as it is written."""
    images = {}
    for line in (root / LABELS / split / 'label.txt').read_text().split('\n'):
        if line.startswith('# '):
            rows = images[line[2:]] = []
        elif line:
            rows.append([float(word) for word in line.split(' ')])
    return images


@pytest.mark.parametrize('split, count', (('train', 20), ('val', 4)))
def test_label_file_has_the_faces_of_the_annotation(wider, split, count):
    images, labels = parse(wider, split), parse_labels(wider, split)
    assert list(images) == list(labels)
    known = 0
    for name, faces in images.items():
        assert [row[:4] for row in labels[name]] == [f[:4] for f in faces]
        for face, row in zip(faces, labels[name]):
            assert len(row) == count
            if split == 'val':
                continue
            points = np.array(row[4:19]).reshape(5, 3)
            assert 0 <= row[19] <= 1
            if (points == -1).all():
                continue
            known += 1
            assert not face[7] and (points[:, 2] >= 0).all()
            x, y, w, h = face[:4]
            left_eye, right_eye, nose, left, right = points[:, :2]
            assert left_eye[0] < right_eye[0] and left[0] < right[0]
            # A point that is to be seen is in its box, or nearly.
            seen = points[points[:, 2] == 0, :2]
            assert (seen > (x - 0.1 * w - 1, y - 1)).all()
            assert (seen < (x + 1.1 * w + 1, y + h + 1)).all()
    faces = sum(map(len, images.values()))
    assert split == 'val' or 0.2 * faces < known < 0.8 * faces


def test_the_data_set_takes_the_label_files(wider):
    pytest.importorskip('mmdet')
    from polynl_mm.faces.dataset import WiderFaceDataset

    dataset = WiderFaceDataset(
        data_root=str(wider),
        ann_file='wider_face_split/wider_face_train_bbx_gt.txt',
        landmark_file=f'{LABELS}/train/label.txt',
        data_prefix=dict(img='WIDER_train/images'),
    )
    faces = [f for data in dataset for f in data['instances']]
    rows = sum(parse_labels(wider, 'train').values(), [])
    known = sum(row[6] >= 0 for row in rows)
    assert sum(f['keypoints'][2] > 0 for f in faces) == known > 10
    with pytest.raises(ValueError, match='none of its faces has landmarks'):
        WiderFaceDataset(
            data_root=str(wider),
            ann_file='wider_face_split/wider_face_val_bbx_gt.txt',
            landmark_file=f'{LABELS}/val/label.txt',
            data_prefix=dict(img='WIDER_val/images'),
        )


def test_landmarks_of_the_patches():
    known = [i for i in range(100) if lfw.patch_landmarks(i) is not None]
    assert len(known) >= 30 and set(known) == set(lfw.LANDMARK_CORRECTIONS)
    assert not lfw.COVERED & set(known)
    points = np.array([lfw.patch_landmarks(i) for i in known])
    assert points.shape == (len(known), 5, 2)
    mean = points.mean(0)
    np.testing.assert_allclose(mean, lfw.LANDMARK_TEMPLATE, atol=0.06)
    assert abs(points - mean).max() < 5
    # An eye is darker than what is under it, below it and half a mouth off.
    file = sources.package_file('skimage', 'data/lfw_subset.npy')
    patches = np.load(file)[:100]
    darker = 0
    for i, (left, right, *_) in zip(known, points):
        smooth = cv2.blur(patches[i].astype(np.float32), (3, 3))
        for x, y in (left, right):
            darker += smooth[int(y), int(x)] < smooth[int(y) + 4, int(x)]
    assert darker > 0.9 * 2 * len(known)


@pytest.mark.parametrize('roll', (0.0, 0.4, -0.9))
@pytest.mark.parametrize('size', (45.0, 70.3))
def test_points_go_where_the_pixels_go(roll, size):
    """Points of a patch are drawn into it and found on the canvas."""
    for point in ((6.5, 8.5), (16.5, 9.5), (11.5, 14.5), (8.5, 18.5)):
        patch = np.zeros((25, 25, 3), np.float32)
        patch[int(point[1]), int(point[0])] = 1
        canvas = np.zeros((130, 140, 3), np.float32)
        place = pictures.stamp(canvas, patch, (68.3, 61.8), size, roll)
        grey = canvas[..., 0].clip(0)
        ys, xs = np.indices(grey.shape) + 0.5
        centre = ((xs * grey).sum(), (ys * grey).sum()) / grey.sum()
        found = place.to_canvas(np.array([point]) / 25)[0]
        np.testing.assert_allclose(found, centre, atol=0.15)


class Dice:
    """A generator that mirrors or does not, and takes patch k."""

    def __init__(self, k, mirror):
        self.rng = np.random.default_rng(0)
        self.k, self.first = k, 0.0 if mirror else 0.9

    def integers(self, *args):
        return self.k

    def random(self):
        value, self.first = self.first, 0.9
        return value

    def __getattr__(self, name):
        return getattr(self.rng, name)


@pytest.mark.parametrize('mirror', (False, True))
def test_a_mirrored_patch_has_mirrored_points(mirror):
    ids = np.array([4, 56])
    grey = np.zeros((2, 25, 25), np.float32)
    points = lfw.patch_landmarks(56)
    for x, y in points:
        grey[1, int(y), int(x)] = 1
    patches = lfw.Patches(grey, ids, grey)
    canvas = np.full((50, 50, 3), 0.5, np.float32)

    def dress(k):
        dice = Dice(k, mirror)
        dice.choice = lambda options: 0.0
        return wider_face.wider_face_pixels(
            dice, patches, canvas, (25, 25), 25
        )

    pixels, *_, found = dress(1)
    marked = pixels.sum(2) > pixels.max() / 2
    assert marked.sum() == 5
    for x, y in found * 25:
        assert marked[int(y), int(x)]
    expected = points
    if mirror:
        expected = [(25 - points[k, 0], points[k, 1]) for k in (1, 0, 2, 4, 3)]
    np.testing.assert_allclose(found * 25, expected)
    assert dress(0)[-1] is None


def test_covered_and_cut_off_landmarks_are_occluded():
    canvas = np.zeros((100, 100, 3), np.float32)
    white = np.ones((25, 25, 3), np.float32)
    points = np.array(lfw.LANDMARK_TEMPLATE) / 25
    under = pictures.stamp(canvas, white, (40, 50), 40, 0.0)
    over = pictures.stamp(canvas, white, (48, 44), 24, 0.0)
    look = [0, 0, 0, 0, points, 0]
    first, second = wider_face.wider_faces([under, over], [look] * 2, 100, 100)
    assert [flag for *_, flag in second.landmarks] == [0] * 5
    assert [flag for *_, flag in first.landmarks] == [0, 1, 0, 0, 0]
    cut = pictures.stamp(canvas, white, (11, 50), 60, 0.0)
    (face,) = wider_face.wider_faces([cut], [look], 100, 100)
    assert [flag for *_, flag in face.landmarks] == [1, 0, 0, 1, 0]
    gone = pictures.stamp(canvas, white, (-5, 50), 40, 0.0)
    (face,) = wider_face.wider_faces([gone], [look], 100, 100)
    assert face.invalid and face.landmarks is None


COCO_SIZES = dict(train=24, val=22)
COCO_ARGS = ['--seed', '3', '--train', '24', '--val', '22']


@pytest.fixture(scope='session')
def drawn(tool, tmp_path_factory):
    """Mini COCO, and the layers of each picture in the order of drawing."""
    out = tmp_path_factory.mktemp('made') / 'coco'
    scenes = []
    background, draw = coco.background, coco.draw_layer

    def begin(*args):
        scenes.append([])
        return background(*args)

    def record(rng, canvas, layer):
        scenes[-1].append(layer)
        draw(rng, canvas, layer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coco, 'background', begin)
        patch.setattr(coco, 'draw_layer', record)
        tool.main(['coco', '--out', str(out), *COCO_ARGS])
    count = COCO_SIZES['train']
    return out, dict(train=scenes[:count], val=scenes[count:])


@pytest.fixture(scope='session')
def mini_coco(drawn):
    return drawn[0]


def coco_json(root, split):
    file = root / 'annotations' / f'instances_{split}2017.json'
    return json.loads(file.read_text())


def read_coco(root, split):
    coco = pytest.importorskip('pycocotools.coco')
    return coco.COCO(root / 'annotations' / f'instances_{split}2017.json')


@pytest.mark.parametrize('split', COCO_SIZES)
def test_coco_json_is_like_the_official_one(mini_coco, split):
    content = coco_json(mini_coco, split)
    assert set(content) == {
        *('info', 'licenses', 'images', 'annotations', 'categories')
    }
    images, annotations = content['images'], content['annotations']
    for items in (images, annotations, content['categories']):
        assert [i['id'] for i in items] == [*range(1, len(items) + 1)]
    assert [c['name'] for c in content['categories']] == [*'0123456789']
    licenses = {entry['id'] for entry in content['licenses']}
    shapes = {}
    assert len(images) == COCO_SIZES[split]
    for image in images:
        file = mini_coco / f'{split}2017' / image['file_name']
        assert file.name == f'{image["id"]:012}.jpg'
        shapes[image['id']] = image['height'], image['width']
        assert cv2.imread(str(file)).shape[:2] == shapes[image['id']]
        assert image['license'] in licenses
    assert len(set(shapes.values())) > 1
    for annotation in annotations:
        counts = annotation['segmentation']['counts']
        assert type(counts) is (list if annotation['iscrowd'] else str)
        size = annotation['segmentation']['size']
        assert tuple(size) == shapes[annotation['image_id']]
    crowds = [a for a in annotations if a['iscrowd']]
    assert 1 <= len(crowds) <= 3
    assert all(len(a['digits']) > 5 for a in crowds)
    empty = set(shapes) - {a['image_id'] for a in annotations}
    assert empty == {2, 22}
    files = {n for n in contents(mini_coco) if n.startswith(f'{split}2017')}
    assert files == {f'{split}2017/{i["file_name"]}' for i in images}


@pytest.mark.parametrize('split', COCO_SIZES)
def test_coco_masks_are_what_was_drawn_last(drawn, split):
    """Each pixel belongs to the last digit drawn over it, and no other."""
    root, scenes = drawn
    coco = read_coco(root, split)
    covered = 0
    for number, layers in enumerate(scenes[split], 1):
        image = coco.imgs[number]
        owner = np.full((image['height'], image['width']), -1)
        for k, layer in enumerate(layers):
            covered += (owner[layer.alpha >= 0.5] >= 0).any()
            owner[layer.alpha >= 0.5] = k
        crowd = [k for k, layer in enumerate(layers) if layer.crowd]
        alone = [[k] for k, layer in enumerate(layers) if not layer.crowd]
        groups = [crowd] * bool(crowd) + alone
        annotations = coco.loadAnns(coco.getAnnIds(number))
        assert len(annotations) == len(groups)
        for annotation, group in zip(annotations, groups):
            assert annotation['digits'] == [layers[k].digit for k in group]
            mask = coco.annToMask(annotation).astype(bool)
            expected = np.isin(owner, group)
            np.testing.assert_array_equal(mask, expected)
            ys, xs = np.nonzero(expected)
            x, y = xs.min(), ys.min()
            box = [x, y, xs.max() + 1 - x, ys.max() + 1 - y]
            assert annotation['bbox'] == box
            assert annotation['area'] == expected.sum()
    assert covered > 10, 'digits must overlap for this to tell anything'


def test_coco_labels_are_those_of_scikit_learn(drawn):
    load = pytest.importorskip('sklearn.datasets').load_digits
    target = load().target
    for split in COCO_SIZES:
        for annotation in coco_json(drawn[0], split)['annotations']:
            labels = target[annotation['digits']]
            assert (labels == annotation['category_id'] - 1).all()


def test_a_digit_is_upright_and_opaque_where_it_covers_half():
    load = pytest.importorskip('sklearn.datasets').load_digits
    digits = coco.load_digits('train', 1)
    dice = Dice(0, False)
    dice.normal = lambda *args: 0.0
    layer = coco.digit_layer(dice, digits, 5, (50, 40), 40, (80, 100))
    # Centres of the digit's pixels fall on those of the canvas.
    ink = load().images[digits.ids[5]] / 16
    np.testing.assert_allclose(layer.ink[22:62:5, 32:72:5], ink, atol=1e-6)
    assert layer.label == load().target[digits.ids[5]]
    assert layer.digit == digits.ids[5]
    layer.ink[:] = 1
    canvas = np.ones((80, 100, 3), np.float32)
    coco.draw_layer(np.random.default_rng(0), canvas, layer)
    change = (1 - canvas).sum(2)
    share = change / change.max()
    clear = abs(share - 0.5) > 1e-3
    assert (layer.opaque == (share >= 0.5))[clear].all()
    assert layer.opaque.sum() == layer.area > 200
    assert 0 < ((share > 0) & (share < 1)).sum() < layer.area, 'soft edge'


def test_a_hidden_digit_is_left_out_and_covers_nothing():
    def layer(digit, *columns):
        alpha = np.zeros((10, 10), np.float32)
        alpha[:, slice(*columns)] = 1
        return coco.Layer(digit, 0, alpha, alpha)

    pairs = coco.seen_layers([layer(0, 0, 6), layer(1, 4, 8), layer(2, 5, 9)])
    assert [pair[0].digit for pair in pairs] == [0, 2]
    # Column 4 would be hidden by the one that is not drawn.
    assert pairs[0][1].sum(0).tolist() == [10] * 5 + [0] * 5
    assert coco.seen_layers([]) == []
    two = coco.seen_layers([layer(0, 0, 6), layer(1, 4, 8)])
    assert [int(seen.sum()) for _, seen in two] == [40, 40]


def test_coco_sizes_and_contrast_vary(drawn):
    root, _ = drawn
    annotations = coco_json(root, 'train')['annotations']
    heights = [a['bbox'][3] for a in annotations if not a['iscrowd']]
    assert min(heights) < 24 and max(heights) > 48
    assert len({a['category_id'] for a in annotations}) == 10


def test_coco_digits_of_train_are_not_in_val(mini_coco):
    used = {
        split: {
            d
            for a in coco_json(mini_coco, split)['annotations']
            for d in a['digits']
        }
        for split in COCO_SIZES
    }
    assert used['train'] and used['val']
    assert not used['train'] & used['val']
    for seed in range(3):
        train, val = (coco.load_digits(s, seed) for s in COCO_SIZES)
        assert {*train.ids, *val.ids} == set(range(1797))
        assert not {*train.ids} & {*val.ids}
        # Nor is one in the file twice.
        assert not {d.tobytes() for d in train.ink} & {
            d.tobytes() for d in val.ink
        }
        assert {*train.labels} == {*val.labels} == set(range(10))


def test_coco_same_seed_same_bytes(mini_coco, tmp_path):
    done = run('coco', '--out', tmp_path / 'again', *COCO_ARGS)
    assert done.returncode == 0, done.stderr
    made = contents(mini_coco)
    assert contents(tmp_path / 'again') == made
    coco.coco(tmp_path / 'more', 3, dict(train=26, val=2))
    coco.coco(tmp_path / 'other', 4, dict(train=24, val=2))
    more, other = contents(tmp_path / 'more'), contents(tmp_path / 'other')
    names = [name for name in made if name.startswith('train2017/')]
    assert all(more[name] == made[name] for name in names)
    assert not any(other[name] == made[name] for name in names)


def test_coco_refuses_what_is_something_else(wider, mini_coco, tool, tmp_path):
    before = contents(wider)
    with pytest.raises(SystemExit, match="there: .*'wider_face'.* asked"):
        tool.main(['coco', '--out', str(wider), *ARGS])
    assert contents(wider) == before
    with pytest.raises(SystemExit, match='made with other settings'):
        tool.main(['coco', '--out', str(mini_coco), *COCO_ARGS, '--val', '9'])
    (tmp_path / 'thesis.txt').write_text('years of work')
    with pytest.raises(SystemExit, match='not made by this tool'):
        tool.main(['coco', '--out', str(tmp_path), *COCO_ARGS])
    assert os.listdir(tmp_path) == ['thesis.txt']


def test_coco_names_what_is_missing(tool, tmp_path, monkeypatch):
    out = str(tmp_path / 'out')
    for module, message in (
        (coco, 'pycocotools is not installed'),
        (sources, 'scikit-learn is not installed; its .*digits.csv.gz'),
    ):
        monkeypatch.undo()
        monkeypatch.setattr(module, 'find_spec', lambda name: None)
        with pytest.raises(SystemExit, match=message):
            tool.main(['coco', '--out', out, *COCO_ARGS])
    np.savetxt(tmp_path / 'digits.csv', np.zeros((3, 65)), delimiter=',')
    monkeypatch.undo()
    monkeypatch.setattr(
        coco, 'package_file', lambda *args: tmp_path / 'digits.csv'
    )
    with pytest.raises(SystemExit, match=r'shape \(3, 65\), \(1797, 65\)'):
        tool.main(['coco', '--out', out, *COCO_ARGS])


MINI_COCO = 'configs/mini/mask-rcnn_r50-polynl_mini-coco.py'


def test_mmdet_reads_mini_coco_by_its_config(mini_coco):
    pytest.importorskip('mmdet')
    from mmdet.utils import register_all_modules
    from mmengine.config import Config
    from mmengine.registry import DATASETS

    register_all_modules(init_default_scope=False)
    cfg = Config.fromfile(TOOL.parents[1] / MINI_COCO)
    cfg.train_dataloader.dataset.data_root = str(mini_coco)
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    coco = read_coco(mini_coco, 'train')
    # Without the two that have no digit.
    assert len(dataset) == 22
    ignored = 0
    for data in dataset:
        sample = data['data_samples']
        ids = coco.getAnnIds(sample.img_id)
        for crowd, found in enumerate(
            (sample.gt_instances, sample.ignored_instances)
        ):
            expected = [a for a in coco.loadAnns(ids) if a['iscrowd'] == crowd]
            masks = [coco.annToMask(a) for a in expected]
            assert len(found) == len(masks)
            if masks:
                np.testing.assert_array_equal(found.masks.masks, masks)
            labels = [a['category_id'] - 1 for a in expected]
            assert found.labels.tolist() == labels
            ignored += crowd * len(found)
    assert ignored


def test_mini_coco_trains_in_two_processes(
    mini_coco, start, finish, free_port, tmp_path
):
    """One epoch and its evaluation, masks included, of the shipped config."""
    pytest.importorskip('mmdet')
    from mmengine.config import Config

    config = TOOL.parents[1] / MINI_COCO
    names = Config.fromfile(config)
    ann_file = f'{mini_coco}/{names.val_dataloader.dataset.ann_file}'
    done = finish(
        start(
            *('dist_train.sh', config, 2, '--work-dir', tmp_path),
            '--cfg-options',
            *(
                f'{split}_dataloader.dataset.data_root={mini_coco}'
                for split in ('train', 'val', 'test')
            ),
            *('train_dataloader.dataset.indices=4', 'train_cfg.max_epochs=1'),
            *('val_dataloader.dataset.indices=4', 'train_cfg.val_interval=1'),
            f'val_evaluator.ann_file={ann_file}',
            PORT=free_port(),
        )
    )
    assert done.code == 0, done.err
    everything = done.out + done.err
    assert 'process group of 2 over gloo' in everything
    for metric in ('bbox_mAP', 'segm_mAP'):
        assert f'coco/{metric}: ' in everything
    assert (tmp_path / 'epoch_1.pth').is_file()


# ------------------------------------------------------------ image folders


@pytest.mark.parametrize(
    'name, classes, shape',
    [
        ('digits', [str(k) for k in range(10)], (8, 8)),
        ('lfw_patches', ['face', 'other'], (25, 25)),
    ],
)
def test_a_folder_for_each_class(tool, tmp_path, name, classes, shape):
    args = ['--seed', '3', '--train', '21', '--val', '30']
    tool.main([name, '--out', str(tmp_path / 'a'), *args])
    tool.main([name, '--out', str(tmp_path / 'b'), *args])
    assert contents(tmp_path / 'a') == contents(tmp_path / 'b')
    stems = {}
    for split, size in (('train', 21), ('val', 30)):
        folders = sorted((tmp_path / 'a' / split).iterdir())
        assert [folder.name for folder in folders] == classes
        counts = [len([*folder.iterdir()]) for folder in folders]
        assert sum(counts) == size and max(counts) - min(counts) <= 1
        files = [*(tmp_path / 'a' / split).glob('*/*.png')]
        for file in files:
            picture = cv2.imread(str(file), cv2.IMREAD_UNCHANGED)
            assert picture.shape == shape and picture.max() > 50
        stems[split] = {file.stem for file in files}
        assert len(stems[split]) == size
    assert not stems['train'] & stems['val']


def test_digits_are_those_of_scikit_learn(tmp_path):
    data = pytest.importorskip('sklearn.datasets').load_digits()
    image_folders.digits(tmp_path, 0, dict(train=870, val=870))
    files = [*tmp_path.glob('*/*/*.png')]
    assert len(files) == 1740
    for file in files[::50]:
        index = int(file.stem)
        assert data.target[index] == int(file.parent.name)
        picture = cv2.imread(str(file), cv2.IMREAD_UNCHANGED)
        np.testing.assert_allclose(
            picture, data.images[index] * 255 / 16, atol=0.5
        )


def test_no_more_digits_than_there_are(tmp_path):
    done = run('digits', '--out', tmp_path / 'x', '--seed', 0, '--val', 880)
    assert done.returncode == 1
    assert done.stderr.strip() == (
        'make_mini_data.py: --val 880: expected 10 to 870, for 10 classes'
    )
    assert not (tmp_path / 'x').exists()
