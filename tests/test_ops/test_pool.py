"""One gate for several calls, and weights of positions."""

import os
from itertools import product

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import (
    BEHIND,
    FORMS,
    NAMES,
    assert_all_near,
    assert_near,
    behind,
    count_flops,
    gradients,
    make_inputs,
    make_pair,
    on_x,
)

DOORS = {'on X': on_x, 'behind': behind}
each_door = pytest.mark.parametrize('door', DOORS)
both_forms = pytest.mark.parametrize('form', FORMS)
each_bias = pytest.mark.parametrize('bias', [False, True])

WIDTH, PARTS = 10, (slice(0, 3), slice(3, 10))


def whole(door, bias=True):
    """Inputs of an image of 6 x 10, and a gradient of its output."""
    if door == 'behind':
        inputs = make_pair((2, 4, 6, WIDTH), 7, bias)
    else:
        inputs = make_inputs((2, 7, 6, WIDTH), bias)
    generator = torch.Generator().manual_seed(9)
    dy = torch.randn(2, 7, 6, WIDTH, generator=generator, device='cpu')
    return inputs, dy.to(inputs[0])


class Summed(torch.autograd.Function):
    """Sum over processes, which is its own adjoint."""

    @staticmethod
    def forward(ctx, t):
        t = t.clone()
        dist.all_reduce(t)
        return t

    @staticmethod
    def backward(ctx, dt):
        return Summed.apply(dt)


def process(rank, file):
    """A part of the image, whose gate is the mean over all parts."""
    dist.init_process_group(
        'gloo',
        init_method=f'file://{file}',
        rank=rank,
        world_size=len(PARTS),
    )
    for case in product(DOORS, FORMS, (False, True)):
        try:
            check_part(rank, *case)
        except AssertionError as error:
            raise AssertionError(f'{case}: {error}') from error
    dist.barrier()
    dist.destroy_process_group()
    # Python's own end may meet a thread of gloo, see polynl_mm.engine.
    os._exit(0)


def check_part(rank, door, form, bias):
    inputs, dy = whole(door, bias)
    truth = DOORS[door](*inputs, form='direct')
    wants = gradients(truth, inputs, dy)
    share = (PARTS[rank].stop - PARTS[rank].start) / WIDTH
    part = [t if t is None else t.detach().requires_grad_() for t in inputs]
    part[0] = inputs[0].detach()[..., PARTS[rank]].requires_grad_()

    def pool(g):
        return Summed.apply(g * share)

    y = DOORS[door](*part, form=form, pool=pool)
    assert_near(y, truth[..., PARTS[rank]], 1e-12)
    gots = gradients(y, part, dy[..., PARTS[rank]])
    for name, got in gots.items():
        if name in ('x', 'h'):
            wants[name] = wants[name][..., PARTS[rank]]
        else:
            dist.all_reduce(got)
    assert_all_near(gots, wants, 1e-12)


def test_unequal_parts_in_two_processes(tmp_path):
    mp.spawn(process, (tmp_path / 'group',), nprocs=len(PARTS))


@both_forms
@each_door
def test_parts_in_one_graph(door, form):
    """Windows of one image, trained together: autograd sees the pool."""
    inputs, dy = whole(door)
    truth = DOORS[door](*inputs, form='direct')
    gates = {}

    def note(part):
        def pool(g):
            gates[part] = g
            return g

        return pool

    def pooled(g):
        return sum(
            gates[k] * ((p.stop - p.start) / WIDTH)
            for k, p in enumerate(PARTS)
        )

    def run(k, pool):
        x = inputs[0][..., PARTS[k]]
        return DOORS[door](x, *inputs[1:], form=form, pool=pool)

    for k in range(len(PARTS)):
        run(k, note(k))
    y = torch.cat([run(k, pooled) for k in range(len(PARTS))], -1)
    assert_near(y, truth, 1e-12)
    assert_all_near(
        gradients(y, inputs, dy), gradients(truth, inputs, dy), 1e-11
    )


