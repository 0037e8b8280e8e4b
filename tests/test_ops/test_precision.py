"""In which precision the operation runs, and its gradient."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    BEHIND,
    FORMS,
    NAMES,
    OLD_TORCH,
    behind,
    gradients,
    make_inputs,
    make_pair,
    on_x,
)
from torch import nn

from polynl_mm.ops import precision
from polynl_mm.ops.precision import matmul, policy, switches

DOORS = {'on X': on_x, 'behind': behind}
each_door = pytest.mark.parametrize('door', DOORS)
both_forms = pytest.mark.parametrize('form', FORMS)


def inputs_of(door, dtype=torch.float32, seed=0):
    if door == 'behind':
        return make_pair((2, 16, 9, 20), 24, True, dtype, seed)
    return make_inputs((2, 24, 9, 20), True, dtype, seed)


@both_forms
@each_door
def test_backward_does_not_see_autocast(form, door, device):
    """mm calls backward within autocast under gradient checkpointing."""
    inputs = inputs_of(door)
    y = DOORS[door](*inputs, form=form)
    dy = torch.randn_like(y)
    wants = gradients(y, inputs, dy)
    y = DOORS[door](*inputs, form=form)
    with torch.autocast(device, dtype=torch.bfloat16):
        gots = gradients(y, inputs, dy)
    assert gots.keys() == set(BEHIND if door == 'behind' else NAMES)
    for name, want in wants.items():
        assert torch.equal(gots[name], want), name


@each_door
def test_float64_is_left_alone_by_autocast(door, device):
    inputs = inputs_of(door, torch.float64)
    y = DOORS[door](*inputs)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(DOORS[door](*inputs), y)


def formula(z, *params):
    """The paper's formula in plain PyTorch, by modules that autocast knows."""
    if len(params) > 8:
        a, b, *params = params
        z = nn.functional.conv2d(z, a[..., None, None], b)
    w1, w2, w3, alpha, beta, b1, b2, b3 = params
    u, v = (
        nn.functional.conv2d(z, w[..., None, None], b)
        for w, b in ((w1, b1), (w2, b2))
    )
    gated = (u * v).mean((2, 3), keepdim=True) * z
    return alpha * z + beta * nn.functional.conv2d(
        gated, w3[..., None, None], b3
    )


@pytest.mark.parametrize('autocast', [False, True], ids=['plain', 'autocast'])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
@both_forms
@each_door
def test_at_most_twice_the_error_of_the_formula(
    door, form, dtype, autocast, device
):
    """Against float64, in value and in every gradient."""
    if OLD_TORCH and device == 'cpu' and dtype == torch.float16:
        pytest.skip('this torch has no float16 on a CPU')
    forms = (formula, lambda *args: DOORS[door](*args, form=form))
    totals = [0, 0, 0]
    for seed in range(8):  # one number, as beta's gradient, may be lucky
        low = [t.detach().to(dtype) for t in inputs_of(door, seed=seed)]
        exact = [t.double().requires_grad_() for t in low]
        truth = formula(*exact)
        generator = torch.Generator().manual_seed(seed)
        dy = torch.randn(truth.shape, generator=generator, device='cpu')
        dy = dy.to(truth.device, dtype) / 16
        wants = everything(truth, exact, dy.double())
        totals[0] = totals[0] + torch.stack([w.norm() for w in wants]) ** 2
        for k, run in enumerate(forms, 1):
            stored = torch.float32 if autocast else dtype
            inputs = [t.to(stored).requires_grad_() for t in low]
            with torch.autocast(device, dtype=dtype, enabled=autocast):
                y = run(*inputs)
            gots = everything(y, inputs, dy.to(y.dtype))
            errors = [(g - w).norm() for g, w in zip(gots, wants)]
            totals[k] = totals[k] + torch.stack(errors) ** 2
    # Half a unit in the last place is what anybody has.
    least = torch.finfo(dtype).eps / 4 * totals[0].sqrt()
    plain, ours = (t.sqrt() for t in totals[1:])
    ratios = ours / plain.maximum(least)
    names = ('y', *(BEHIND if door == 'behind' else NAMES))
    assert ratios.max() <= 2, dict(zip(names, ratios.tolist()))


def everything(y, inputs, dy):
    return [t.double() for t in (y, *gradients(y, inputs, dy).values())]


