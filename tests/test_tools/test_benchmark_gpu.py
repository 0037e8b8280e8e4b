"""The benchmark of a GPU: all of it but the GPU, at sizes of a CPU."""

import contextlib
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip('torch')

from benchmarks import card, gpu, resnet, rivals, timing  # noqa: E402
from benchmarks.card import Card  # noqa: E402
from benchmarks.goals import gpu_goals, told  # noqa: E402
from helpers import randomize  # noqa: E402
from torch import nn  # noqa: E402
from torch.autograd import DeviceType  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from polynl_mm.layers import PolyNL2d  # noqa: E402

TOOLS = Path(__file__).parents[2] / 'tools'
SHAPE, TINY_PICTURE, WIDTH = (2, 32, 6, 10), (1, 3, 64, 64), 4
VIEWS = {
    *('view', '_unsafe_view', 'reshape', 'expand', 'detach', 'permute'),
    *('t', 'transpose', 'unsqueeze', 'squeeze', 'select', 'slice', 'alias'),
    *('diagonal', 'empty', 'empty_like', 'new_empty', 'split', 'unbind'),
    *('as_strided', 'empty_strided', 'new_empty_strided', 'unfold'),
}


class Count(TorchDispatchMode):
    """Operations that compute something: as many launches, at least."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ not in VIEWS
        return func(*args, **(kwargs or {}))


class FakeCard:
    """Takes all figures of a Card on the CPU; memory is made up."""

    device = 'cpu'

    def __init__(self):
        self.tidied = 0

    def __str__(self):
        return 'no card'

    def eager(self, f):
        start = time.perf_counter()
        f()
        return time.perf_counter() - start

    gpu = eager

    def launches(self, f):
        with Count() as counter:
            f()
        return counter.count

    def peak(self, f):
        f()
        return 1024

    def flops(self, f):
        # The fused attention of a CPU is not known to be one.
        with timing._written_out():
            return Card.flops(self, f)

    def tidy(self):
        self.tidied += 1

    def ceilings(self):
        return dict(copy=3e12, bf16=7e14, fp16=7e14, tf32=4e14, float32=5e13)


@pytest.fixture
def tiny(monkeypatch, quiet_and_quick):
    """Two shapes, one with N < C; a ResNet of 4 channels."""
    monkeypatch.setattr(gpu, 'SHAPES', ((1, 8, 8, 16), (2, 32, 4, 5)))
    monkeypatch.setattr(gpu, 'SMALL_SHAPES', (SHAPE,))
    monkeypatch.setattr(gpu, 'PICTURE', TINY_PICTURE)
    build = resnet.ResNet50.__init__
    monkeypatch.setattr(
        resnet.ResNet50,
        '__init__',
        lambda self, *args: build(self, *args, width=WIDTH),
    )


# ---------------------------------------------------------------------- card


class Gpu:
    """What a Card asks of torch.cuda, on a clock that calls set forward."""

    def __init__(self):
        self.now, self.captured, self.flushed = 0.0, None, []
        self.kept = []

    def spend(self, seconds):
        if self.captured is None:
            self.now += seconds
        else:
            self.captured.append(seconds)

    def Event(self, enable_timing):
        event = SimpleNamespace()
        event.record = lambda: setattr(event, 'at', self.now)
        event.elapsed_time = lambda end: (end.at - event.at) * 1e3
        return event

    def CUDAGraph(self):
        graph = SimpleNamespace(calls=[])
        graph.replay = lambda: self.spend(sum(graph.calls))
        graph.reset = lambda: self.kept.remove(graph)
        self.kept.append(graph)
        return graph

    @contextlib.contextmanager
    def graph(self, graph):
        self.captured = graph.calls
        yield
        self.captured = None

    def Stream(self):
        return SimpleNamespace(wait_stream=lambda other: None)

    current_stream = Stream

    def get_device_properties(self, index):
        return SimpleNamespace(L2_cache_size=64)

    def stream(self, stream):
        return contextlib.nullcontext()

    def synchronize(self):
        pass

    empty_cache = synchronize


@pytest.fixture
def fake_gpu(monkeypatch):
    fake = Gpu()
    for name in dir(fake):
        if hasattr(torch.cuda, name) and name[0] != '_':
            monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    monkeypatch.setattr(Card, 'device', 'cpu')
    monkeypatch.setattr(card, 'LEAST_FLUSHED', 2)
    return fake


def test_card_times_the_call_alone(fake_gpu):
    found = Card(seconds=1.0)
    # Beside the call, zeroing what flushes the cache takes its time.
    flushed = found._flushed
    assert flushed.numel() == 128
    found._flushed = SimpleNamespace(zero_=lambda: fake_gpu.spend(7.0))
    calls = []

    def call():
        calls.append(fake_gpu.captured is not None)
        # The first is slow, and one of the others by chance.
        fake_gpu.spend({1: 9.0, 5: 5.0}.get(len(calls), 0.25))

    assert found.eager(call) == pytest.approx(0.25)
    assert len(calls) == 2 + 5
    calls.clear()
    assert found.gpu(lambda: (call(), fake_gpu.spend(0.5))) == (
        pytest.approx(0.75)
    )
    # Three times before the capture, and then it is replayed only.
    assert calls == [False] * 3 + [True]
    assert fake_gpu.kept == []


def test_ceilings(fake_gpu, monkeypatch):
    monkeypatch.setattr(card, 'COPIED', 1000)
    monkeypatch.setattr(card, 'ROWS', 10)
    switch = torch.backends.cuda.matmul
    before, seen = switch.allow_tf32, []

    def eager(self, f):
        f()
        seen.append(switch.allow_tf32)
        return 0.5

    monkeypatch.setattr(Card, 'eager', eager)
    assert Card().ceilings() == dict(
        copy=4000, bf16=4000, fp16=4000, tf32=4000, float32=4000
    )
    assert seen[1:] == [False, False, True, False]
    assert switch.allow_tf32 == before


def test_launches_are_those_of_the_device(fake_gpu, monkeypatch):
    with pytest.raises(RuntimeError, match='no launch'):
        Card().launches(lambda: torch.ones(3) + 1)
    kinds = [DeviceType.CPU, DeviceType.CUDA, DeviceType.CUDA]
    events = [SimpleNamespace(device_type=kind) for kind in kinds]
    seen = SimpleNamespace(events=lambda: events)
    monkeypatch.setattr(
        card, 'profile', lambda activities: contextlib.nullcontext(seen)
    )
    assert Card().launches(lambda: None) == 2


def test_products_of_a_gradient_are_counted(fake_gpu):
    """Also where autograd.grad asks for it of a module."""
    linear, x = nn.Linear(4, 6), torch.randn(8, 4, requires_grad=True)

    def call():
        torch.autograd.grad(linear(x).sum(), [x, linear.weight])

    assert Card().flops(call) == 3 * 2 * 8 * 4 * 6


# -------------------------------------------------------------------- rivals


def drawn(block, c=8, shape=(2, 8, 3, 5)):
    torch.manual_seed(0)
    return block(c).double(), torch.randn(shape, dtype=torch.double)


def projections(block, x):
    """Queries, keys, values: lists of N vectors, of the first image."""
    maps = [conv(x)[0].flatten(1).T for conv in (block.q, block.k, block.v)]
    return [list(m) for m in maps]


def added(block, vectors, x):
    """x with the projected vectors added, the first image."""
    y = torch.stack(vectors, 1).unflatten(1, x.shape[2:])
    return x[:1] + block.out(y[None])


@pytest.mark.parametrize('c, heads', [(8, 1), (1024, 4), (2048, 8)])
def test_non_local_is_attention_written_out(c, heads):
    block, x = drawn(rivals.NonLocal, c, (1, c, 2, 3))
    assert block.heads == heads
    queries, keys, values = projections(block, x)
    width = c // 2 // heads
    assert width <= 256
    vectors = []
    for q in queries:
        parts = []
        for h in range(heads):
            s = slice(h * width, (h + 1) * width)
            e = [(q[s] @ k[s] / width**0.5).exp() for k in keys]
            parts.append(sum(w * v[s] for w, v in zip(e, values)) / sum(e))
        vectors.append(torch.cat(parts))
    torch.testing.assert_close(block(x), added(block, vectors, x))


def test_efficient_attention_is_a_loop_over_positions():
    block, x = drawn(rivals.EfficientAttention)
    queries, keys, values = projections(block, x)
    gathered = torch.zeros(4, 4, dtype=torch.double)
    weights = torch.stack(keys).exp()
    weights = weights / weights.sum(0)
    for w, v in zip(weights, values):
        gathered += torch.outer(w, v)
    vectors = [(q.exp() / q.exp().sum()) @ gathered for q in queries]
    y = block(x)
    torch.testing.assert_close(y[:1], added(block, vectors, x))
    torch.testing.assert_close(y[1:], block(x[1:]))


def test_context_block_is_mmcvs():
    bricks = pytest.importorskip('mmcv.cnn.bricks')
    block, x = drawn(rivals.ContextBlock, 32, (2, 32, 3, 5))
    theirs = bricks.ContextBlock(32, ratio=1 / 16).double()
    nn.init.normal_(theirs.channel_add_conv[-1].weight)
    block.load_state_dict(theirs.state_dict())
    assert (block(x) - x).abs().max() > 0.01
    torch.testing.assert_close(block(x), theirs(x))


# -------------------------------------------------------------------- ResNet


def test_resnet_is_that_of_the_hosts():
    models = pytest.importorskip('mmdet.models')
    torch.manual_seed(0)
    theirs = models.ResNet(50, base_channels=8, stem_channels=8)
    randomize(theirs).eval()
    ours = resnet.ResNet50(width=8)
    # Their modules come in the same order.
    names = ours.state_dict()
    assert len(names) == len(theirs.state_dict())
    ours.load_state_dict(dict(zip(names, theirs.state_dict().values())))
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = theirs(x)[-1]
        assert expected.std() > 0.01
        torch.testing.assert_close(ours(x), expected)
        torch.testing.assert_close(ours.fold()(x), expected)


@pytest.mark.parametrize('name', gpu.VARIANTS)
def test_variants_step_and_fold(name, tiny):
    variant = gpu.VARIANTS[name]
    model = variant.build('cpu')
    blocks = [m.tail.block for m in model.body if hasattr(m.tail, 'block')]
    has = [not isinstance(b, nn.Identity) for b in blocks]
    assert sum(has) == len(variant.places)
    if name.endswith('end of c4'):
        assert has.index(True) == 3 + 4 + 5
    x = torch.randn(TINY_PICTURE)
    calls = gpu.resnet_calls(model, x, gpu.REGIMES['bf16'])
    mode, training = next(calls)
    grads = training()
    assert mode == 'training'
    assert all(g.isfinite().all() for g in grads)
    assert not any(p.requires_grad for p in model.stem.parameters())
    before = model(x)
    mode, forward = next(calls)
    assert mode == 'forward' and forward().dtype in (
        torch.bfloat16,
        torch.float32,
    )
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    torch.testing.assert_close(model(x), before, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('folded', [False, True])
def test_fused_tail_is_what_fuse_poly_nl_does(folded):
    """Same values, and not a launch more or less."""
    pytest.importorskip('mmengine')
    from polynl_mm import fuse_poly_nl

    torch.manual_seed(0)
    tail = resnet.Tail(8, 32, PolyNL2d(32, beta_init=0.5), fused=True)
    randomize(tail).eval()
    copy = PolyNL2d(32)
    copy.load_state_dict(tail.block.state_dict())
    conv, norm = nn.Conv2d(8, 32, 1, bias=False), nn.BatchNorm2d(32)
    conv.load_state_dict(tail.conv.state_dict())
    norm.load_state_dict(tail.norm.state_dict())
    plain = nn.Sequential(conv, norm, copy).eval()
    h = torch.randn(2, 8, 40, 40)
    expected = plain(h)
    if folded:
        tail.fold()
    theirs, report = fuse_poly_nl(plain, trainable=not folded)
    assert report.fused
    launches, results = [], []
    for module in (tail, theirs):
        with Count() as counter, torch.set_grad_enabled(not folded):
            y = module(h)
            if not folded:
                y.sum().backward()
        launches.append(counter.count)
        results.append(y)
    assert launches[0] == launches[1]
    for y in results:
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    if not folded:
        for a, b in (
            (tail.conv, conv),
            (tail.norm, norm),
            (tail.block.w1, copy.w1),
        ):
            torch.testing.assert_close(a.weight.grad, b.weight.grad)


# --------------------------------------------------------------------- cases


def run_all(fake, over=lambda: False):
    kept = []
    result = gpu.run(
        fake, over, lambda found, line: kept.append(json.dumps(found))
    )
    return result, kept


def test_all_figures_of_a_run(tiny):
    fake = FakeCard()
    result, kept = run_all(fake)
    assert [row['regime'] for row in result['resnet']] == ['bf16', 'tf32']
    assert len(result['layer']) == 4
    cases = 4 * (1 + len(gpu.BLOCKS)) + 2 * len(gpu.VARIANTS)
    # The JSON grows case by case.
    assert len(kept) == 1 + cases == 1 + fake.tidied
    assert all(len(a) < len(b) for a, b in zip(kept, kept[1:]))
    for row in result['layer']:
        assert list(row['contenders']) == [gpu.UNIT, *gpu.BLOCKS]
        for case in row['contenders'].values():
            assert 'errors' not in case
            for mode in timing.MODES:
                assert set(case[mode]) == {*gpu.LAYER_FIGURES[mode], 'bytes'}
    c, n = 8, 8 * 16
    conv = result['layer'][1]['contenders']['conv']
    assert conv['forward']['flops'] == 2 * n * c * c
    assert conv['training']['flops'] == 3 * 2 * n * c * c
    assert conv['forward']['bytes'] == 4 * (2 * n * c + c * c)
    assert conv['training']['bytes'] == 4 * (5 * n * c + 3 * c * c)
    half = result['layer'][0]['contenders']['conv']
    assert half['forward']['bytes'] == 2 * 2 * n * c + 4 * c * c
    # The convolution, and both of its gradients at once.
    assert conv['training']['launches'] == 2
    took = result['layer'][0]['contenders']['auto']['took']
    assert set(took) == set(timing.MODES)
    for row in result['resnet']:
        assert list(row['contenders']) == list(gpu.VARIANTS)
        fused = row['contenders']['fused']
        assert fused['blocks'] == 13
        for mode in timing.MODES:
            assert set(fused[mode]) == set(gpu.RESNET_FIGURES[mode])
        assert gpu.launches_per_block(row, 'fused') > 1
        assert gpu.launches_per_block(row, gpu.PLAIN) is None
    assert all(case['right'] for case in result['errors'])
    names = {case['name'] for case in result['errors']}
    assert {'formula', 'auto', 'fused behind a convolution'} <= names
    text = gpu.tables(result)
    assert 'failed' not in text and 'wrong' not in text
    # All there is no figure for: launches of a block of plain.
    assert text.count(' – ') == 2
    assert 'copy 3.00 TB/s' in text
    assert gpu_goals(result)


def test_what_fails_is_told_and_the_rest_goes_on(tiny, monkeypatch):
    class Full(FakeCard):
        def gpu(self, f):
            raise torch.OutOfMemoryError('out of\nmemory')

    def broken(c):
        raise ValueError('no such layer')

    monkeypatch.setitem(gpu.BLOCKS, 'ContextBlock', broken)
    result, _ = run_all(Full())
    row = result['layer'][0]
    conv, context = (row['contenders'][k] for k in ('conv', 'ContextBlock'))
    assert conv['errors']['training, gpu'] == 'OutOfMemoryError: out of'
    assert 'gpu' not in conv['training'] and conv['training']['eager'] > 0
    assert context['errors'] == {'': 'ValueError: no such layer'}
    variant = result['resnet'][0]['contenders']['ContextBlock']
    assert variant['errors'] == context['errors'] and variant['blocks'] == 13
    assert 'launches' in result['resnet'][1]['contenders']['fused']['forward']
    text = gpu.tables(result)
    assert '1x8x8x16 bf16: ContextBlock failed: ValueError: no such' in text
    assert all(
        goal['reached'] is None
        for goal in gpu_goals(result)
        if 'launches' not in goal['goal']
    )


def test_what_is_left_out(tiny, monkeypatch):
    regime = gpu.REGIMES['tf32']._replace(most_positions=100)
    monkeypatch.setitem(gpu.REGIMES, 'tf32', regime)
    first = iter([False] * 17)
    result, kept = run_all(FakeCard(), lambda: next(first, True))
    rows = result['layer']
    assert rows[1]['contenders']['NonLocal']['left_out'] == (
        'it would take too long'
    )
    assert rows[0]['contenders']['NonLocal']['forward']['gpu'] > 0
    over = {'the time was over'}
    assert {case['left_out'] for case in rows[3]['contenders'].values()} == (
        over
    )
    assert 'plain left out: the time was over' in gpu.tables(result)


def test_a_wrong_form_is_seen(tiny, monkeypatch):
    class Wrong(PolyNL2d):
        factor = 1.1

        def forward(self, x):
            return super().forward(x) * self.factor

    class Unknown(Wrong):
        factor = float('nan')

    monkeypatch.setitem(gpu.BLOCKS, 'gram', Wrong)
    monkeypatch.setitem(gpu.BLOCKS, 'direct', Unknown)
    found = {
        case['name']: case
        for case in gpu.errors('cpu')
        if case['regime'] == 'tf32'
    }
    assert not found['gram']['right'] and 0.09 < found['gram']['worst'] < 0.2
    assert not found['direct']['right'] and 'error' not in found['direct']
    assert found['auto']['right'] and found['auto']['worst'] < 1e-5
    assert '**wrong**' in timing.table([], [gpu._error_line(found['gram'])])


# --------------------------------------------------------------------- goals


def made_up(shape, regime, **gpu_times):
    return dict(
        regime=regime,
        shape=shape,
        contenders={
            name: dict(training=dict(gpu=seconds, launches=18))
            for name, seconds in gpu_times.items()
        },
    )


def test_goals_of_a_made_up_result():
    times = dict(conv=1.0, formula=8.0, direct=4.0, gram=2.1, ContextBlock=2)
    plain = dict(gpu=10.0, launches=800)
    result = dict(
        layer=[
            made_up((2, 256, 64, 64), 'bf16', **times, auto=2.1),
            made_up((2, 256, 32, 64), 'bf16', **times, auto=2.2),
            made_up((2, 256, 32, 32), 'bf16', **times, auto=2.9),
            made_up((2, 256, 8, 16), 'bf16', **times, auto=3.6),
            made_up((2, 256, 32, 32), 'tf32', **times, auto=2.1),
            made_up((2, 256, 8, 8), 'tf32', **times, auto=5.0),
        ],
        resnet=[
            dict(
                regime='bf16',
                contenders={
                    'plain': dict(training=plain, forward=plain, blocks=0),
                    'fused': dict(
                        training=dict(gpu=11.4, launches=800 + 13 * 31),
                        forward=dict(gpu=11.0),
                        blocks=13,
                    ),
                    'fused, end of c4': dict(
                        training=dict(gpu=10.4), blocks=1
                    ),
                },
            )
        ],
    )
    goals = gpu_goals(result)
    found = {goal['goal']: (goal['worst'], goal['reached']) for goal in goals}
    near = pytest.approx
    assert found['tf32, 4C <= N: auto / conv'] == (2.1, True)
    assert found['tf32, anywhere: auto / formula'] == (5 / 8, False)
    assert found['bf16, 8C <= N: auto / conv'] == (2.2, True)
    assert found['bf16, 16C <= N: auto / ContextBlock'] == (near(1.05), False)
    assert found['bf16, 4C <= N < 8C: auto / conv'] == (2.9, False)
    assert found['bf16, 0.5C <= N < 2C: auto / conv'] == (3.6, True)
    assert found['bf16, 0.5C <= N < 2C: auto / formula'] == (0.45, True)
    assert found['bf16, anywhere: auto / the better form'][0] == near(
        3.6 / 2.1
    )
    assert found['bf16, anywhere: launches of the layer'] == (18, True)
    assert found['bf16, ResNet-50: launches of a fused block'] == (31, False)
    part = 'bf16, ResNet-50, {}: {} / plain'.format
    assert found[part('training', 'fused')] == (near(1.14), True)
    assert found[part('inference', 'fused')] == (near(1.1), True)
    assert found[part('training', 'fused, end of c4')] == (near(1.04), False)
    assert found[part('training', 'auto, end of c4')] == (None, None)
    assert found['tf32, ResNet-50, inference: fused / plain'] == (None, None)
    lines = told(goals).splitlines()
    assert len(lines) == len(goals)
    assert (
        'SHORT OF bf16, 4C <= N < 8C: auto / conv: 2.9 (limit 2.8, worst at '
        '2x256x32x32 bf16)'
    ) in lines
    assert (
        'NOT KNOWN tf32, ResNet-50, inference: fused / plain (limit 1.1)'
        in (lines)
    )


# --------------------------------------------------------------- the command

ALONE = """
import sys


