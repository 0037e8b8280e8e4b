"""The demo on our own configs; test_train_test.py has it on the hosts'."""

import runpy
from pathlib import Path

import cv2
import numpy as np
import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('mmdet')
pytest.importorskip('mmseg')

from mmengine.config import Config  # noqa: E402
from mmengine.registry import MODELS, DefaultScope  # noqa: E402
from mmseg.apis import MMSegInferencer  # noqa: E402

from polynl_mm.engine import cli  # noqa: E402
from polynl_mm.engine.hosts import plain_loader  # noqa: E402
from polynl_mm.faces.visualizer import FaceVisualizer  # noqa: E402

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / 'configs/mini/retinaface_r50-polynl_mini-wider.py'


def test_faces_with_landmarks(tmp_path, monkeypatch, capfd):
    """A network that has learnt nothing finds much, with landmarks."""
    with DefaultScope.overwrite_default_scope('mmdet'):
        torch.manual_seed(0)
        model = MODELS.build(Config.fromfile(CONFIG).model)
    state = dict(state_dict=model.state_dict(), meta=dict())
    state['meta']['dataset_meta'] = dict(classes=('face',))
    torch.save(state, tmp_path / 'some.pth')
    image = np.random.default_rng(0).integers(0, 255, (96, 128, 3), np.uint8)
    cv2.imwrite(str(tmp_path / 'some.png'), image)
    args = ['some.png', CONFIG, 'some.pth', '--out', 'out', '--score-thr', '0']
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('sys.argv', ['demo.py', *map(str, args)])
    monkeypatch.setattr('sys.path', __import__('sys').path[:])
    cli.run(runpy.run_path(str(ROOT / 'tools/demo.py'))['main'])
    assert '1 pictures in out/vis' in capfd.readouterr().out
    drawn = cv2.imread('out/vis/some.png')
    assert drawn.shape == image.shape and (drawn != image).any()
    # Tiles find other faces.
    monkeypatch.setattr(
        'sys.argv',
        ['demo.py', *map(str, args), '--tile', '64', '--overlap', '32'],
    )
    cli.run(runpy.run_path(str(ROOT / 'tools/demo.py'))['main'])
    in_tiles = cv2.imread('out/vis/some.png')
    assert in_tiles.shape == image.shape and (in_tiles != drawn).any()
    monkeypatch.setattr('sys.argv', ['demo.py', *map(str, args)])
    # Without landmarks the picture is another.
    monkeypatch.setattr(FaceVisualizer, 'draw_points', lambda *_, **__: None)
    cli.run(runpy.run_path(str(ROOT / 'tools/demo.py'))['main'])
    assert (cv2.imread('out/vis/some.png') != drawn).any()


def test_a_folder_of_which_some_are_no_pictures(
    place, tmp_path, monkeypatch, capfd
):
    """Each is named and counted, the rest is drawn, and memory is bounded."""
    cfg = Config.fromfile(place / 'seg.py')
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = MODELS.build(cfg.model)
    meta = dict(classes=('a', 'b'), palette=[[0] * 3, [255] * 3])
    torch.save(
        dict(state_dict=model.state_dict(), meta=dict(dataset_meta=meta)),
        tmp_path / 'some.pth',
    )
    folder = tmp_path / 'pictures'
    folder.mkdir()
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    cv2.imwrite(str(folder / 'a.png'), image)
    cv2.imwrite(str(folder / 'z.jpg'), image)
    png, jpg = ((folder / name).read_bytes() for name in ('a.png', 'z.jpg'))
    bad = {
        'broken.png': png[: len(png) // 2] + bytes(len(png) // 2),
        'cut.jpg': jpg[: len(jpg) // 2],
        'float.tiff': cv2.imencode('.tiff', image / 255)[1],
        'none': png,
        'zero.png': b'',
        'large.png': cv2.imencode('.png', np.zeros((100, 100), np.uint8))[1],
    }
    for name, content in bad.items():
        (folder / name).write_bytes(bytes(content))
    (folder / 'notes.txt').write_text('no picture, and no suffix of one')

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('sys.path', __import__('sys').path[:])
    args = [place / 'seg.py', 'some.pth', '--out', 'out', '--max-pixels', 9999]
    monkeypatch.setattr('sys.argv', ['demo.py', 'pictures', *map(str, args)])
    seen = []
    call = MMSegInferencer.__call__

    def spy(self, inputs, *args, **kwargs):
        seen.append((inputs, sorted(map(str, Path('out').rglob('*.*')))))
        return call(self, inputs, *args, **kwargs)

    monkeypatch.setattr(MMSegInferencer, '__call__', spy)
    with pytest.raises(SystemExit) as caught:
        cli.run(runpy.run_path(str(ROOT / 'tools/demo.py'))['main'])
    assert caught.value.code == 1
    out, err = capfd.readouterr()
    assert '2 pictures in out/vis' in out
    lines = [line for line in err.splitlines() if line.startswith('demo.py:')]
    assert [line.split(': ')[2].split('/')[-1] for line in lines[:-1]] == [
        *sorted(bad)
    ]
    assert lines[-1] == 'demo.py: 6 of 8 pictures could not be drawn'
    # The results of one are on the disk before the next one is begun.
    assert seen == [
        ('pictures/a.png', []),
        ('pictures/z.jpg', ['out/pred/00000000_pred.png', 'out/vis/a.png']),
    ]
    assert sorted(p.name for p in Path('out').rglob('*.*')) == [
        '00000000_pred.png',
        '00000006_pred.png',
        'a.png',
        'z.jpg',
    ]
    # One that is asked for alone is refused before anything is made, and so
    # is a device.
    refused = {(f'pictures/{name}',): f'pictures/{name}: ' for name in bad}
    refused['pictures', '--device', 'gpu'] = '--device gpu is none: expected'
    for first, line in refused.items():
        monkeypatch.setattr('sys.argv', ['demo.py', *first, *map(str, args)])
        with pytest.raises(SystemExit) as caught:
            cli.run(runpy.run_path(str(ROOT / 'tools/demo.py'))['main'])
        assert caught.value.code == 2
        assert f'error: {line}' in capfd.readouterr().err


def test_the_loader_of_the_inferencers():
    """Given what theirs takes; the limit is that of --max-pixels."""
    ours = dict(type='polynl_mm.LoadImageFromFile', max_pixels=9)
    other = dict(type='Resize', max_pixels=9)
    steps = [dict(ours, to_float32=True), other]
    cfg = Config(dict(test_dataloader=dict(dataset=dict(pipeline=steps))))
    plain_loader(cfg)
    assert cfg.test_dataloader.dataset.pipeline == [
        dict(type='LoadImageFromFile', to_float32=True),
        other,
    ]
