"""The demo on our own configs; test_train_test.py has it on the hosts'."""

import runpy
from pathlib import Path

import cv2
import numpy as np
import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('mmdet')

from mmengine.config import Config  # noqa: E402
from mmengine.registry import MODELS, DefaultScope  # noqa: E402

from polynl_mm.engine import cli  # noqa: E402
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