class Torch_alone:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('mmcv', 'mmengine', 'mmdet', 'mmseg'):
            raise ModuleNotFoundError(name)


sys.meta_path.insert(0, Torch_alone())
sys.path[:0] = [{tools!r}, {tests!r}, {tests!r} + '/test_tools']
import benchmark_layer
import test_benchmark_gpu as fake
import torch
from benchmarks import gpu, resnet

gpu.SHAPES, gpu.SMALL_SHAPES = ((1, 8, 4, 4),), (fake.SHAPE,)
gpu.PICTURE = fake.TINY_PICTURE
build = resnet.ResNet50.__init__
resnet.ResNet50.__init__ = lambda self, *args: build(self, *args, width=2)
torch.cuda.is_available = lambda: True
benchmark_layer.Card = fake.FakeCard
benchmark_layer.main()
"""


def test_the_command_where_there_is_torch_alone(tmp_path):
    script = ALONE.format(tools=str(TOOLS), tests=str(TOOLS.parent / 'tests'))
    done = subprocess.run(
        [sys.executable, '-c', script, '--device', 'cuda', '--json', 'o.json'],
        cwd=tmp_path,
        env={
            **os.environ,
            'OMP_NUM_THREADS': '1',
            'PYTHONPATH': str(TOOLS.parent),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / 'o.json').read_text())
    assert len(result['layer']) == 2 and len(result['resnet']) == 2
    assert result['goals'] and result['ceilings']['copy'] == 3e12
    lines = done.stdout.splitlines()
    assert lines[0] == 'no card'
    assert '| plain | 0 | ' in done.stdout
    assert lines[-1].split(':')[0].endswith('tf32, ResNet-50, training')


@pytest.mark.parametrize(
    'args, why',
    [
        (('--device', 'cuda'), '--device cuda, but this machine has no such'),
        (
            ('--device', 'cuda', '--no-memory'),
            '--no-memory is not for --device cuda',
        ),
        (('--json', '/nowhere/o.json'), '--json /nowhere/o.json: its folder'),
    ],
)
def test_refuses_in_a_line(args, why, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(sys, 'argv', ['benchmark_layer.py', *args])
    tool = importlib.import_module('benchmark_layer')
    with pytest.raises(SystemExit, match=f'^benchmark_layer.py: {why}'):
        tool.main()