@both_forms
@each_door
def test_pool_is_given_the_gate_once(door, form):
    inputs, _ = whole(door)
    seen = []

    def pool(g):
        assert not torch.is_autocast_enabled('cpu')
        seen.append((tuple(g.shape), g.dtype))
        return g

    y = DOORS[door](*inputs, form=form, pool=pool)
    assert torch.equal(y, DOORS[door](*inputs, form=form))
    floats = [None if t is None else t.float() for t in inputs]
    with torch.autocast(inputs[0].device.type, torch.bfloat16):
        DOORS[door](*floats, form=form, pool=pool)
    assert seen == [((2, 7), torch.float64), ((2, 7), torch.float32)]


@pytest.mark.parametrize(
    'pool, message',
    [
        (lambda g: g[:1], r'float64 of shape \(2, 7\), got .*\(1, 7\)'),
        (lambda g: g.float(), 'got torch.float32'),
        (lambda g: None, 'got None'),
    ],
)
def test_bad_pool_is_named(pool, message):
    inputs, _ = whole('on X')
    with pytest.raises(ValueError, match=f'^pool must return .*{message}'):
        on_x(*inputs, pool=pool)


# ------------------------------------------------------------------ weights


def some_weights(images=2):
    generator = torch.Generator().manual_seed(8)
    shape = (images, 6, WIDTH)
    weights = torch.rand(shape, generator=generator, device='cpu') + 0.1
    weights[..., 7:] = 0
    return weights.to(torch.empty(0).device).double()


def weighted_loop(door, inputs, weights):
    """Copies of a position stand for its weight: 2 counts as two of it."""
    x = inputs[0].flatten(2)
    counts = weights.flatten(1).long()
    images = []
    for image, count in zip(x, counts):
        more = image.repeat_interleave(count, dim=1)
        gates = []

        def keep(g, gates=gates):
            gates.append(g)
            return g

        DOORS[door](more[None], *inputs[1:], form='direct', pool=keep)
        y = DOORS[door](
            image[None],
            *inputs[1:],
            form='direct',
            pool=lambda g, gates=gates: gates[0],
        )
        images.append(y)
    return torch.cat(images).unflatten(2, inputs[0].shape[2:])


@each_bias
@both_forms
@each_door
@pytest.mark.parametrize('dtype', [torch.long, torch.float64, torch.float16])
def test_weights_count_positions(door, form, bias, dtype):
    inputs, dy = whole(door, bias)
    weights = (some_weights() * 3.9).long()
    assert set(weights.unique().tolist()) == {0, 1, 2, 3, 4}
    truth = weighted_loop(door, inputs, weights)
    plain = DOORS[door](*inputs)
    assert (truth - plain).norm() > 1e-2 * plain.norm()
    y = DOORS[door](*inputs, form=form, weights=weights.to(dtype))
    assert_near(y, truth, 1e-12)
    assert_all_near(
        gradients(y, inputs, dy), gradients(truth, inputs, dy), 1e-11
    )


@both_forms
@each_door
def test_any_scale_and_one_for_all_images(door, form):
    inputs, _ = whole(door)
    weights = some_weights(images=1)
    run = DOORS[door]
    y = run(*inputs, form=form, weights=weights)
    for other in (weights * 1e-30, weights * 7e20, weights.expand(2, -1, -1)):
        assert_near(run(*inputs, form=form, weights=other), y, 1e-12)
    equal = torch.full((1, 6, WIDTH), 0.3)
    y = run(*inputs, form=form, weights=equal)
    assert_near(y, run(*inputs, form=form), 1e-12)


@both_forms
@each_door
def test_mask_is_padding(door, form):
    """What is masked has no influence, be it as large as it will."""
    inputs, _ = whole(door)
    mask = torch.ones(2, 6, WIDTH, dtype=torch.bool)
    mask[..., 6:] = False
    run = DOORS[door]
    cut = [inputs[0][..., :6].contiguous(), *inputs[1:]]
    want = run(*cut, form=form)
    padded = torch.where(mask[:, None], inputs[0], 1e3)
    y = run(padded, *inputs[1:], form=form, weights=mask)
    assert_near(y[..., :6], want, 1e-12)


