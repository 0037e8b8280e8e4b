"""Mini Cityscapes, looked at through its files and by independent means."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from mini_data import cityscapes
from scipy.ndimage import distance_transform_cdt

pytest.importorskip('cityscapesscripts')

ROOT = Path(__file__).parents[2]
TOOL = ROOT / 'tools' / 'make_mini_data.py'
CONFIG = ROOT / 'configs/mini/polynl_r18-d4_mini-cityscapes.py'
SIZES = dict(train=40, val=8)
ARGS = ['--seed', '3', '--train', '40', '--val', '8']
# Label -> (id, train id) and, of what the data set has, no more.
IDS = {
    'ego vehicle': (1, 255),
    'road': (7, 0),
    'sidewalk': (8, 1),
    'parking': (9, 255),
    'building': (11, 2),
    'wall': (12, 3),
    'fence': (13, 4),
    'traffic light': (19, 6),
    'traffic sign': (20, 7),
    'vegetation': (21, 8),
    'terrain': (22, 9),
    'sky': (23, 10),
    'motorcycle': (32, 17),
}
LIGHT, SIGN = 6, 7
# By train ids: what a traffic light makes of a texture, and what a sign.
TWINS = {0: 1, 2: 3, 8: 9}


@pytest.fixture(scope='module')
def tool():
    return SimpleNamespace(**runpy.run_path(str(TOOL)))


@pytest.fixture(scope='module')
def city(tool, tmp_path_factory):
    out = tmp_path_factory.mktemp('made') / 'city'
    tool.main(['cityscapes', '--out', str(out), *ARGS])
    return out


def contents(folder):
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob('*'))
        if file.is_file()
    }


def read(file):
    return cv2.imread(str(file), cv2.IMREAD_UNCHANGED)


def stems(root, split):
    """Folder and name of the pictures, without what follows the frame."""
    files = sorted((root / 'leftImg8bit' / split).glob('*/*.png'))
    return [f'{f.parent.name}/{f.name.rsplit("_", 1)[0]}' for f in files]


def load(root, split, stem):
    """Picture, train ids."""
    gt = root / 'gtFine' / split / f'{stem}_gtFine_labelTrainIds.png'
    image = root / 'leftImg8bit' / split / f'{stem}_leftImg8bit.png'
    return read(image), read(gt)


def pairs(root, split):
    """Both frames of every sequence: picture, train ids, twice."""
    names = stems(root, split)
    for first, second in zip(names[::2], names[1::2]):
        assert first[:-1] == second[:-1]
        assert (first[-1], second[-1]) == ('0', '1')
        yield (*load(root, split, first), *load(root, split, second))


def test_same_seed_same_bytes_in_another_process(city, tmp_path):
    args = [sys.executable, str(TOOL), 'cityscapes', '--out', 'again', *ARGS]
    done = subprocess.run(args, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / 'again') == contents(city)


def test_other_seed_other_streets_and_more_pictures_change_none(
    city, tmp_path
):
    cityscapes.cityscapes(tmp_path / 'few', 3, dict(train=3, val=2))
    few = contents(tmp_path / 'few')
    assert len(stems(tmp_path / 'few', 'train')) == 3
    assert all((city / name).read_bytes() == few[name] for name in few)
    cityscapes.cityscapes(tmp_path / 'other', 4, dict(train=3, val=2))
    other = contents(tmp_path / 'other')
    # The same names, as the release's, but nothing else.
    assert other.keys() == few.keys()
    assert all(other[name] != few[name] for name in few)


def test_files_are_those_of_the_official_release(city):
    expected = {'mini_data.json'}
    towns = {}
    for split, size in SIZES.items():
        names = stems(city, split)
        assert len(names) == size
        for name in names:
            assert re.fullmatch(r'([a-z]+)/\1_\d{6}_\d{6}', name)
            towns.setdefault(split, set()).add(name.split('/')[0])
            expected.add(f'leftImg8bit/{split}/{name}_leftImg8bit.png')
            expected |= {
                f'gtFine/{split}/{name}_gtFine_{end}'
                for end in (
                    'polygons.json',
                    'labelIds.png',
                    'labelTrainIds.png',
                    'instanceIds.png',
                    'color.png',
                )
            }
    assert set(contents(city)) == expected
    assert len(towns['train']) > 1 and len(towns['val']) > 1
    assert not towns['train'] & towns['val']


@pytest.mark.parametrize('split', SIZES)
def test_label_maps_are_the_polygons(city, split):
    """Drawn by another rasteriser, they are the same."""
    for name in stems(city, split):
        prefix = f'{city}/gtFine/{split}/{name}_gtFine_'
        annotation = json.loads(Path(f'{prefix}polygons.json').read_text())
        assert annotation.keys() == {'imgHeight', 'imgWidth', 'objects'}
        shape = annotation['imgHeight'], annotation['imgWidth']
        assert shape == (128, 256)
        drawn, instances = np.zeros((2, *shape), np.int32)
        count = {'motorcycle': 0}
        for each in annotation['objects']:
            assert each.keys() == {'label', 'polygon'}
            points = np.array(each['polygon'], np.int32)
            value, label = IDS[each['label']][0], each['label']
            cv2.fillPoly(drawn, [points], value)
            if label in count:
                value = value * 1000 + count[label]
                count[label] += 1
            cv2.fillPoly(instances, [points], value)
        square = np.ones((5, 5))
        flat = drawn.astype(np.uint8)
        same = cv2.dilate(flat, square) == cv2.erode(flat, square)
        assert same.mean() > 0.7
        ids = read(f'{prefix}labelIds.png')
        # But along edges, and at the tip of a spike.
        assert (ids != drawn)[same].mean() < 1e-3
        train_ids = read(f'{prefix}labelTrainIds.png')
        expected = np.full(256, 250)
        for value, train_id in IDS.values():
            expected[value] = train_id
        np.testing.assert_array_equal(train_ids, expected[ids])
        found = read(f'{prefix}instanceIds.png')
        assert found.dtype == np.uint16
        # Where motorcycles touch, both are one label.
        assert (found != instances)[same].mean() < 0.01
        numbers = set(found[ids == 32].tolist())
        assert numbers <= {32000 + k for k in range(count['motorcycle'])}
        np.testing.assert_array_equal(found[ids != 32], ids[ids != 32])
        assert read(f'{prefix}color.png').shape == (*shape, 4)


def test_a_picture_ends_where_its_label_does(tmp_path):
    """Streets of plain colours: from every colour follows the label."""
    levels = [(b, g, r) for b in (0, 1, 2) for g in (0, 1, 2) for r in (0, 1)]
    names = list(cityscapes.CITY_MATERIALS)
    photos = {
        name: [np.full((90, 80, 3), np.uint8((0, 80, 240))[[*code]])]
        for name, code in zip(names, levels[1:])
    }
    convert = cityscapes.city_converters()
    for seed in range(6):
        twins = cityscapes.city_scene(np.random.default_rng(seed), photos)
        for kind, (image, objects) in enumerate(twins):
            text = json.dumps(
                dict(imgHeight=128, imgWidth=256, objects=objects)
            )
            (tmp_path / 'x_polygons.json').write_text(text)
            convert(tmp_path / 'x')
            ids = read(tmp_path / 'x_labelIds.png')
            # Light changes the levels, but never beyond these limits.
            code = np.digitize(image, (25, 128)) @ (100, 10, 1)
            for name, level in zip(names, levels[1:]):
                label = cityscapes.CITY_PAIRS.get(name, (name, name))[kind]
                here = code == np.dot(level, (100, 10, 1))
                np.testing.assert_array_equal(here, ids == IDS[label][0])


@pytest.mark.parametrize('split', SIZES)
def test_what_a_texture_is_follows_from_something_far_away(city, split):
    for light, at_light, sign, at_sign in pairs(city, split):
        cues = (at_light == LIGHT) | (at_sign == SIGN)
        assert not (at_light == SIGN).any() and not (at_sign == LIGHT).any()
        # Pictures differ in the object, and nowhere else.
        differ = (light != sign).any(2)
        assert not differ[~cues].any() and differ[cues].mean() > 0.95
        # It can be told: one is nearly black, the other red.
        assert np.median(light[at_light == LIGHT]) < 40
        assert np.median(sign[at_sign == SIGN, 2]) > 100
        # Labels are the same but for the object and the six classes.
        swapped = at_light.copy()
        for first, second in TWINS.items():
            assert not (at_light == second).any()
            assert not (at_sign == first).any()
            swapped[at_light == first] = second
        np.testing.assert_array_equal(swapped[~cues], at_sign[~cues])
        decided = np.isin(at_light, list(TWINS))
        assert decided.mean() > 0.1
        distance = distance_transform_cdt(~cues, 'chessboard')
        assert distance[decided].min() > 48


def test_classes_and_places_are_balanced(city):
    counts, centres = np.zeros(256, int), []
    seen = np.zeros(128)
    for _, at_light, _, at_sign in pairs(city, 'train'):
        counts += np.bincount(at_light.ravel(), minlength=256)
        counts += np.bincount(at_sign.ravel(), minlength=256)
        rows, columns = np.nonzero(at_light == LIGHT)
        seen[rows] += 1
        centres.append(columns.mean() / 256)
    assert set(np.nonzero(counts)[0]) == {t for _, t in IDS.values()}
    share = counts / counts[:255].sum()
    for first, second in TWINS.items():
        assert counts[first] == counts[second] and share[first] > 0.02
    assert 0.5 < share[LIGHT] / share[SIGN] < 2
    assert np.std(centres) > 0.2 and abs(np.mean(centres) - 0.5) < 0.15
    assert seen[:-4].all()


def test_mmseg_reads_it(city):
    pytest.importorskip('mmseg')
    from mmseg.datasets import CityscapesDataset
    from mmseg.utils import register_all_modules

    register_all_modules()
    for split, size in SIZES.items():
        dataset = CityscapesDataset(
            data_root=str(city),
            data_prefix=dict(
                img_path=f'leftImg8bit/{split}', seg_map_path=f'gtFine/{split}'
            ),
            pipeline=[
                dict(type='LoadImageFromFile'),
                dict(type='LoadAnnotations'),
                dict(type='PackSegInputs'),
            ],
        )
        assert len(dataset) == size
        for name, data in zip(stems(city, split), dataset):
            sample = data['data_samples']
            assert data['inputs'].shape == (3, 128, 256)
            assert sample.img_path.endswith(f'{name}_leftImg8bit.png')
            labels = load(city, split, name)[1]
            found = sample.gt_sem_seg.data.numpy()
            np.testing.assert_array_equal(found, labels[None])


def network(head):
    """The shipped mini model with another head, no symmetry left in it."""
    pytest.importorskip('mmseg')
    from mmengine.config import Config
    from mmengine.registry import MODELS, DefaultScope

    cfg = Config.fromfile(CONFIG).model
    cfg.decode_head.type = head
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = MODELS.build(cfg).eval()
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.kaiming_normal_(parameter)
    return model


def test_receptive_field_is_what_the_config_says():
    model = network('FCNHead').double()
    # Positive weights and no ReLU that is off: nothing cancels.
    for parameter in model.parameters():
        parameter.data.abs_()
    x = torch.rand(1, 3, 160, 160, dtype=torch.double, requires_grad=True)
    y = model(x)
    assert y.shape[-2:] == (40, 40)
    y[0, :, 20, 20].sum().backward()
    rows, columns = torch.nonzero(x.grad.abs().sum((0, 1)), as_tuple=True)
    extent = [int(v.max() - v.min()) + 1 for v in (rows, columns)]
    assert extent == [71, 71]
    assert '71 x 71' in CONFIG.read_text()


def test_a_local_network_gives_one_answer_for_both_frames(city):
    local, wide = network('FCNHead'), network('GCHead')
    for light, at_light, sign, _ in pairs(city, 'val'):
        x = torch.from_numpy(np.stack([light, sign])).permute(0, 3, 1, 2)
        x = x.float() / 255
        decided = torch.from_numpy(np.isin(at_light, list(TWINS)))
        with torch.no_grad():
            for model, same in ((local, True), (wide, False)):
                y = torch.nn.functional.interpolate(
                    model(x), x.shape[2:], mode='bilinear'
                )[..., decided]
                assert torch.equal(y[0], y[1]) == same


def test_one_answer_for_both_frames_is_at_most_a_third(city):
    """The bound in the docstring, on random answers and on constant ones."""
    rng = np.random.default_rng(0)
    truth = [(a, b) for _, a, _, b in pairs(city, 'val')]
    for share in (0, 0.2, 0.5, 0.9, 1):
        for first, second in TWINS.items():
            hits, sums = np.zeros(2), np.zeros(2)
            for at_light, at_sign in truth:
                answer = np.where(
                    rng.random(at_light.shape) < share, first, second
                )
                answer[at_light != first] = 255
                for labels in (at_light, at_sign):
                    for k, name in enumerate((first, second)):
                        hits[k] += ((answer == name) & (labels == name)).sum()
                        sums[k] += ((answer == name) | (labels == name)).sum()
            iou = (hits / sums).mean()
            assert iou <= 1 / 3 + 1e-12
            assert share != 0.5 or iou > 0.33


def test_a_missing_package_is_named(tool, tmp_path, monkeypatch):
    monkeypatch.setattr(cityscapes, 'find_spec', lambda name: None)
    with pytest.raises(SystemExit, match='cityscapesscripts is not installed'):
        tool.main(['cityscapes', '--out', str(tmp_path / 'out'), *ARGS])
    assert not list(tmp_path.iterdir())
