"""What each host means by the tools' options, and who is no host."""

from pkgutil import resolve_name

import pytest

pytest.importorskip('mmengine')

from mmengine.config import ConfigDict  # noqa: E402

from polynl_mm.engine.cli import StartError  # noqa: E402
from polynl_mm.engine.hosts import HOSTS, host_of  # noqa: E402


def test_tta_keeps_what_the_config_packs():
    pipeline = [
        ConfigDict(type='LoadImageFromFile'),
        ConfigDict(type='PackDetInputs', meta_keys=('img_id', 'instances')),
    ]
    cfg = ConfigDict(model=dict(type='RetinaNet'))
    defaults = HOSTS['mmdet'].tta_defaults(cfg, ConfigDict(pipeline=pipeline))
    *before, augment = defaults['tta_pipeline']
    assert before == pipeline[:1]
    flips, (pack,) = augment['transforms']
    assert [flip['prob'] for flip in flips] == [1, 0]
    assert pack['meta_keys'] == (
        *('img_id', 'instances'),
        *('flip', 'flip_direction'),
    )
    assert len(pipeline[1].meta_keys) == 2


@pytest.mark.parametrize('scope', [None, 'mmengine', 'mmpose'])
def test_no_host(scope):
    cfg = ConfigDict(default_scope=scope, filename='some.py')
    with pytest.raises(StartError) as caught:
        host_of(cfg)
    assert str(caught.value) == (
        f'config some.py has default_scope={scope!r}, expected one of '
        'mmdet, mmseg, polynl_mm'
    )
    with pytest.raises(StartError) as caught:
        host_of(cfg, '--tta')
    assert str(caught.value) == (
        '--tta is known for configs of mmdet, mmseg, polynl_mm, but config '
        f'some.py has default_scope={scope!r}'
    )


@pytest.mark.parametrize('name', HOSTS)
def test_what_is_named_is_there(name):
    pytest.importorskip(name)
    host = HOSTS[name]
    assert host_of(ConfigDict(default_scope=name)) is host
    checks = ('check_datasets', 'check_job', 'check_test_cfg')
    for key in ('inferencer', 'set_up', *checks):
        if getattr(host, key):
            assert callable(resolve_name(getattr(host, key)))
    drawn = resolve_name(host.inferencer).visualize_kwargs
    assert host.score_thr in (*drawn, None)
    # Another name for it would be passed over.
    assert (host.score_thr is None) == (not any('thr' in k for k in drawn))
