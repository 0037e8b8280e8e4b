"""Configs of this package, inherited by those of others."""

from pathlib import Path

import pytest

pytest.importorskip('mmengine')

from helpers import FORKS  # noqa: E402
from mmengine.config import Config  # noqa: E402

from polynl_mm import shipped  # noqa: E402
from polynl_mm.shipped import config_path  # noqa: E402

CONFIGS = Path(__file__).resolve().parent.parent / 'configs'
RES4 = 'mask-rcnn_r50-polynl-res4_fpn_1x_coco'


@pytest.mark.parametrize(
    'name, path',
    (
        (RES4, f'coco/{RES4}.py'),
        (f'{RES4}.py', f'coco/{RES4}.py'),
        (f'coco/{RES4}', f'coco/{RES4}.py'),
        (Path(f'coco/{RES4}.py'), f'coco/{RES4}.py'),
        ('mask-rcnn_r50-polynl-res4', f'coco/{RES4}.py'),
        ('_base_/polynl', '_base_/polynl.py'),
        # Not all those that begin so.
        ('polynl', '_base_/polynl.py'),
    ),
)
def test_by_name(name, path):
    assert config_path(name) == str(CONFIGS / path)


def test_every_config_has_a_name_of_its_own():
    for path in CONFIGS.rglob('*.py'):
        assert config_path(path.stem) == str(path)
        assert config_path(path) == str(path)


@pytest.mark.parametrize(
    'name, said',
    (
        ('mask-rcn_r50-polynl-res4_fpn_1x_coco', f'nearest: {RES4}'),
        ('mask-rcnn_r50-polynl', 'several begin so: mask-rcnn_r50-polynl-c3'),
        ('', 'there is none'),
        (Path('coco/zzz.py'), 'there is none'),
    ),
)
def test_what_is_not_there(name, said):
    with pytest.raises(ValueError, match='expected the name of one') as caught:
        config_path(name)
    assert said in str(caught.value)
    assert repr(name) in str(caught.value)
    assert not str(caught.value).endswith(': ')


@pytest.mark.parametrize('listed', [False, True])
def test_a_config_elsewhere_inherits(tmp_path, listed):
    """As one of the text style, which mmengine can save and read again."""
    pytest.importorskip('mmdet')
    call = f"__import__('polynl_mm').config_path('{RES4}')"
    (tmp_path / 'other.py').write_text('other = 3\n')
    base = f"['./other.py', {call}]" if listed else call
    own = tmp_path / 'own.py'
    own.write_text(
        f'_base_ = {base}\n'
        "model = dict(backbone=dict(blocks=[dict(after='layer2', "
        "cfg=dict(type='polynl_mm.PolyNL2d'))]))\n"
    )
    cfg = Config.fromfile(own)
    assert cfg.model.backbone.blocks[0].after == 'layer2'
    assert cfg.get('other') == (3 if listed else None)
    theirs = Config.fromfile(config_path(RES4))
    theirs.model.backbone.blocks[0].after = 'layer2'
    if listed:
        theirs.other = 3
    assert cfg.to_dict() == theirs.to_dict()
    cfg.dump(tmp_path / 'dumped.py')
    assert Config.fromfile(tmp_path / 'dumped.py').to_dict() == cfg.to_dict()


@pytest.mark.parametrize('installed', [True, False])
def test_configs_of_a_fork_are_found(installed, monkeypatch):
    """Of mmseg by a distribution of another name."""
    pytest.importorskip('mmseg')

    def distribution(name):
        assert name == 'mmsegmentation'
        if not installed:
            raise shipped.PackageNotFoundError(name)

    names = dict(mmseg='mmsegmentation')
    monkeypatch.setattr('mmengine.config.utils.MODULE2PACKAGE', names)
    monkeypatch.setattr(shipped, 'distribution', distribution)
    config_path(RES4)
    assert names == dict(mmseg='mmsegmentation' if installed else 'mmseg')
    base = CONFIGS / 'mini' / 'polynl_r18-d4_mini-cityscapes.py'
    if installed != FORKS:
        assert Config.fromfile(base).train_dataloader.dataset.type


@pytest.mark.parametrize('suffix', ['', '.py'])
def test_tools_take_a_name(suffix, tmp_path, monkeypatch, capsys):
    """Unless there is a file of that name."""
    pytest.importorskip('mmcv')
    from polynl_mm.engine.start import read_config

    monkeypatch.chdir(tmp_path)
    name = f'resnet18-polynl_mini-digits{suffix}'
    path = f'{CONFIGS}/mini/resnet18-polynl_mini-digits.py'
    assert read_config(name, dict(a=1)).filename == path
    assert f'config {name}: {path}' in capsys.readouterr().err
    (tmp_path / name).write_text('mine = 2')
    if suffix:
        assert read_config(name).mine == 2
