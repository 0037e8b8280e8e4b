"""What the hook logs, and what it warns of."""

import json
import logging
from pathlib import Path

import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('mmcv')

from mmengine.dataset import pseudo_collate  # noqa: E402
from mmengine.model import BaseModel  # noqa: E402
from mmengine.runner import Runner  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

from polynl_mm.engine import hooks  # noqa: E402
from polynl_mm.layers import PolyNL1d, PolyNL2d  # noqa: E402

NO_DECAY = {
    'poly_nl.alpha': dict(decay_mult=0),
    'poly_nl.beta': dict(decay_mult=0),
}


class Stage(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.poly_nl = layer

    def forward(self, x):
        return self.poly_nl(self.conv(x))


class Model(BaseModel):
    def __init__(self, beta=0.0):
        super().__init__()
        self.first = Stage(PolyNL2d(3, alpha_init=2.0, beta_init=beta))
        self.last = Stage(nn.Identity())
        self.last.poly_nl = PolyNL2d(3, alpha_init=3.0, beta_init=-0.5)

    def forward(self, inputs, mode='loss'):
        x = torch.stack(inputs)
        return {'loss': self.last(self.first(x)).square().mean()}


def train(folder, model, decay=0.1, keys=None, lr=0.0, interval=2):
    """Five iterations; the log, and the scalars of layers by step."""
    data = [dict(inputs=torch.ones(3, 4, 4))] * 10
    runner = Runner(
        model,
        str(folder),
        train_dataloader=DataLoader(data, 2, collate_fn=pseudo_collate),
        train_cfg=dict(by_epoch=True, max_epochs=1),
        optim_wrapper=dict(
            optimizer=dict(type='SGD', lr=lr, weight_decay=decay),
            paramwise_cfg=dict(custom_keys=keys or {}),
        ),
        default_hooks=dict(checkpoint=None),
        custom_hooks=[dict(type='polynl_mm.PolyNLHook', interval=interval)],
        experiment_name=folder.name,
    )
    told = []
    handler = logging.Handler(logging.WARNING)
    handler.addFilter(lambda record: record.pathname == hooks.__file__)
    handler.emit = lambda record: told.append(record.getMessage())
    runner.logger.addHandler(handler)
    runner.train()
    (file,) = Path(folder).glob('*/vis_data/scalars.json')
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    scalars = {
        line['step']: {
            key: value for key, value in line.items() if 'poly_nl/' in key
        }
        for line in lines
    }
    return told, {step: each for step, each in scalars.items() if each}


def test_values_are_logged(tmp_path):
    told, scalars = train(tmp_path, Model(beta=0.25), keys=NO_DECAY)
    assert told == []
    values = {
        'poly_nl/first.poly_nl.alpha': 2.0,
        'poly_nl/first.poly_nl.beta': 0.25,
        'poly_nl/last.poly_nl.alpha': 3.0,
        'poly_nl/last.poly_nl.beta': -0.5,
    }
    assert scalars == {2: values, 4: values}


def test_values_are_those_after_the_step(tmp_path):
    model = Model()
    _, scalars = train(tmp_path, model, keys=NO_DECAY, lr=0.01, interval=5)
    assert model.first.poly_nl.beta.item() != 0
    assert scalars[5]['poly_nl/first.poly_nl.beta'] == pytest.approx(
        model.first.poly_nl.beta.item(), rel=1e-6
    )


@pytest.mark.parametrize(
    ('keys', 'names'),
    [
        (
            {},
            'first.poly_nl.alpha, first.poly_nl.beta and 2 more towards 0',
        ),
        (
            {'poly_nl.alpha': dict(decay_mult=0)},
            'first.poly_nl.beta, last.poly_nl.beta towards 0',
        ),
    ],
)
def test_decay_is_told(tmp_path, keys, names):
    (told,) = train(tmp_path, Model(), keys=keys)[0]
    assert f'weight decay pulls {names}' in told
    assert "'poly_nl.beta': dict(decay_mult=0)" in told


def test_without_decay_nothing_is_told(tmp_path):
    assert train(tmp_path, Model(), decay=0)[0] == []


def test_layers_frozen_as_the_identity_are_told(tmp_path):
    """And nothing of their decay."""
    model = Model()
    for layer in (model.first, model.last):
        layer.poly_nl.requires_grad_(False)
    (told,) = train(tmp_path, model)[0]
    assert told.startswith('first.poly_nl: frozen at beta=0')


def test_model_without_layers(tmp_path):
    model = Model()
    model.first.poly_nl = model.last.poly_nl = nn.Identity()
    assert train(tmp_path, model) == ([], {})


def test_names_are_those_without_the_wrapper():
    model = Model()
    layers = hooks._layers(nn.DataParallel(model))
    assert layers == {
        'first.poly_nl': model.first.poly_nl,
        'last.poly_nl': model.last.poly_nl,
    }


def test_several_optimisers():
    from mmengine.optim import OptimWrapper, OptimWrapperDict

    layers = {'a': PolyNL1d(2), 'b': PolyNL1d(2)}
    wrappers = OptimWrapperDict(
        **{
            name: OptimWrapper(
                torch.optim.SGD(
                    layer.parameters(), 0.1, weight_decay=float(name == 'b')
                )
            )
            for name, layer in layers.items()
        }
    )
    assert hooks._decaying(wrappers, layers) == ['b.alpha', 'b.beta']