@both_forms
@each_door
def test_an_image_without_any_weight_has_no_gate(door, form):
    inputs, dy = whole(door)
    weights = some_weights()
    weights[1] = 0
    gates = []
    y = DOORS[door](
        *inputs,
        form=form,
        weights=weights,
        pool=lambda g: gates.append(g) or g,
    )
    assert (gates[0][0] != 0).all() and (gates[0][1] == 0).all()
    assert y.isfinite().all()
    for got in gradients(y, inputs, dy).values():
        assert got.isfinite().all()


@both_forms
@each_door
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_weights_in_low_precision(door, form, dtype):
    inputs, _ = whole(door)
    weights = some_weights()
    floats = [None if t is None else t.detach().float() for t in inputs]
    truth = DOORS[door](*inputs, weights=weights)
    with torch.autocast(inputs[0].device.type, dtype):
        y = DOORS[door](*floats, form=form, weights=weights.float())
    tolerance = {torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    assert_near(y, truth.detach(), tolerance)


@both_forms
@each_door
@pytest.mark.parametrize('scale', [1e-300, 1e300])
def test_scales_beyond_float32(door, form, scale):
    inputs, _ = whole(door)
    inputs = [None if t is None else t.detach().float() for t in inputs]
    want = DOORS[door](*inputs, form=form, weights=some_weights())
    y = DOORS[door](*inputs, form=form, weights=some_weights() * scale)
    assert_near(y, want, 1e-6)


@both_forms
@each_door
def test_negative_weights_are_seen(door, form):
    inputs, _ = whole(door)
    weights = some_weights()
    weights[0, 0, 0] = -1e-3
    y = DOORS[door](*inputs, form=form, weights=weights)
    assert y[0].isnan().all() and y[1].isfinite().all()


@both_forms
@each_door
def test_one_position_of_many_counts_in_float16(door, form):
    """N times the mean, which float16 could not hold beside x."""
    inputs, _ = whole(door)
    generator = torch.Generator().manual_seed(1)
    channels = inputs[0].shape[1]
    x = torch.randn((1, channels, 96, 96), generator=generator, device='cpu')
    x = (x * 30).to(inputs[0].device).half().requires_grad_()
    low = [None if t is None else t.detach().half() / 30 for t in inputs[1:]]
    weights = torch.zeros(1, 96, 96)
    weights[0, 0, 0] = 1
    y = DOORS[door](x, *low, form=form, weights=weights)
    (dx,) = torch.autograd.grad(y.float().mean(), x)
    assert y.isfinite().all() and dx.isfinite().all()
    exact = [None if t is None else t.double() for t in (x.detach(), *low)]
    truth = DOORS[door](*exact, form='direct', weights=weights)
    assert_near(y, truth, 1e-2)


@both_forms
@each_door
def test_no_weights_cost_nothing(door, form):
    inputs, _ = whole(door)
    inputs = [t if t is None else t.detach() for t in inputs]
    weights = some_weights()
    run = DOORS[door]
    without = count_flops(lambda: run(*inputs, form=form))[0]
    assert (
        without
        == count_flops(lambda: run(*inputs, form=form, weights=weights))[0]
    )


@pytest.mark.parametrize(
    'weights',
    [
        torch.ones(2, 6),
        torch.ones(2, 1, 6, WIDTH),
        torch.ones(3, 6, WIDTH),
        torch.ones(2, WIDTH, 6),
        torch.ones(2, 6, WIDTH, dtype=torch.complex64),
        [[1.0]],
    ],
    ids=lambda w: str(getattr(w, 'shape', w)),
)
def test_bad_weights_are_named(weights):
    inputs, _ = whole('on X')
    message = r'^weights must be .*\(2, 6, 10\) or \(1, 6, 10\)'
    with pytest.raises(ValueError, match=message):
        on_x(*inputs, weights=weights)


def test_names_are_those_of_the_doors():
    assert NAMES[1:] == BEHIND[3:]
