"""One gate for several calls."""

import _thread
import gc
import os
import signal
import threading
import weakref
from copy import deepcopy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import assert_near
from mmcv.cnn import ContextBlock
from mmengine.model import ExponentialMovingAverage
from torch import nn
from torch.nn.functional import interpolate, pad
from torch.utils.checkpoint import checkpoint

from polynl_mm import fuse_poly_nl, shared_context
from polynl_mm.context import (
    Crops,
    Frames,
    Processes,
    Window,
    WindowError,
    Windows,
    _Made,
    bands,
    grid,
)
from polynl_mm.layers import PolyNL1d, PolyNL2d, PolyNL3d
from polynl_mm.padding import Pictures, pictures_in

SIZE = (23, 31)
BUDGETS = {'all held': None, 'some held': 0.02, 'none held': 0}
each_budget = pytest.mark.parametrize('budget', BUDGETS.values(), ids=BUDGETS)


def host(kernel=1, block=PolyNL2d, conv=nn.Conv2d):
    """Three convolutions, with layers that matter behind the first two."""
    torch.manual_seed(0)
    pad = dict(padding=kernel // 2)
    model = nn.Sequential(
        conv(3, 8, kernel, **pad),
        block(8, beta_init=0.7),
        nn.ReLU(),
        conv(8, 6, kernel, **pad),
        block(6, beta_init=-0.5, bias=True),
        conv(6, 2, kernel, **pad),
    )
    for p in model.parameters():
        if p.dim() == 1:
            nn.init.normal_(p, 0.5)
    return model.double().eval()


def image(images=2, size=SIZE, channels=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shape = (images, channels, *size)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    # Brighter to the right: no part is like the whole.
    return x + torch.linspace(-1, 2, size[-1])


def cut(x, window):
    x1, y1, x2, y2 = window.box
    return x[..., y1:y2, x1:x2]


def stitch(like, windows, parts):
    """Each window's part, taken from its core."""
    y = torch.full_like(like, torch.nan)
    for window, part in zip(windows, parts):
        (x1, y1, *_), (u1, v1, u2, v2) = window.box, map(round, window.core)
        y[..., v1:v2, u1:u2] = part[..., v1 - y1 : v2 - y1, u1 - x1 : u2 - x1]
    return y


def in_windows(model, x, windows, budget=None, over=None):
    over = over or Windows(budget, images=len(x))
    with shared_context(model, over):
        parts = over(lambda window: model(cut(x, window)), windows)
    return stitch(model(x).detach(), windows, parts)


# Of pytest, of a progress bar.
OTHERS = set()


@pytest.fixture(autouse=True)
def know_other_threads():
    OTHERS.clear()
    OTHERS.update(threading.enumerate())


def own_threads():
    return set(threading.enumerate()) - OTHERS


def is_clean(model):
    lasting = [thread for thread in own_threads() if not thread.daemon]
    return not lasting and not any(
        {'around', 'spatial_pool'} & vars(module).keys()
        for module in model.modules()
    )


# -------------------------------------------------------------------- windows


@pytest.mark.parametrize('stride', [(9, 10), (5, 7), (2, 3)], ids=str)
def test_cores_tile_the_image(stride):
    counts = torch.zeros(SIZE)
    for window in grid(SIZE, (9, 10), stride):
        like = cut(torch.empty(1, 1, *SIZE), window)
        assert like.shape[2:] == (9, 10)
        weights = window.weights(like)
        if weights is None:
            weights = torch.ones(1, *like.shape[2:])
        cut(counts, window).add_(weights[0])
        assert weights.sum() == pytest.approx(window.area)
    assert_near(counts, torch.ones(SIZE), 1e-6)


def test_weights_of_a_coarser_map_count_areas():
    """Cells of four pixels, of which the core's border cuts one in half."""
    window = Window((4, 0, 20, 8), (10, 0, 20, 8))
    weights = window.weights(torch.empty(1, 5, 2, 4))
    assert_near(weights, torch.tensor([[[0, 0.5, 1, 1]] * 2]), 1e-6)


@each_budget
@pytest.mark.parametrize('stride', [(9, 10), (5, 7), (2, 3)], ids=str)
@torch.no_grad()
def test_windows_equal_the_whole_image(stride, budget):
    model, x = host(), image()
    windows = grid(SIZE, (9, 10), stride)
    want = model(x)
    assert_near(in_windows(model, x, windows, budget), want, 1e-13)
    assert is_clean(model)
    # What each window knows without the others is something else.
    alone = stitch(want, windows, [model(cut(x, w)) for w in windows])
    assert (alone - want).abs().max() > 0.1 * want.abs().max()


@torch.no_grad()
def test_windows_that_the_model_pads():
    """Overlapping ones, to a multiple of 12, as a preprocessor does."""
    model, x = host(), image()
    windows = grid(SIZE, (9, 10), (5, 7))

    def step(window):
        with pictures_in(Pictures((12, 12), [(9, 10)] * 2)):
            y = model(pad(cut(x, window), (0, 2, 0, 3), value=7.0))
        return y[..., :9, :10]

    want = model(x)
    with shared_context(model, Windows(images=2)) as over:
        got = stitch(want, windows, over(step, windows))
    assert_near(got, want, 1e-13)


@pytest.mark.parametrize('size', [SIZE, (40, 99)], ids=['whole', 'larger'])
def test_one_window_is_the_image(size):
    model, x = host(kernel=3), image()
    (window,) = windows = grid(SIZE, size, size)
    assert window.box == window.core == (0, 0, *SIZE[::-1])
    assert torch.equal(in_windows(model, x, windows), model(x))


@torch.no_grad()
def test_order_of_windows_does_not_matter():
    model, x = host(kernel=3), image()
    windows = grid(SIZE, (9, 10), (5, 7))
    want = in_windows(model, x, windows)
    generator = torch.Generator().manual_seed(0)
    for budget in BUDGETS.values():
        order = torch.randperm(len(windows), generator=generator)
        mixed = [windows[k] for k in order]
        assert_near(in_windows(model, x, mixed, budget), want, 1e-14)


@each_budget
@torch.no_grad()
def test_exact_where_overlaps_exceed_the_receptive_field(budget):
    """Three convolutions of 3 x 3 see three pixels beyond a border."""
    model, x = host(kernel=3), image()
    windows = grid(SIZE, (12, 14), (5, 7))
    y = in_windows(model, x, windows, budget)
    assert_near(y, model(x), 1e-13)
    narrow = grid(SIZE, (12, 14), (11, 13))
    y = in_windows(model, x, narrow, budget)
    assert (y - model(x)).abs().max() > 1e-2


@pytest.mark.parametrize('budget', [None, 0], ids=['held', 'not held'])
@torch.no_grad()
def test_videos_and_sequences(budget):
    model = host(block=PolyNL3d, conv=nn.Conv3d)
    x = image(size=(4, *SIZE))
    windows = grid(SIZE, (9, 10), (5, 7))
    assert_near(in_windows(model, x, windows, budget), model(x), 1e-13)
    model = host(block=PolyNL1d, conv=nn.Conv1d)
    x = image(size=(1, 30))
    windows = grid((1, 30), (1, 10), (1, 10))

    def step(window):
        return model(cut(x, window).squeeze(2)).unsqueeze(2)

    over = Windows(budget, images=2)
    with shared_context(model, over):
        y = torch.cat(over(step, windows), 3)
        assert_near(y.squeeze(2), model[:0](y).squeeze(2), 0)
        with pytest.raises(WindowError, match='no height and width'):
            over(step, grid((1, 30), (1, 10), (1, 8)))
    assert_near(y.squeeze(2), model(x.squeeze(2)), 1e-13)


def test_gradients_of_the_whole_image():
    model, x = host(), image()
    windows = grid(SIZE, (9, 10), (5, 7))
    params = list(model.parameters())
    loss = model(x).square().sum()
    wants = torch.autograd.grad(loss, params)
    over = Windows(None, images=2)
    with shared_context(model, over):
        parts = over(lambda window: model(cut(x, window)), windows)
    y = stitch(model(x).detach(), windows, parts)
    gots = torch.autograd.grad(y.square().sum(), params)
    for got, want in zip(gots, wants):
        assert_near(got, want, 1e-12)


def test_gradients_need_all_windows():
    model, x = host(), image()
    windows = grid(SIZE, (9, 10), (9, 10))
    for budget in (0, 0.02):
        with pytest.raises(WindowError, match=f'{budget} MiB does not hold'):
            in_windows(model, x, windows, budget)
        assert is_clean(model)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize('autocast', [False, True])
@torch.no_grad()
def test_low_precision(dtype, autocast):
    """The results of torch's own modes, which threads do not inherit."""
    model, x = host().float(), image().float()
    windows = grid(SIZE, (9, 10), (5, 7))
    truth = in_windows(model, x, windows)
    if not autocast:
        model, x = model.to(dtype), x.to(dtype)
    with torch.autocast('cpu', dtype, enabled=autocast):
        want = model(x)
        y = in_windows(model, x, windows)
    assert want.dtype == y.dtype == dtype
    error = (want - truth).abs().max()
    assert (y - truth).abs().max() <= 2 * error


@each_budget
def test_threads_have_the_modes_of_their_caller(budget):
    model, x = host(), image()
    seen = set()

    def step(window):
        grad = torch.is_grad_enabled()
        seen.add((grad, torch.is_inference_mode_enabled()))
        seen.add(torch.is_autocast_enabled('cpu'))
        return model(cut(x, window))

    with torch.inference_mode(), torch.autocast('cpu', torch.bfloat16):
        with shared_context(model, Windows(budget, images=2)) as over:
            over(step, grid(SIZE, (9, 10), (9, 10)))
    assert seen == {(False, True), True}


@torch.no_grad()
def test_what_is_not_held_is_computed_again():
    """Six windows, two layers: thrice where none is held."""
    model, x = host(), image()
    windows = grid(SIZE, (12, 12), (12, 12))
    assert len(windows) == 6
    counts = {}
    # A position of a window holds 8 numbers at the first layer and 6 more
    # at the second, 2 images of it.
    for held in (0, 0.5, 1, 2.5, 4, 7):
        steps = []

        def step(window, steps=steps):
            steps.append(window)
            return model(cut(x, window))

        # Before the ReLU there are convolution and layer's own input alone.
        budget = held * 12 * 12 * 8 * 8 * 2 / 2**20
        with shared_context(model, Windows(budget, images=2)) as over:
            over(step, windows)
        counts[held] = len(steps)
    assert counts[0] == counts[0.5] == 18
    assert 18 > counts[1] > counts[2.5] > counts[4] > counts[7] == 6


def test_bytes_that_are_held():
    old = torch.zeros(1000)
    made = _Made({})
    with made:
        a = torch.zeros(10)
        b = a.view(2, 5) + 1
        c = old[3:]
        old.add_(1)
        d = torch.cat([c, a])
        assert made.bytes() == 4 * (10 + 10 + 1007)
        del d
        assert made.bytes() == 4 * 20
        made.move_to('cpu', but=(b,))
        assert a.untyped_storage().nbytes() == 0
        assert b.untyped_storage().nbytes() == 40
        assert made.bytes() == 4 * 20
        made.move_back()
    assert (a == 0).all() and (b == 1).all() and (c == 1).all()


@each_budget
@torch.no_grad()
def test_features_may_wait_elsewhere(budget):
    model, x = host(), image()
    over = Windows(budget, images=2, wait_on='cpu')
    windows = grid(SIZE, (9, 10), (5, 7))
    assert_near(in_windows(model, x, windows, over=over), model(x), 1e-13)


# ------------------------------------------------------ what goes wrong there


@each_budget
@pytest.mark.parametrize('after', [False, True], ids=['first', 'later'])
@torch.no_grad()
def test_a_failing_window_is_named(budget, after):
    model, x = host(), image()
    windows = grid(SIZE, (9, 10), (9, 10))

    def step(window):
        if not after and window is windows[5]:
            raise KeyError('what')
        y = model(cut(x, window))
        if window is windows[5]:
            raise KeyError('what')
        return y

    with shared_context(model, Windows(budget, images=2)) as over:
        message = r"^window x 10\.\.20, y 9\.\.18: KeyError: 'what'$"
        with pytest.raises(WindowError, match=message) as caught:
            over(step, windows)
        assert isinstance(caught.value.__cause__, KeyError)
        assert not own_threads()
        # The next image is none the worse.
        over(lambda window: model(cut(x, window)), windows)
    assert is_clean(model)


@pytest.mark.parametrize('place', [0, 3, 8])
@each_budget
@torch.no_grad()
def test_ctrl_c_leaves_no_thread(budget, place):
    model, x = host(), image()
    windows = grid(SIZE, (9, 10), (9, 10))

    def step(window):
        if window is windows[place]:
            signal.raise_signal(signal.SIGINT)
        return model(cut(x, window))

    with pytest.raises(KeyboardInterrupt):
        with shared_context(model, Windows(budget, images=2)) as over:
            over(step, windows)
    assert not own_threads() and is_clean(model)


@pytest.mark.parametrize('last', [1, 3, 4])
def test_windows_that_go_different_ways(last):
    model, x = host(), image()
    windows = grid(SIZE, (23, 16), (23, 15))

    def step(window):
        part = model if window is windows[0] else model[:last]
        return part(cut(x, window))

    place = '1' if last == 1 else '4'
    message = (
        rf"^window x 0..16, y 0..23 goes through '{place}' with \(2, .*, but "
        r'window x 15..31, y 0..23 through no further layer'
    )
    with torch.no_grad(), shared_context(model, Windows(images=2)) as over:
        with pytest.raises(RuntimeError, match=message):
            over(step, windows)
    assert not own_threads() and is_clean(model)


@each_budget
@pytest.mark.parametrize('how', ['copy', 'thread'])
def test_windows_that_come_to_no_layer(budget, how):
    model, x = host(), image()
    copied = deepcopy(model)

    def elsewhere(x):
        if how == 'copy':
            return copied(x)
        return run_all([lambda: model(x)])[0]

    windows = grid(SIZE, (9, 10), (9, 10))
    message = '^{}: no layer of the model .* was called'
    with torch.no_grad():
        with shared_context(model, Windows(budget, images=2)) as over:
            with pytest.raises(RuntimeError, match=message.format('Windows')):
                over(lambda window: elsewhere(cut(x, window)), windows)
        with shared_context(model, Frames()) as over:
            with pytest.raises(RuntimeError, match=message.format('Frames')):
                over(elsewhere, x)
        with pytest.raises(RuntimeError, match=message.format('Crops')):
            with shared_context(model, Crops('ab')):
                elsewhere(x)


def test_a_step_that_goes_on():
    model, x = host(), image()

    def step(window):
        try:
            return model(cut(x, window))
        except BaseException:
            return 'nothing'

    with torch.no_grad(), shared_context(model, Windows(0, images=2)) as over:
        with pytest.raises(WindowError, match='the step went on after'):
            over(step, grid(SIZE, (9, 10), (9, 10)))


def test_cores_that_overlap_or_leave_gaps():
    model, x = host(), image()
    windows = grid(SIZE, (9, 10), (5, 7))
    for wrong in (
        [Window(window.box, window.box) for window in windows],
        [windows[0], *windows[2:]],
    ):
        with pytest.raises(ValueError, match='every position must count once'):
            in_windows(model, x, wrong)


@torch.no_grad()
def test_a_second_ctrl_c_leaves_no_thread(monkeypatch):
    model, x = host(), image()
    windows = grid(SIZE, (9, 10), (9, 10))

    def step(window):
        if window is windows[8]:
            signal.raise_signal(signal.SIGINT)
        return model(cut(x, window))

    join, threads = threading.Thread.join, []

    def interrupted(thread):
        threads.extend(own_threads())
        monkeypatch.setattr(threading.Thread, 'join', join)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        with shared_context(model, Windows(None, images=2)) as over:
            monkeypatch.setattr(threading.Thread, 'join', interrupted)
            over(step, windows)
    assert len(threads) >= 8
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()


@pytest.mark.parametrize('budget', [None, 0.02], ids=['all', 'some'])
@torch.no_grad()
def test_nothing_is_held_after_a_failure(budget):
    """Without the help of the collector: to try again with less memory."""
    model, x, kept = host(), image(), []
    windows = grid(SIZE, (9, 10), (9, 10))

    def step(window):
        y = model[:2](cut(x, window))
        kept.append(weakref.ref(y))
        if window is windows[7]:
            raise MemoryError
        return model[2:](y)

    gc.collect()
    gc.disable()
    try:
        with shared_context(model, Windows(budget, images=2)) as over:
            try:
                over(step, windows)
            except WindowError:
                pass
        assert len(kept) > 7 and not any(each() is not None for each in kept)
    finally:
        gc.enable()


class Caching(nn.Module):
    """Keeps what it has made, for all windows of its size."""

    def __init__(self):
        super().__init__()
        self.cache = {}

    def forward(self, x):
        if x.shape not in self.cache:
            self.cache[x.shape] = torch.full_like(x, 2)
        return x * self.cache[x.shape]


@each_budget
@torch.no_grad()
def test_what_others_use_comes_back(budget):
    """Made in a window and moved away with it, but kept by a module."""
    model, x = nn.Sequential(Caching(), *host(), Caching()), image()
    windows = grid(SIZE, (9, 10), (5, 7))
    over = Windows(budget, images=2, wait_on='cpu')
    assert_near(in_windows(model, x, windows, over=over), model(x), 1e-13)
    model[0].cache.clear()
    with shared_context(model, over):
        parts = over(lambda window: model(cut(x, window)), windows)
    for each in model[0].cache.values():
        assert (each == 2).all()
    want = model(x)
    assert_near(stitch(want, windows, parts), want, 1e-13)


@each_budget
@torch.no_grad()
def test_casts_of_autocast_do_not_wait(budget):
    model, x = host(3).float(), image().float()
    model.requires_grad_()
    windows = grid(SIZE, (9, 10), (5, 7))
    over = Windows(budget, images=2, wait_on='cpu')
    with torch.autocast('cpu', torch.bfloat16), torch.enable_grad():
        if budget is None:
            want = in_windows(model, x, windows).detach()
            y = in_windows(model, x, windows, over=over).detach()
            assert torch.equal(y, want)
    with torch.autocast('cpu', torch.bfloat16):
        want = in_windows(model, x, windows)
        assert torch.equal(in_windows(model, x, windows, over=over), want)


# ------------------------------------------------------------------- nesting


@pytest.mark.parametrize('outer', BUDGETS.values(), ids=BUDGETS)
@pytest.mark.parametrize('inner', [None, 0], ids=['held', 'not held'])
@torch.no_grad()
def test_windows_of_windows(outer, inner):
    model, x = host(), image(size=(24, 30))
    windows = grid((24, 30), (12, 15), (12, 15))

    def step(window):
        part = cut(x, window)
        with shared_context(model, Windows(inner, images=2)) as over:
            small = grid((12, 15), (7, 8), (5, 7))
            results = over(lambda small: model(cut(part, small)), small)
        return stitch(part[:, :2], small, results)

    with shared_context(model, Windows(outer, images=2)) as over:
        y = stitch(x[:, :2], windows, over(step, windows))
    assert_near(y, model(x), 1e-13)
    overlapping = grid((24, 30), (12, 15), (9, 11))
    with shared_context(model, Windows(outer, images=2)) as over:
        with pytest.raises(
            WindowError, match='Windows within a Windows whose'
        ):
            over(step, overlapping)


@pytest.mark.parametrize('thread', ['same', 'another'])
def test_contexts_left_in_another_order(thread):
    model, other = host(), host()
    x, windows = image(), grid(SIZE, (9, 10), (9, 10))

    def march(model):
        model.requires_grad_(False)
        with shared_context(model, Windows(images=2)) as over:
            yield
            yield over(lambda window: model(cut(x, window)), windows)

    first, second = march(model), march(other)
    next(first)
    next(second)
    # The collector may close a generator, in any thread.
    close = first.close
    close() if thread == 'same' else run_all([close])
    want = model(x).detach()
    assert_near(stitch(want, windows, next(second)), want, 1e-13)
    second.close()
    assert is_clean(model) and is_clean(other)
    assert_near(in_windows(model, x, windows), want, 1e-13)


def test_regions_are_no_windows():
    model, x = nn.ModuleDict(dict(body=host(), roi_head=PolyNL2d(2))), image()
    model.double()

    def step(window):
        y = model['body'](cut(x, window))
        return model['roi_head'](y.repeat(5, 1, 1, 1))

    windows = grid(SIZE, (9, 10), (9, 10))
    with torch.no_grad():
        with shared_context(model, Windows(images=2)) as over:
            over(step, windows)
        with shared_context(model, Windows(images=2), exclude=()) as over:
            message = "'roi_head' is called with 10 .* a window is of 2"
            with pytest.raises(WindowError, match=message):
                over(step, windows)


def test_calls_beside_a_step_are_refused():
    model, x = host(), image()
    for over, name in ((Windows(), 'Windows'), (Frames(), 'Frames')):
        with pytest.raises(RuntimeError, match='within shared_context'):
            over(model, [])
        with shared_context(model, over):
            with pytest.raises(RuntimeError, match=rf'a step that {name} was'):
                model(x)
            with pytest.raises(RuntimeError, match='is in use already'):
                with shared_context(model, over):
                    pass
        assert is_clean(model)


def test_models_that_can_not_take_part():
    with pytest.raises(ValueError, match='Sequential has no Poly-NL layer'):
        with shared_context(nn.Sequential(nn.ReLU()), Windows()):
            pass
    model = host()
    for exclude in (['1', '4*'], '[14]'):
        with pytest.raises(ValueError, match='has no Poly-NL layer'):
            with shared_context(model, Windows(), exclude=exclude):
                pass
    with shared_context(model, Windows(), exclude='4*'):
        pass
    model[1].around = lambda layer, x: (None, None)
    with pytest.raises(RuntimeError, match="'1' has a around of its own"):
        with shared_context(model, Windows()):
            pass
    assert set(vars(model[1])) & {'around'} and is_clean(model[2:])


@pytest.mark.parametrize(
    'kind', [dict(type='BN'), dict(type='GN', num_groups=2), dict(type='IN')]
)
@pytest.mark.filterwarnings('ignore:norm_cfg')
def test_branches_normalised_by_the_window(kind):
    model = nn.Sequential(PolyNL2d(6, beta_init=0.5, norm_cfg=kind)).double()
    x = image(channels=6)
    windows = grid(SIZE, (9, 10), (5, 7))
    with pytest.raises(
        ValueError,
        match="'0' can not share its gate: its branch is normalised by a",
    ):
        in_windows(model, x, windows)
    model.eval()
    if kind['type'] == 'BN':
        model[0].norm.running_mean.normal_()
        assert_near(in_windows(model, x, windows), model(x), 1e-13)
    else:
        with pytest.raises(ValueError, match='only an evaluated BatchNorm'):
            in_windows(model, x, windows)


@pytest.mark.parametrize('how', [deepcopy, lambda m: fuse_poly_nl(m)[0]])
def test_copies_made_within_are_refused(how):
    model, x = host(), image()
    with shared_context(model, Frames()) as over:
        copied = how(model)
        with pytest.raises(RuntimeError, match='copied or fused within'):
            over(copied, x)
    assert_near(copied(x), model(x), 1e-12)


@pytest.mark.parametrize(
    'call',
    [
        lambda: grid((10, 10), (4, 4), (5, 4)),
        lambda: grid((10, 0), (4, 4), (4, 4)),
        lambda: grid((10, 9), (4, 4), (4, 0)),
        lambda: bands((10, 4), 3, multiple=8),
        lambda: Windows(-1),
        lambda: Windows(float('nan')),
        lambda: Frames(0.5),
    ],
)
def test_bad_arguments(call):
    with pytest.raises(ValueError):
        call()


# ------------------------------------------------- models, wrapped and fused


@pytest.mark.parametrize('how', ['inference', 'training'])
@torch.no_grad()
def test_fused_layers(how):
    model, x = host(), image()
    want = model(x)
    report = fuse_poly_nl(model, trainable=how == 'training')[1]
    assert len(report.fused) == 2
    windows = grid(SIZE, (9, 10), (5, 7))
    assert_near(in_windows(model, x, windows), want, 1e-12)


@torch.no_grad()
def test_layers_within_wrappers():
    model, x = ExponentialMovingAverage(host()), image()
    windows = grid(SIZE, (9, 10), (5, 7))
    assert_near(in_windows(model, x, windows), model(x), 1e-13)


def test_compiled():
    model, x = host(), image()
    compiled = torch.compile(model, backend='eager')
    windows = grid(SIZE, (9, 10), (5, 7))
    with torch.no_grad():
        want = compiled(x)
        for budget in BUDGETS.values():
            y = in_windows(compiled, x, windows, budget)
            assert_near(y, want, 1e-13)
        assert torch.equal(compiled(x), want)


@pytest.mark.parametrize('pooling', ['att', 'avg'])
@torch.no_grad()
def test_context_blocks_of_mmcv(pooling):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), ContextBlock(8, 0.5, pooling), PolyNL2d(8)
    ).double()
    for p in model.parameters():
        nn.init.normal_(p)
    x, windows = image(), grid(SIZE, (9, 10), (5, 7))
    want = model(x)
    for budget in BUDGETS.values():
        assert_near(in_windows(model, x, windows, budget), want, 1e-12)
    assert is_clean(model) and torch.equal(model(x), want)
    alone = stitch(want, windows, [model(cut(x, w)) for w in windows])
    assert (alone - want).abs().max() > 1e-2 * want.abs().max()


