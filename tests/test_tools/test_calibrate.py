"""Rates for another machine: from times to what choice.py holds."""

import subprocess
import sys
from pathlib import Path

import h100
import pytest
import torch
from benchmarks import calibrate
from benchmarks.calibrate import Case, fit, least_squares

from polynl_mm.ops import choice
from polynl_mm.ops.choice import ON_X, Form, Rate, cost

ROOT = Path(__file__).parents[2]


def case_of(form, c, n, images, rate, itemsize):
    taken = cost(form, None, c, True, rate.lean)
    time = n * taken.convolutions * rate.convolution
    time += n * taken.products * rate.product
    time += n * taken.temporaries * itemsize * rate.byte
    time += taken.algebra * rate.algebra
    time = images * time + taken.launches * rate.launch
    return Case(form, c, n, time * 1e-12, images)


@pytest.mark.parametrize(
    'rate, byte',
    [
        (Rate(11, 7, 13, 160, 4e6), None),
        (Rate(11, 0, 13, 160, 4e6), None),
        (Rate(2.5e-3, 2.5e-3, 27e-3, 0.33, 4e6, lean=True), 0.33),
    ],
)
def test_rates_are_found(rate, byte):
    sizes = [(c, n, b) for c in (64, 256) for n in (99, 4096) for b in (1, 3)]
    cases = [case_of(f, *s, rate, 2) for s in sizes for f in ON_X]
    found = fit(cases, 2, rate.launch, byte, rate.lean)
    assert found.rate[:5] == pytest.approx(rate[:5], abs=1e-9)
    assert found.rate.lean == rate.lean
    assert found.off < 1e-6 and found.loss == 1


def test_what_does_not_fit_is_told():
    rate = Rate(11, 7, 13, 160, 4e6)
    cases = [case_of(f, 64, n, 1, rate, 4) for n in (9, 99) for f in ON_X]
    cases += [case_of(f, 64, 10**5, 1, rate, 4) for f in ON_X]
    worse = cases[-2]._replace(seconds=3 * cases[-1].seconds)
    found = fit([*cases[:-2], worse, cases[-1]], 4, 4e6, None, False)
    assert found.off > 0.1


def test_least_squares_are_not_negative():
    a = torch.tensor([[1.0, 2, 0], [1, 1, 0], [0, 3, 1]]).double()
    x = torch.tensor([3.0, 0.5, 2]).double()
    assert least_squares(a, a @ x) == pytest.approx(x.tolist())
    b = torch.tensor([1.0, 3, 0]).double()  # [5, -2] without the bound
    assert least_squares(a[:, :2], b) == pytest.approx([2, 0])


@pytest.mark.parametrize('regime', h100.TIMES)
def test_rates_of_lean_kernels_are_those_of_the_table(regime, monkeypatch):
    """As :mod:`polynl_mm.ops.choice` says that they were made."""
    monkeypatch.setattr(choice, '_LEAN', h100.PROTOTYPE)
    dtype, cases = getattr(torch, regime), []
    rate = choice.rate_of('cuda', dtype, lean=True)
    for shape, times in zip(h100.SHAPES, h100.TIMES[regime], strict=True):
        row = dict(zip(h100.COLUMNS, times, strict=True))
        images, c, n = shape
        for form in ON_X:
            time = row[f'lean {form.name}'] * row['conv'] * 1e-6
            if n * dtype.itemsize % 16 == 0:
                cases.append(Case(form, c, n, time, images))
    found = fit(cases, dtype.itemsize, rate.launch, rate.byte, lean=True)
    assert len(cases) == 14
    assert (found.rate, found.loss) == (rate, 1)


def test_prints_rates():
    args = '--calibrate --channels 8 16 --positions 16 64 --seconds 0.01'
    tool = ROOT / 'tools' / 'benchmark_layer.py'
    found = subprocess.run(
        [sys.executable, tool, *args.split()], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    machine, rates, quality = found.stdout.splitlines()
    assert 'torch' in machine and 'of the better form' in quality
    name, _, rates = rates.partition(': ')
    rate = eval(rates, dict(Rate=Rate))
    assert name == 'float32' and not rate.lean
    assert min(rate[:4]) >= 0 and rate.launch > 0


def test_regimes_of_a_gpu(monkeypatch):
    """Which kernels run is found in each, under its own switches."""
    seen = []

    def has_kernels(x):
        seen.append((x.dtype, torch.backends.cudnn.allow_tf32))
        return seen[-1] != (torch.float32, False)

    def calls_of(c, n, device, dtype):
        return {Form('gram'): lambda: None, Form('direct'): lambda: None}

    regimes = dict(cpu=calibrate.REGIMES['cuda'])
    monkeypatch.setattr(calibrate, 'REGIMES', regimes)
    monkeypatch.setattr(calibrate, 'has_kernels', has_kernels)
    monkeypatch.setattr(calibrate, 'calls_of', calls_of)
    monkeypatch.setattr(calibrate, 'clock', lambda f, *_: 1e-3)
    allowed = torch.backends.cudnn.allow_tf32
    try:
        lines = list(calibrate.run('cpu', [(8, 16), (16, 8)], 0))
    finally:
        torch.backends.cudnn.allow_tf32 = allowed
    assert seen == [
        (torch.bfloat16, True),
        (torch.float32, True),
        (torch.float32, False),
    ]
    assert ['lean=True' in line for line in lines] == [True, True, False]
