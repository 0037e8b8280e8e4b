"""What the hook logs, and what it warns of."""

import json
import logging
import sys
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('mmcv')

from mmengine.dataset import pseudo_collate  # noqa: E402
from mmengine.hooks import Hook  # noqa: E402
from mmengine.model import BaseModel  # noqa: E402
from mmengine.runner import Runner  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

from polynl_mm.attention import PolySA  # noqa: E402
from polynl_mm.engine import hooks  # noqa: E402
from polynl_mm.engine.cli import StartError  # noqa: E402
from polynl_mm.engine.runner import GlooRunner  # noqa: E402
from polynl_mm.fusion import fuse_poly_nl  # noqa: E402
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


def train(
    folder,
    model,
    decay=0.1,
    keys=None,
    lr=0.0,
    interval=2,
    kind=Runner,
    others=(),
    **more,
):
    """Five iterations; the log, and the scalars of layers by step."""
    data = [dict(inputs=torch.ones(3, 4, 4))] * 10
    runner = kind(
        model,
        str(folder),
        train_dataloader=DataLoader(data, 2, collate_fn=pseudo_collate),
        train_cfg=dict(by_epoch=True, max_epochs=1),
        optim_wrapper=dict(
            optimizer=dict(type='SGD', lr=lr, weight_decay=decay),
            paramwise_cfg=dict(custom_keys=keys or {}),
        ),
        default_hooks=dict(checkpoint=None),
        custom_hooks=[
            dict(type='polynl_mm.PolyNLHook', interval=interval),
            *others,
        ],
        experiment_name=folder.name,
        **more,
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
    assert [*scalars] == [2, 4]
    for logged in scalars.values():
        assert values.items() <= logged.items()
        assert {key.rpartition('.')[2] for key in logged} == {
            'alpha',
            'beta',
            'share',
            'gate_spread',
        }


def expected(layer, x):
    """Share and spread of a layer on some features, the slow way."""
    with torch.no_grad():
        x = x.double()
        w1, w2, w3 = (w.double() for w in layer.params[:3])
        gates = [(w1 @ f * (w2 @ f)).mean(1) for f in x.flatten(2)]
        y = layer.double()(x)
        branch = y - layer.alpha * x
    spreads = [
        (g.square().mean() - g.mean() ** 2).sqrt() / g.abs().mean()
        for g in gates
    ]
    return dict(
        share=(branch.norm() / y.norm()).item(),
        gate_spread=(sum(spreads) / len(spreads)).item(),
    )


class Levels(BaseModel):
    """One layer behind a convolution, called for two levels, and Poly-SA."""

    def __init__(self, checkpointed=False, fused=False):
        super().__init__()
        self.stage = nn.Sequential(
            nn.Conv2d(3, 4, 1), PolyNL2d(4, beta_init=1.5, bias=True)
        )
        nn.init.normal_(self.stage[1].w3.bias)
        self.attention = PolySA(4, 2)
        if fused:
            assert fuse_poly_nl(self, trainable=True)[1].fused
        self.checkpointed = checkpointed

    def forward(self, inputs, mode='loss'):
        h = torch.stack(inputs)
        levels = []
        for each in (h, h[..., ::2, ::2] ** 2):
            if self.checkpointed:
                levels.append(
                    checkpoint(self.stage, each, use_reentrant=False)
                )
            else:
                levels.append(self.stage(each))
        tokens = self.attention(levels[0].flatten(2).mT)
        return {'loss': sum(y.square().mean() for y in (*levels, tokens))}


@pytest.mark.parametrize(
    'way', ('plain', 'fused', 'checkpointed', 'bfloat16', 'frozen')
)
def test_share_and_spread(tmp_path, way):
    """Means over the calls, whatever the training does with the layer."""
    torch.manual_seed(0)
    model = Levels(checkpointed=way == 'checkpointed', fused=way == 'fused')
    layer = model.stage[1]
    if way == 'frozen':
        layer.requires_grad_(False)
    h = torch.randn(2, 3, 4, 4)
    model.register_forward_pre_hook(
        lambda model, args, kwargs: ((), {**kwargs, 'inputs': [*h]}),
        with_kwargs=True,
    )
    if way == 'bfloat16':
        # mmengine's own wrapper is for GPUs.
        forward = model.forward
        model.forward = torch.autocast('cpu', torch.bfloat16)(forward)
    seen = train(tmp_path, model, keys={}, decay=0)[1]
    assert layer.watch is None and model.attention.watch is None
    unfused = deepcopy(model.stage[0])
    wants = []
    for each in (h, h[..., ::2, ::2] ** 2):
        weight = unfused.weight.flatten(1).double()
        x = torch.einsum('oi,bihw->bohw', weight, each.double())
        x = x + unfused.bias.double()[:, None, None]
        plain = PolyNL2d(4, bias=True)
        plain.load_state_dict(layer.state_dict())
        wants.append(expected(plain, x.detach()))
    tolerance = 2e-2 if way == 'bfloat16' else 1e-5
    for key in ('share', 'gate_spread'):
        want = sum(each[key] for each in wants) / 2
        got = seen[2][f'poly_nl/stage.1.{key}']
        assert got == pytest.approx(want, rel=tolerance), key
        assert 0.05 < got < 3
    assert 'poly_nl/attention.gate_spread' in seen[2]
    assert 'poly_nl/attention.share' not in seen[2]


def test_nothing_is_watched_between(tmp_path, monkeypatch):
    """The layers are told in the logged iterations alone."""
    told = []
    monkeypatch.setattr(
        hooks.PolyNLHook, '_see', lambda self, name, call: told.append(name)
    )
    train(tmp_path, Model(beta=0.25), keys=NO_DECAY, interval=4)
    assert told == ['first.poly_nl', 'last.poly_nl']


class RunAgainHook(Hook):
    """Runs the model between the step and the log, on something else."""

    priority = 'LOW'

    def after_train_iter(self, runner, batch_idx, data_batch, outputs):
        runner.model([torch.randn(3, 4, 4)] * 2)


def test_the_forward_of_the_step_alone_is_logged(tmp_path):
    """Of all layers, whatever other hooks run the model for."""
    torch.manual_seed(0)
    model = Model(beta=0.25)
    want = train(
        tmp_path / 'step_alone', deepcopy(model), keys=NO_DECAY, decay=0
    )[1]
    others = [RunAgainHook()]
    got = train(
        tmp_path / 'run_again', model, keys=NO_DECAY, decay=0, others=others
    )[1]
    for layer in ('first', 'last'):
        assert want[2][f'poly_nl/{layer}.poly_nl.share'] > 1e-3
    assert got == want


def test_values_reach_tensorboard(tmp_path, monkeypatch):
    """By mmengine's own backend; the writer is one that notes."""
    written = []

    class SummaryWriter:
        def __init__(self, folder):
            pass

        def add_scalar(self, *args):
            written.append(args)

        def __getattr__(self, name):
            return lambda *args, **kwargs: None

    monkeypatch.setitem(
        sys.modules,
        'torch.utils.tensorboard',
        SimpleNamespace(SummaryWriter=SummaryWriter),
    )
    backends = ('LocalVisBackend', 'TensorboardVisBackend')
    visualizer = dict(
        type='Visualizer', vis_backends=[dict(type=each) for each in backends]
    )
    _, scalars = train(
        tmp_path, Model(beta=0.25), keys=NO_DECAY, visualizer=visualizer
    )
    for step, logged in scalars.items():
        for key, value in logged.items():
            assert (key, value, step) in written


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


# ---------------------------------------------------------------- finite loss


class Exp(nn.Module):
    def forward(self, x):
        return x.exp()


class Steep(BaseModel):
    """Infinite from inputs of 90 on, if the random scale lets it be."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.exp = Exp()
        self.last = nn.Linear(3, 3)
        nn.init.eye_(self.layer.weight)
        self.drawn = []

    def forward(self, inputs, mode='loss'):
        self.drawn.append(torch.rand(()).item())
        x = self.last(self.exp(self.layer(torch.stack(inputs))))
        return {'loss_a': [x.square().mean()], 'loss_b': x.sum() * 0, 'acc': x}


def run(folder, value, steps=5, counts=1, kind=Runner, **kwargs):
    """Train; the third of the batches has that value in it."""
    data = [dict(inputs=torch.ones(3))] * 8
    data[2] = dict(inputs=torch.tensor([1.0, value, 1.0]))
    torch.manual_seed(0)
    runner = kind(
        Steep(),
        str(folder),
        train_dataloader=DataLoader(data, 1, collate_fn=pseudo_collate),
        train_cfg=dict(by_epoch=False, max_iters=steps),
        optim_wrapper=dict(
            optimizer=dict(type='SGD', lr=1e-4, momentum=0.9),
            accumulative_counts=counts,
        ),
        default_hooks=dict(
            checkpoint=dict(
                type='polynl_mm.CheckpointHook', by_epoch=False, interval=1
            ),
            finite_loss=dict(type='polynl_mm.FiniteLossHook', **kwargs),
        ),
        launcher='none' if kind is Runner else 'pytorch',
        experiment_name=f'{folder}{value}',
        log_level='ERROR',
    )
    try:
        runner.train()
        return runner, None
    except StartError as error:
        return runner, str(error)


@pytest.mark.parametrize('counts', (1, 2))
def test_stops_at_a_loss_that_is_not_finite(tmp_path, counts):
    """Also inside of accumulated gradients, where there is no step."""
    value = 1e3
    runner, told = run(tmp_path, value, counts=counts)
    assert told == (
        'iteration 3: the loss is not finite (loss_a, loss_b: the first '
        'output that is not is that of exp (Exp)); the last good checkpoint '
        f'is {tmp_path}/iter_2.pth'
    )
    # The second look drew what the first had drawn.
    assert len(runner.model.drawn) == 4
    assert runner.model.drawn[2] == runner.model.drawn[3]
    saved = torch.load(tmp_path / 'iter_2.pth')['state_dict']
    for name, value in runner.model.state_dict().items():
        assert torch.equal(value.cpu(), saved[name]), name


def test_what_is_named_as_the_first(tmp_path):
    told = run(tmp_path / 'input', float('nan'))[1]
    assert 'loss_a, loss_b: the input of the model is not' in told
    with pytest.MonkeyPatch.context() as patch:
        # Of the loss alone.
        patch.setattr(Exp, 'forward', lambda self, x: x.clamp(max=1e30))
        told = run(tmp_path / 'loss', 1e30)[1]
    assert 'loss_a: the outputs of all layers are' in told
    assert 'no whole checkpoint' not in told


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    """Those of the step after which there is no other loss."""
    with pytest.MonkeyPatch.context() as patch:

        def step(self, *args, **kwargs):
            for group in self.param_groups:
                for weight in group['params']:
                    weight.data.fill_(float('inf'))

        patch.setattr(torch.optim.SGD, 'step', step)
        told = run(tmp_path, 1.0)[1]
    assert told == (
        'iteration 1: layer.weight is not finite, it is not saved; there is '
        f'no whole checkpoint in {tmp_path}'
    )
    assert not [*tmp_path.glob('*.pth')]


def test_infinite_gradients_alone_do_not_stop(tmp_path, monkeypatch):
    """Loss scaling skips the step of such, and goes on."""
    skipped = []

    def step(self, *args, **kwargs):
        weight = self.param_groups[0]['params'][0]
        skipped.append(not weight.grad.isfinite().all())

    monkeypatch.setattr(torch.optim.SGD, 'step', step)
    monkeypatch.setattr(
        Exp, 'forward', lambda self, x: x.exp() + (x * 0).abs().sqrt()
    )
    assert run(tmp_path, 1.0)[1] is None
    assert skipped == [True] * 5


def test_off_by_its_key(tmp_path):
    runner, told = run(tmp_path, 1e3, stop=False)
    assert told is None
    assert runner.model.layer.weight.isnan().any()


def test_a_compiled_step_is_told():
    told = []
    runner = SimpleNamespace(
        cfg=dict(compile=True), logger=SimpleNamespace(warning=told.append)
    )
    hooks.FiniteLossHook().before_train(runner)
    (line,) = told
    assert 'does not stop at a loss' in line


def in_process(rank, folder):
    """The second of two has the bad batch; each writes what it is told."""
    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{folder}/group', rank=rank, world_size=2
    )
    value = 1e3 if rank == 1 else 1.0
    told = run(folder / 'work', value, kind=GlooRunner)[1]
    (folder / f'told_{rank}').write_text(str(told))


@pytest.mark.long
def test_a_bad_loss_of_one_process_stops_all(tmp_path):
    torch.multiprocessing.spawn(in_process, (tmp_path,), nprocs=2)
    for rank in (0, 1):
        told = (tmp_path / f'told_{rank}').read_text()
        assert told.startswith(
            'iteration 3: the loss is not finite in process 1 (loss_a, '
            'loss_b: the first output that is not is that of exp (Exp));'
        )


def test_the_model_is_left_as_it_was(tmp_path):
    runner, told = run(tmp_path, 1.0)
    assert told is None
    # Every model of mmengine has those of polynl_mm.samples.
    model = runner.model
    for left in (model._forward_hooks, model._forward_pre_hooks):
        modules = {hook.__module__ for hook in left.values()}
        assert modules == {'polynl_mm.samples'}