def run_all(calls):
    """Each in a thread, all at once."""
    results, errors = [None] * len(calls), []

    def run(k):
        try:
            with torch.no_grad():
                results[k] = calls[k]()
        except BaseException as error:
            errors.append(error)

    threads = [
        threading.Thread(target=run, args=(k,)) for k in range(len(calls))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    return results


@pytest.mark.parametrize('budget', [None, 0], ids=['held', 'not held'])
def test_images_in_flight_do_not_mix(budget):
    """One model, two images in windows, and one that is given whole."""
    model = host()
    images = [image(seed=seed) for seed in range(3)]
    with torch.no_grad():
        wants = [model(x) for x in images]
    windows = grid(SIZE, (9, 10), (5, 7))
    wait = threading.Barrier(3)

    def march(x):
        def step(window):
            if window is windows[3]:
                wait.wait()
            return model(cut(x, window))

        with shared_context(model, Windows(budget, images=2)) as over:
            return stitch(x[:, :2], windows, over(step, windows))

    def whole():
        y = []
        for _ in range(3 if budget == 0 else 1):
            wait.wait()
            y.append(model(images[2]))
        return y[-1]

    calls = [lambda: march(images[0]), lambda: march(images[1]), whole]
    for y, want in zip(run_all(calls), wants):
        assert_near(y, want, 1e-13)
    assert is_clean(model)


# --------------------------------------------------- processes, frames, crops


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


def process(rank, count, file):
    dist.init_process_group(
        'gloo', init_method=f'file://{file}', rank=rank, world_size=count
    )
    torch.manual_seed(0)
    model, x = host(), image(size=(24, 31))
    model.append(ContextBlock(2, 1.0).double())
    model[-1].channel_add_conv[-1].weight.data.normal_()
    params = list(model.parameters())
    y = model(x)
    wants = torch.autograd.grad(y.square().sum(), params)
    parts = bands(x.shape[2:], count, halo=3)
    sent, all_reduce = [], dist.all_reduce

    def counted(t, *args, **kwargs):
        sent.append(t.numel())
        return all_reduce(t, *args, **kwargs)

    dist.all_reduce = counted
    with shared_context(model, Processes(parts[rank])) as over:
        mine = model(cut(x, parts[rank]))
    core = stitch(y.detach(), [parts[rank]], [mine])
    core = core[..., slice(*parts[rank].core[1::2]), :]
    assert_near(core, y[..., slice(*parts[rank].core[1::2]), :], 1e-12)
    assert over.share == pytest.approx(1 / count)
    gots = torch.autograd.grad(core.square().sum(), params)
    dist.all_reduce = all_reduce
    # The area once; C + 1 numbers a layer and image, and as many in backward.
    layers = [2 * (8 + 1), 2 * (6 + 1), 2 * (2 + 1)]
    assert sent == [1, *layers, *reversed(layers)]
    for got in gots:
        dist.all_reduce(got)
    assert_near(flat(gots), flat(wants), 1e-12)
    # Windows of what each process holds.
    part = bands(x.shape[2:], count)[rank]
    size = (part.box[3] - part.box[1], 31)
    windows = grid(size, (4, 9), (3, 5))
    # The processes need not march alike.
    windows = windows if rank else grid(size, (8, 31), (6, 31))
    budget = None if rank else 0
    with torch.no_grad(), shared_context(model, Processes(part)):
        with shared_context(model, Windows(budget, images=2)) as over:
            parts = over(lambda w: model(cut(cut(x, part), w)), windows)
    got = stitch(cut(y, part).detach(), windows, parts)
    assert_near(got, cut(y, part).detach(), 1e-12)
    dist.barrier()
    dist.destroy_process_group()
    # Python's own end may meet a thread of gloo, see polynl_mm.engine.
    os._exit(0)


@pytest.mark.parametrize('count', [2, 4])
def test_parts_in_processes(tmp_path, count):
    mp.spawn(process, (count, tmp_path / 'group'), nprocs=count)


def test_bands():
    assert bands((64, 9), 3, halo=5, multiple=4) == [
        Window((0, 0, 9, 28), (0, 0, 9, 20)),
        Window((0, 12, 9, 52), (0, 20, 9, 44)),
        Window((0, 36, 9, 64), (0, 44, 9, 64)),
    ]


@torch.no_grad()
def test_frames_are_a_running_mean():
    model, gates, means = host()[:3], [], []
    frames = [image(seed=seed) for seed in range(7)]

    def note(layer, x):
        return (lambda g: gates.append(g) or g), None

    model[1].around = note
    alone = [model(x) for x in frames]
    for time, gate in enumerate(gates, 1):
        before = means[-1] if means else 0
        means.append(before + (gate - before) / min(time, 3))
    wants = []
    for x, mean in zip(frames, means):
        model[1].around = lambda layer, x, mean=mean: (lambda g: mean, None)
        wants.append(model(x))
    del model[1].around
    assert_near(means[2], sum(gates[:3]) / 3, 1e-13)
    with shared_context(model, Frames(horizon=3)) as over:
        for x, want in zip(frames, wants):
            assert_near(over(model, x), want, 1e-13)
        over.reset()
        assert_near(over(model, frames[4]), alone[4], 1e-13)


@torch.no_grad()
def test_all_frames_are_one_image():
    """Without a horizon the last frame has the gate of all, also by windows
    and for what counts by its own sums."""
    model = host()
    model[1] = ContextBlock(8, 1.0).double()
    model[1].channel_add_conv[-1].weight.normal_()
    model[1].conv_mask.weight.normal_()
    frame = image(size=(24, 30))
    windows = grid((24, 30), (8, 10), (8, 10))
    with shared_context(model[:3], Frames()) as over:
        for window in windows:
            y = over(model[:3], cut(frame, window))
    assert_near(y, cut(model[:3](frame), window), 1e-13)
    rows = [frame[..., :8, :], frame[..., 8:16, :], frame[..., 16:, :]]
    windows = grid((8, 30), (5, 10), (3, 8))
    with shared_context(model[:3], Frames()) as frames:
        for row in rows:
            y = frames(in_windows_alone, model[:3], row, windows)
    assert_near(y, model[:3](frame)[..., 16:, :], 1e-13)


def in_windows_alone(model, x, windows):
    with shared_context(model, Windows(images=len(x))) as over:
        parts = over(lambda window: model(cut(x, window)), windows)
    return stitch(x.new_empty(len(x), 8, *x.shape[2:]), windows, parts)


def test_frames_that_fail_do_not_count():
    model, x = host(), image()
    with torch.no_grad(), shared_context(model, Frames()) as over:
        over(model, x)
        want = over(model, 2 * x)
    with torch.no_grad(), shared_context(model, Frames()) as over:
        over(model, x)
        for step, message in (
            (lambda x: model(3 * x)[:, 9], 'out of bounds'),
            (lambda x: model[:3](x), "this frame did not go through '4'"),
            (lambda x: model(x[:1]), "'1' with .1, 8. was not in the frames"),
        ):
            with pytest.raises((IndexError, RuntimeError), match=message):
                over(step, x)
        assert_near(over(model, 2 * x), want, 1e-15)


def backward(loss, ended):
    try:
        loss.backward()
    finally:
        ended.set()


@pytest.mark.parametrize('how', ['plain', 'checkpointed', 'on a GPU'])
def test_crops_of_images_in_a_batch(how):
    model, first, second = host(), image(1, seed=1), image(1, seed=2)
    crops = [
        first[..., :9, :10],
        second[..., 9:18, :10],
        first[..., 9:18, 21:],
        first[..., 2:11, 5:15],
    ]
    names = ['a', 'b', 'a', 'a']
    params = list(model.parameters())

    # Side by side, the crops of an image are an image.
    def row(name):
        picked = [c for c, of in zip(crops, names) if of == name]
        return model(torch.cat(picked, 3)).split(10, 3)

    rows = {name: iter(row(name)) for name in 'ab'}
    want = torch.cat([next(rows[name]) for name in names])
    wants = torch.autograd.grad(want.square().sum(), params)
    with shared_context(model, Crops(names)):
        if how == 'plain':
            y = model(torch.cat(crops))
        else:
            x = torch.cat(crops)
            y = checkpoint(model, x, use_reentrant=False)
        loss = y.square().sum()
        if how == 'on a GPU':
            # There a thread of autograd's computes again.
            ended = threading.Event()
            _thread.start_new_thread(backward, (loss, ended))
            ended.wait()
            gots = [p.grad for p in params]
        else:
            gots = torch.autograd.grad(loss, params)
    assert_near(y, want, 1e-13)
    assert_near(flat(gots), flat(wants), 1e-13)


def test_crops_of_context_blocks():
    torch.manual_seed(0)
    model = nn.Sequential(ContextBlock(3, 1.0)).double()
    for p in model.parameters():
        nn.init.normal_(p)
    x = image(3)
    want = torch.cat(model(torch.cat([x[:1], x[2:]], 3)).split(31, 3))
    with shared_context(model, Crops([7, 8, 7])):
        y = model(x)
    assert_near(y[::2], want, 1e-13)
    assert_near(y[1:2], model(x[1:2]), 1e-13)


def test_crops_of_another_batch():
    model, over = host(), Crops('ab')
    with shared_context(model, over):
        with pytest.raises(RuntimeError, match=r"'1' is .* with 3 .* has 2"):
            model(image(3))
        over.images = 'aba'
        model(image(3))


def test_maps_of_a_coarse_stride():
    """A strided convolution whose windows begin at its own multiples."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 4, 4), PolyNL2d(8, beta_init=1.0)
    ).double()
    x = image(size=(24, 32))
    windows = grid((24, 32), (12, 16), (8, 8))
    with torch.no_grad(), shared_context(model, Windows(images=2)) as over:
        parts = over(lambda window: model(cut(x, window)), windows)
        large = [interpolate(part, scale_factor=4) for part in parts]
    want = interpolate(model(x), scale_factor=4)
    assert_near(stitch(want, windows, large), want.detach(), 1e-13)
