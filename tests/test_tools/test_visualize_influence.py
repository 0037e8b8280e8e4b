"""Overlays of both hosts' models, and what is refused."""

import runpy
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('mmdet')
pytest.importorskip('mmseg')

from mmengine.config import Config  # noqa: E402
from mmengine.registry import MODELS, DefaultScope  # noqa: E402

from polynl_mm.engine import cli  # noqa: E402

TOOL = Path(__file__).parents[2] / 'tools/visualize_influence.py'
# The same place, another block.
NON_LOCAL = """
_base_ = '{base}'
model = dict(backbone=dict(plugins=[dict(
    cfg=dict(type='NonLocal2d', zeros_init=False),
    stages=(False, False, False, True), position='after_conv3')]))
"""
# Nothing resizes, and no more is packed than is asked for.
BARE = """
_base_ = '{base}'
test_dataloader = dict(dataset=dict(pipeline=[
    dict(type='LoadImageFromFile'),
    dict(type='PackDetInputs', meta_keys={keys})]))
"""


@pytest.fixture(scope='module')
def files(place, tmp_path_factory):
    """Configs and checkpoints of either host, and a picture."""
    folder = tmp_path_factory.mktemp('influence')
    base = (place / 'seg.py').as_posix()
    (folder / 'nl.py').write_text(NON_LOCAL.format(base=base))
    configs = dict(
        det=place / 'det.py', seg=place / 'seg.py', nl=folder / 'nl.py'
    )
    for name, config in configs.items():
        cfg = Config.fromfile(config)
        torch.manual_seed(0)
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            model = MODELS.build(cfg.model)
        for path, parameter in model.named_parameters():
            if path.endswith('poly_nl.beta'):
                torch.nn.init.ones_(parameter)
        torch.save(dict(state_dict=model.state_dict()), folder / f'{name}.pth')
    # Grey, so that all colours are those of the map.
    image = np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)
    cv2.imwrite(str(folder / 'some.png'), image)
    return {**configs, 'folder': folder}


@pytest.fixture
def look(files, monkeypatch, capfd, tmp_path):
    """Run the tool on a host's model; give its output or its line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', sys.path[:])

    def look(host, *args, image='some.png', checkpoint=None):
        folder = files['folder']
        command = [
            *(TOOL.name, folder / image, files[host]),
            *(folder / f'{checkpoint or host}.pth', '--out', 'out', *args),
        ]
        monkeypatch.setattr(sys, 'argv', [*map(str, command)])
        main = runpy.run_path(str(TOOL))['main']
        capfd.readouterr()
        try:
            cli.run(main)
        except SystemExit as error:
            assert error.code == 2
            assert not [*Path('.').glob('out/*.*')]
            lines = capfd.readouterr().err.splitlines()
            return [line for line in lines if 'error: ' in line][-1]
        return capfd.readouterr().out

    return look


AT = ('--at', 9, 30)
WINDOWS = (
    *('--cfg-options', 'model.test_cfg.mode=slide'),
    *('model.test_cfg.crop_size=32,32', 'model.test_cfg.stride=32,32'),
)


def test_segmentor_beside_attention(look, files):
    out = look(
        'seg', *AT, '--at', 63, 0, '--beside', files['nl'],
        files['folder'] / 'nl.pth', '--layer', 'backbone.layer3.5.poly_nl',
    )  # fmt: skip
    assert 'seg.py: backbone.layer3.5.poly_nl' in out
    assert 'layer4.2.nonlocal_block' in out
    for point in ('9_30', '63_0'):
        name = f'some_{point}_backbone.layer3.5.poly_nl.png'
        assert f'out/{name}: sum ' in out
        assert cv2.imread(f'out/{name}').shape == (64, 3 * 64 + 2 * 4, 3)


def test_detector(look):
    out = look('det', *AT, '--layer', 'backbone.layer3.0.poly_nl')
    assert 'det.py: backbone.layer3.0.poly_nl' in out
    drawn = cv2.imread('out/some_9_30_backbone.layer3.0.poly_nl.png')
    assert drawn.shape == (64, 2 * 64 + 4, 3)
    # Something adds, or takes away.
    colour = np.ptp(drawn.astype(int), axis=2)
    assert colour[:, 68:].max() > 50 and colour[:, :64].max() == 0


def test_a_pipeline_that_does_not_resize(look, files):
    """mmdet's heads ask for a factor, and for sizes."""
    look('det', *AT)
    drawn = cv2.imread('out/some_9_30.png')
    base = files['det'].as_posix()
    for keys in (('img_id', 'img_shape', 'ori_shape', 'scale_factor'), ()):
        files['bare'] = files['folder'] / f'bare_{len(keys)}.py'
        files['bare'].write_text(BARE.format(base=base, keys=keys))
        Path('out/some_9_30.png').unlink()
        look('bare', *AT, checkpoint='det')
        assert (cv2.imread('out/some_9_30.png') == drawn).all()


