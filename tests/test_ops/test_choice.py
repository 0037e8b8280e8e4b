"""What each form costs, and which is taken."""

import pytest
import torch
from helpers import (
    behind,
    count_flops,
    make_inputs,
    make_pair,
    nodes_of,
    on_x,
    projected,
)
from torch.utils._python_dispatch import TorchDispatchMode

from polynl_mm.ops import choice, poly_nl_behind
from polynl_mm.ops.choice import BEHIND, ON_X, Form, choose, cost, rate_of

each_form = pytest.mark.parametrize('form', ON_X + BEHIND, ids=str)
each_way = pytest.mark.parametrize('backward', [False, True])

# Nothing is computed in them.
VIEWS = {
    '_unsafe_view',
    'alias',
    'detach',
    'diagonal',
    'expand',
    'new_empty',
    'select',
    'slice',
    'squeeze',
    't',
    'transpose',
    'unsqueeze',
    'view',
}


class Launches(TorchDispatchMode):
    """What reaches the device."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        if f.overloadpacket.__name__ not in VIEWS:
            self.names.append(f.overloadpacket.__name__)
        return f(*args, **(kwargs or {}))


def runner(form, n, c, out, backward, images=1):
    """A function that computes a form with all gradients, or its forward."""
    dtype = dict(dtype=torch.float32)
    if form.behind:
        inputs = make_pair((images, c, n), out, **dtype)
    else:
        inputs = make_inputs((images, out, n), **dtype)
    door = behind if form.behind else on_x
    if backward:
        dy = torch.randn(images, out, n)
        return lambda: door(*inputs, form=form.name).backward(dy)
    inputs = [t if t is None else t.detach() for t in inputs]
    if form.behind:  # the projections are made once and for all
        args = projected(*inputs)
        return lambda: poly_nl_behind(*args, form=form.name)
    return lambda: on_x(*inputs, form=form.name)


@each_way
@each_form
def test_multiply_adds_are_those_counted(form, backward):
    c, out, vectors = 16, 24, 0
    for n in (40, 400):
        macs = count_flops(runner(form, n, c, out, backward))[0] // 2
        found = cost(form, c if form.behind else None, out, backward)
        want = n * (found.convolutions + found.products) + found.algebra
        if form.behind:  # products with the shift b and with the mean
            vectors = 20 * out**2
        assert want <= macs <= want + vectors
        # They run as what they are said to be.
        assert (found.products > 0) == (form.name == 'gram')
        assert (found.temporaries > 0) == (form.name == 'direct')


@each_way
@each_form
def test_launches_are_those_counted(form, backward):
    run = runner(form, 40, 16, 24, backward, images=2)
    with Launches() as counter:
        run()
    found = cost(form, 16 if form.behind else None, 24, backward)
    assert len(counter.names) == found.launches, counter.names


@each_way
def test_a_convolution_before_costs_what_it_does(backward):
    c, out = 16, 24
    for form in ON_X:
        alone, pair = (cost(form, k, out, backward) for k in (None, c))
        more = pair.convolutions - alone.convolutions
        assert more == (3 if backward else 1) * c * out
        assert pair._replace(convolutions=alone.convolutions) == alone


@each_way
@pytest.mark.parametrize('c', [64, 256, 512, 1024, 2048])
def test_one_crossing(c, backward):
    def name(n):
        return choose(ON_X, n, None, c, backward).name

    assert name(16 * c) == name(None) == 'gram'
    assert name(max(c // 64, 1)) == 'direct'
    forms = [name(n) for n in range(1, 4 * c, c // 16)]
    # More positions never bring direct back.
    assert forms == sorted(forms)


@pytest.mark.parametrize(
    'n, c, out, training, inference',
    [
        (10, 64, 256, False, True),
        (60, 64, 256, False, True),
        (120, 64, 256, True, True),
        (100, 64, 64, False, False),
        (2000, 64, 64, False, True),
        (4000, 64, 64, True, True),
        (None, 64, 48, True, True),
        (None, 64, 44, True, False),
        (None, 64, 32, False, False),
    ],
)
def test_when_the_narrow_side_pays(n, c, out, training, inference):
    for backward, pays in ((True, training), (False, inference)):
        form = choose(BEHIND + ON_X, n, c, out, backward)
        assert form.behind == pays


@each_way
@pytest.mark.parametrize('c, out', [(8, 32), (12, 24), (16, 16), (64, 256)])
def test_the_cheapest_is_taken(c, out, backward):
    """By the table itself, at every size; each of the forms somewhere."""
    rate, taken = rate_of('cpu', torch.float32), set()
    for n in (1, 10, 40, 100, 300, 1000, 10**5, 10**6):
        times = {}
        for form in BEHIND + ON_X:
            found = cost(form, c, out, backward)
            times[form] = (
                n * (found.convolutions + found.products) * rate.product
                + n * found.temporaries * 4 * rate.byte
                + found.algebra * rate.algebra
                + found.launches * rate.launch
            )
        chosen = choose(BEHIND + ON_X, n, c, out, backward)
        assert times[chosen] == min(times.values())
        taken.add(chosen)
    assert Form('gram', behind=True) in taken and len(taken) > 1


def test_on_a_gpu():
    """As measured there: one layer, forward and backward, few positions."""

    def name(n, c, dtype, images=2):
        rate = rate_of('cuda', dtype)
        args = rate, dtype.itemsize, images
        return choose(ON_X, n, None, c, True, *args).name

    # float32: convolutions run in TF32 and products do not.
    assert name(67200, 256, torch.float32) == 'direct'
    assert name(1050, 2048, torch.float32) == 'direct'
    assert name(1050, 2048, torch.bfloat16) == 'direct'
    assert name(67200, 256, torch.bfloat16) == 'gram'
    allowed = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = True
        assert name(67200, 256, torch.float32) == 'gram'
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


def test_more_images_share_the_launches():
    rate = rate_of('cuda', torch.bfloat16)
    times = [
        choose(BEHIND + ON_X, 1100, 64, 256, True, rate, 2, images)
        for images in (1, 100000)
    ]
    assert times[0] == Form('direct') and times[1].behind


def test_auto_follows_the_choice(monkeypatch):
    inputs = make_inputs((2, 5, 7, 3), dtype=torch.float32)
    pair = make_pair((2, 4, 7, 3), 6, dtype=torch.float32)
    asked = []

    def choose(forms, n, c, out, backward, rate, itemsize, images):
        asked.append((forms, n, c, out, backward, itemsize, images))
        return forms[1 if backward else 0]

    monkeypatch.setattr(choice, 'choose', choose)
    moments = '_GateOfBackward'
    assert moments not in nodes_of(on_x(*inputs))
    assert moments not in nodes_of(behind(*pair))
    with torch.no_grad():
        flops = count_flops(on_x, *inputs)[0] / 2
        assert flops == 2 * (2 * 21 * 5**2 + 5**3)
        behind(*pair)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            on_x(*inputs)
    shapes = {ON_X: (21, None, 5), BEHIND: (21, 4, 6)}
    wants = [(ON_X, True, 4), (BEHIND, True, 4)]
    wants += [(ON_X, False, 4), (BEHIND, False, 4), (ON_X, False, 2)]
    assert asked == [(f, *shapes[f], back, size, 2) for f, back, size in wants]