@pytest.mark.parametrize(
    'dtype, size',
    [
        (torch.float16, 15e3),
        (torch.float16, 6e4),
        (torch.bfloat16, 1e25),
        (torch.float32, 1e25),
    ],
    ids=str,
)
@both_forms
@each_door
def test_identity_of_features_whose_gate_overflows(
    door, form, dtype, size, device
):
    """At beta = 0, where 0 times infinity would be NaN."""
    low = [t.detach().to(dtype) for t in inputs_of(door)]
    low[-5].fill_(1)
    low[-4].fill_(0)
    low[0] = low[0].sign() * size
    want, finest = low[0], 0
    if door == 'behind':
        low[1][:], finest = torch.eye(24, 16), torch.finfo(dtype).eps
        want = nn.functional.pad(want, (0, 0, 0, 0, 0, 8))
        want = want + low[2][:, None, None]
    for requires_grad in (False, True):
        inputs = [t.clone().requires_grad_(requires_grad) for t in low]
        y = DOORS[door](*inputs, form=form)
        torch.testing.assert_close(y, want, rtol=finest, atol=finest)


def test_product():
    one, batch = torch.randn(3, 4), torch.randn(2, 4, 5)
    for a, b in ((one, batch), (torch.randn(2, 3, 4), batch), (one, batch[0])):
        torch.testing.assert_close(matmul(a, b), a @ b)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_product_of_low_precision_is_float32(dtype):
    a = torch.full((1, 2, 300), 300.0).to(dtype)
    y = matmul(a, a.transpose(1, 2))
    assert y.dtype == torch.float32
    # Beyond float16, and each term with all its digits.
    assert (y == 300 * 300.0**2).all()


# Capability of the device, the switch of convolutions; in what the products
# with features and the algebra run.
POLICY = """
bfloat16 None    no  | ieee ieee
bfloat16 None    yes | ieee ieee
bfloat16 (7, 5)  no  | ieee ieee
bfloat16 (7, 5)  yes | ieee ieee
bfloat16 (8, 0)  no  | ieee tf32
bfloat16 (8, 0)  yes | ieee tf32
float32  None    no  | ieee ieee
float32  None    yes | ieee ieee
float32  (7, 5)  no  | ieee ieee
float32  (7, 5)  yes | ieee ieee
float32  (8, 0)  no  | ieee ieee
float32  (8, 0)  yes | tf32 tf32
float64  None    no  | ieee ieee
float64  None    yes | ieee ieee
float64  (7, 5)  no  | ieee ieee
float64  (7, 5)  yes | ieee ieee
float64  (8, 0)  no  | ieee ieee
float64  (8, 0)  yes | ieee ieee
"""


def test_policy():
    lines = []
    for name in ('bfloat16', 'float32', 'float64'):
        for capability in (None, (7, 5), (8, 0)):
            for allowed, answer in ((False, 'no'), (True, 'yes')):
                found = policy(getattr(torch, name), capability, allowed)
                lines.append(
                    f'{name:8} {capability!s:7} {answer:3} | '
                    f'{found.products} {found.algebra}'
                )
    assert lines == POLICY.split('\n')[1:-1]


@pytest.mark.parametrize('capability', [None, (7, 5), (8, 0), (12, 0)])
@pytest.mark.parametrize('allowed', [False, True])
def test_policy_of_float16_and_later_devices(capability, allowed):
    found = policy(torch.float16, capability, allowed)
    assert found == policy(torch.bfloat16, capability, allowed)
    if capability == (12, 0):
        found = policy(torch.float32, capability, allowed)
        assert found == policy(torch.float32, (8, 0), allowed)