def test_score_of_a_class(look):
    out = look('seg', *AT, '--of', 'class')
    assert 'out/some_9_30_class.png: sum ' in out
    # Pictures of something else lie beside it.
    look('seg', *AT, '--of', 'branch')
    names = {path.name for path in Path('out').iterdir()}
    assert names == {'some_9_30.png', 'some_9_30_class.png'}


def test_what_is_asked_for_is_drawn_of_both(look, files):
    """The same model twice gives the same panel twice."""
    same = ('--beside', files['seg'], files['folder'] / 'seg.pth')
    layer = 'backbone.layer3.0.poly_nl'
    for end, args in (
        (f'{layer}_class', ('--of', 'class', '--layer', layer)),
        ('call0', ('--call', 0, *WINDOWS)),
    ):
        look('seg', *AT, *same, *args)
        drawn = cv2.imread(f'out/some_9_30_{end}.png')
        assert (drawn[:, 68:132] == drawn[:, 136:]).all(), args
        assert np.ptp(drawn[:, 68:].astype(int), axis=2).max() > 50
    # What the other config has no place for is not for it.
    options_for = runpy.run_path(str(TOOL))['options_for']
    options = {'model.test_cfg.stride': 1, 'model.plugins.0.cfg': 2}
    assert options_for(files['nl'], options) == {'model.test_cfg.stride': 1}


def test_bad_input(look, files):
    assert 'error: ' in look('seg')
    assert (
        'point 64 0 is not in the picture, which has x 0..63 and y 0..63'
        in look('seg', '--at', 64, 0)
    )
    assert "no Poly-NL layer 'neck'; there are backbone.layer3.0" in look(
        'det', *AT, '--layer', 'neck'
    )
    assert 'gives no scores of classes: expected a map' in look(
        'det', *AT, '--of', 'class'
    )
    assert 'does not fit the model' in look('seg', *AT, checkpoint='det')
    assert 'No such file' in look('seg', *AT, image='none.png')
    # Windows: a map of each, of which none is that of the picture.
    line = look('seg', *AT, *WINDOWS)
    assert 'was called 4 times (levels of a pyramid, windows)' in line
    assert 'is a NonLocal2d, of which only attention can be seen' in look(
        'seg', *AT, '--of', 'class', '--beside', files['nl'],
        files['folder'] / 'nl.pth',
    )  # fmt: skip
    assert '--device quatsch is none' in look(
        'seg', *AT, '--device', 'quatsch'
    )
    assert 'but this machine has no such device' in look(
        'seg', *AT, '--device', 'cuda:99'
    )


def test_a_picture_that_can_not_be_written(look, monkeypatch):
    """As where no room is left; OpenCV does not raise."""
    monkeypatch.setattr(cv2, 'imwrite', lambda *args: False)
    assert 'out/some_9_30.png can not be written' in look('seg', *AT)
