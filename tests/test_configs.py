"""Every shipped config: it parses, its model builds, alpha and beta decay not.

Data sets are not needed: none is built.
"""

from collections import Counter
from copy import deepcopy
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import HOOKS, MODELS, DefaultScope

from polynl_mm.layers import PolyNL1d, PolyNL2d, PolyNL3d

CONFIGS = Path(__file__).resolve().parent.parent / 'configs'
NAMES = sorted(str(p.relative_to(CONFIGS)) for p in CONFIGS.rglob('*.py'))
LEAVES = [name for name in NAMES if '_base_' not in Path(name).parts]


@cache
def read(name):
    """A config, for tests that do not change it."""
    return Config.fromfile(CONFIGS / name)


def settings_by_name(model, cfg):
    """Parameter name -> (learning rate, weight decay) in the optimiser."""
    names = {id(p): name for name, p in model.named_parameters()}
    groups = build_optim_wrapper(model, deepcopy(cfg)).optimizer.param_groups
    return {
        names[id(p)]: (group['lr'], group['weight_decay'])
        for group in groups
        for p in group['params']
    }


def scalars_of(model):
    """Names of the alpha and beta of every Poly-NL layer."""
    return {
        f'{name}.{key}'
        for name, module in model.named_modules()
        if isinstance(module, (PolyNL1d, PolyNL2d, PolyNL3d))
        for key in ('alpha', 'beta')
    }


def check_decay(model, cfg):
    """Alpha and beta do not decay; the keys for that match nothing else."""
    scalars = scalars_of(model)
    decay = cfg.optimizer.get('weight_decay', 0)
    assert decay > 0, 'a config without weight decay could not fail here'
    without = deepcopy(cfg)
    keys = without.get('paramwise_cfg', {}).get('custom_keys', {})
    for key in [*keys]:
        exempts = keys[key].get('decay_mult') == 0
        if exempts and any(key in name for name in scalars):
            del keys[key]
    after = settings_by_name(model, cfg)
    before = settings_by_name(model, without)
    assert after.keys() == before.keys() >= scalars
    for name, (lr, decay) in after.items():
        if name in scalars:
            assert decay == 0, f'{name} decays'
        else:
            assert (lr, decay) == before[name], f'{name} is matched too'


def test_there_are_configs():
    assert LEAVES


@pytest.mark.parametrize('name', NAMES)
def test_parses(name):
    assert read(name).to_dict()


@pytest.mark.parametrize('host', ['mmdet', 'mmseg'])
def test_file_names_are_unique(host):
    """They name work directories, and mim looks configs up by them."""
    pytest.importorskip(host)
    shipped = Path(find_spec(host).origin).parent / '.mim' / 'configs'
    theirs = {path.name for path in shipped.rglob('*.py')}
    assert theirs
    ours = Counter(Path(name).name for name in LEAVES)
    assert not [name for name, n in ours.items() if n > 1 or name in theirs]


@pytest.mark.parametrize('name', LEAVES)
def test_names_our_hooks(name):
    """The rivals' too: nothing but the block differs."""
    cfg = read(name)
    hooks = cfg.get('custom_hooks', [])
    assert hooks.count(dict(type='polynl_mm.PolyNLHook')) == 1
    for key, kind in (
        ('checkpoint', 'CheckpointHook'),
        ('resume', 'ResumeHook'),
        ('finite_loss', 'FiniteLossHook'),
    ):
        assert cfg.default_hooks[key].type == f'polynl_mm.{kind}'


@pytest.mark.parametrize('name', LEAVES)
def test_names_the_safe_loader(name):
    """Without it, no tool would load again what it has saved."""
    imports = read(name).get('custom_imports', {})
    assert 'polynl_mm.engine.safe_load' in imports.get('imports', [])
    # A warning would be forgotten by the time of the resumption.
    assert imports.allow_failed_imports is False


@pytest.mark.parametrize('name', LEAVES)
def test_rate_can_be_scaled(name):
    """mmdet's train.py --auto-scale-lr asks for both; mmseg's has no such."""
    cfg = read(name)
    scale = cfg.get('auto_scale_lr')
    assert scale or cfg.default_scope == 'mmseg'
    if scale:
        assert scale.enable is False and scale.base_batch_size > 0


@pytest.mark.parametrize('name', LEAVES)
def test_log_counts_what_the_training_counts(name):
    """Of 200 iterations: Iter(train) [20/200], not Epoch(train) [1][20/10]."""
    cfg = read(name)
    log = cfg.get('log_processor', {}).get('by_epoch', True)
    assert log == ('max_epochs' in cfg.train_cfg)


@pytest.mark.parametrize('name', LEAVES)
def test_best_checkpoint_can_be_told(name):
    """mmengine knows what is better only of metrics of its own hosts."""
    cfg = Config.fromfile(CONFIGS / name)
    hook = HOOKS.build(cfg.default_hooks.checkpoint)
    assert hook.save_best is None or hook.key_indicators


@pytest.mark.parametrize('name', LEAVES)
def test_model_builds_and_scalars_do_not_decay(name):
    cfg = Config.fromfile(CONFIGS / name)
    pytest.importorskip(cfg.default_scope)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model)
        # A layer that is asked for, but by a plug-in of no stage, say, would
        # make the config claim what it does not do.
        assert bool(scalars_of(model)) == (
            'polynl_mm.PolyNL' in str(cfg.model)
        )
        if scalars_of(model):
            check_decay(model, cfg.optim_wrapper)