# How switches are set, and whether convolutions and products then are in TF32.
OLDER = [
    ('', True, False),
    ('cudnn.allow_tf32 = False', False, False),
    ('cuda.matmul.allow_tf32 = True', True, True),
    ('cudnn.allow_tf32 = False; cuda.matmul.allow_tf32 = True', False, True),
    ('ask_for("high")', True, True),
    ('ask_for("medium")', True, True),
    ('ask_for("medium"); ask_for("highest")', True, False),
]
# torch >= 2.9. At most of these the older ones raise when they are read.
NEWER = [
    ('all.fp32_precision = "tf32"', True, True),
    ('cudnn.fp32_precision = "tf32"', True, True),
    ('cudnn.conv.fp32_precision = "ieee"', False, False),
    ('cudnn.conv.fp32_precision = "none"', False, False),
    ('all.fp32_precision = cudnn.conv.fp32_precision = "tf32"', True, True),
    (
        'all.fp32_precision = "ieee"; cudnn.conv.fp32_precision = "tf32"',
        *(True, False),
    ),
    ('cuda.matmul.fp32_precision = "tf32"', True, True),
    # Of both kinds: what was set last holds.
    (
        'cudnn.allow_tf32 = False; cudnn.conv.fp32_precision = "tf32"',
        *(True, False),
    ),
    (
        'cudnn.conv.fp32_precision = "ieee"; cudnn.allow_tf32 = True',
        *(True, False),
    ),
    (
        'cuda.matmul.allow_tf32 = True; cuda.matmul.fp32_precision = "ieee"',
        *(True, False),
    ),
    ('cuda.matmul.fp32_precision = "tf32"; ask_for("highest")', True, False),
]
# Where convolutions follow what stands above them: 2.11 does not, 2.13 does.
FOLLOWED = [
    ('all.fp32_precision = "ieee"', False, False),
    ('cudnn.fp32_precision = "ieee"', False, False),
    (
        'cuda.matmul.fp32_precision = "tf32"; cudnn.fp32_precision = "ieee"',
        *(False, True),
    ),
]
READ = """
import os, sys, warnings
import torch
from polynl_mm.ops.precision import switches
all, cudnn, cuda = torch.backends, torch.backends.cudnn, torch.backends.cuda
ask_for = torch.set_float32_matmul_precision
for line in sys.stdin.read().split(chr(10)):
    if not os.fork():
        exec(line)
        warnings.simplefilter('error')
        try:
            print(line, *switches(), sep=' | ', flush=True)
        finally:
            os._exit(0)
    os.wait()
"""


def test_switches():
    """Each in a process of its own: what was set can not be undone."""
    settings = OLDER
    if hasattr(torch.backends, 'fp32_precision'):
        settings = OLDER + NEWER
        if torch.__version__ >= '2.13':
            settings = settings + FOLLOWED
    found = subprocess.run(
        [sys.executable, '-c', READ],
        input='\n'.join(line for line, _, _ in settings),
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert not found.stderr
    wants = [' | '.join(map(str, setting)) for setting in settings]
    assert found.stdout.splitlines() == wants


def test_a_program_takes_the_default(monkeypatch):
    monkeypatch.setattr(precision, '_allows_tf32', lambda *_: None)
    assert switches() == (None, None)
    monkeypatch.setattr(precision, 'is_recorded', lambda: True)
    assert switches() == (True, False)


def test_older_torch(monkeypatch):
    backends = SimpleNamespace(
        cudnn=SimpleNamespace(allow_tf32=False),
        cuda=SimpleNamespace(matmul=SimpleNamespace(allow_tf32=True)),
    )
    monkeypatch.setattr(torch, 'backends', backends)
    assert switches() == (False, True)


@pytest.mark.parametrize(
    'change, dtype, expected',
    [
        ({}, torch.float16, True),
        ({}, torch.bfloat16, True),
        ({}, torch.float32, True),
        ({}, torch.float64, False),
        (dict(_HAS_TRITON=False), torch.bfloat16, False),
        (dict(HAS_CUBLAS=False), torch.bfloat16, False),
        (dict(_capability=lambda device: (7, 5)), torch.bfloat16, False),
        (dict(_capability=lambda device: None), torch.bfloat16, False),
        (dict(switches=lambda: (False, True)), torch.bfloat16, True),
        (dict(switches=lambda: (False, False)), torch.float32, False),
        # Where torch's products would run in what convolutions may not.
        (dict(switches=lambda: (False, True)), torch.float32, True),
        (dict(switches=lambda: (False, True)), torch.float64, False),
    ],
)
def test_who_has_kernels(change, dtype, expected, monkeypatch):
    card = dict(
        _HAS_TRITON=True,
        HAS_CUBLAS=True,
        _capability=lambda device: (9, 0),
        switches=lambda: (True, False),
    )
    for name, value in {**card, **change}.items():
        monkeypatch.setattr(precision, name, value)
    monkeypatch.setattr(torch.version, 'hip', None)
    x = SimpleNamespace(dtype=dtype, device=torch.device('cuda', 0))
    assert precision.has_kernels(x) == expected
    monkeypatch.setattr(torch.version, 'hip', '6.4')  # an AMD card
    assert not precision.has_kernels(x)
    assert not precision.has_kernels(torch.ones(1, 2, 3, device='cpu'))
