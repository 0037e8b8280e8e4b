"""The costs of Poly-SA beside other attention."""

import importlib
import json
import math
import sys

import pytest
import torch
from benchmarks import attention, timing
from helpers import assert_near
from torch import nn

UNIT, NAMES = attention.UNIT, attention.NAMES


def test_softmax_is_the_attention_of_torch():
    mine = attention.build('softmax', 64, 12)
    theirs = nn.MultiheadAttention(64, 2, batch_first=True)
    theirs.in_proj_weight, theirs.in_proj_bias = mine.qkv.parameters()
    theirs.out_proj.load_state_dict(mine.proj.state_dict())
    x = torch.randn(2, 12, 64)
    assert_near(mine(x), theirs(x, x, x)[0].detach(), 1e-5)


def test_efficient_is_its_formula():
    layer = attention.build('efficient', 64, 12)
    x = torch.randn(2, 12, 64)
    for i, tokens in enumerate(x):
        q, k, v = layer.qkv(tokens).chunk(3, 1)
        heads = []
        for own in (slice(0, 32), slice(32, 64)):
            pairs = q[:, own].softmax(1) @ k[:, own].softmax(0).T
            heads.append(pairs @ v[:, own])
        want = layer.proj(torch.cat(heads, 1))
        assert_near(layer(x)[i], want.detach(), 1e-5)


def test_all_have_the_same_projections():
    counts = {
        name: sum(
            p.numel()
            for key, p in attention.build(name, 64, 12).named_parameters()
            if key.startswith(('qkv.', 'proj.'))
        )
        for name in (UNIT, *NAMES)
    }
    assert set(counts.values()) == {4 * 64 * 64 + 4 * 64}


def test_what_would_take_long_is_not_run(monkeypatch, tmp_path, capsys):
    """Known from the case before; softmax grows with the square."""
    monkeypatch.setattr(timing, 'seconds_of', lambda f, device: f() or 1.0)
    file = tmp_path / 'out.json'
    line = ['--attention', '--channels', '32', '--positions', '24', '6']
    line += ['--seconds', '0', '--limit', '21', '--no-memory']
    monkeypatch.setattr(sys, 'argv', ['-', *line, '--json', str(file)])
    importlib.import_module('benchmark_layer').main()
    small, large = json.loads(file.read_text())['rows']
    for name in (UNIT, *NAMES):
        for mode in timing.MODES:
            assert small['contenders'][name][mode] == [1.0] * timing.ROUNDS
            case = large['contenders'][name]
            # A call, and four rounds of one, of 4 or of 16 times the time.
            assert (mode in case) == (name != 'softmax')
            if name == 'softmax':
                assert math.isclose(case[f'{mode}_expected'], 16)
    out = capsys.readouterr().out
    assert out.count('not run (16 s a call)') == 4
    assert 'forward, time in units of the projections' in out


def test_the_peak_is_of_one_call(monkeypatch):
    """Before it comes one with few tokens, which takes no time."""
    seen = []

    def added_at_peak(f, device, warm_up):
        for each in (warm_up, f):
            each()
        return 7

    def mixed(self, q, k, v):
        seen.append((q.shape[2], torch.is_grad_enabled()))
        return q + k + v

    monkeypatch.setattr(timing, 'added_at_peak', added_at_peak)
    monkeypatch.setattr(attention.Softmax, 'mixed', mixed)
    for mode in timing.MODES:
        assert attention.peak_memory('softmax', 32, 999, 'cpu', mode) == 7
    assert seen == [(196, False), (999, False), (196, True), (999, True)]


def test_forms_that_differ_are_not_timed(monkeypatch):
    def build(name, c, n, build=attention.build):
        layer = build(name, c, n)
        if name == 'gram':
            nn.init.ones_(layer.proj.bias)
        return layer

    monkeypatch.setattr(attention, 'build', build)
    with pytest.raises(attention.Disagreement, match='C=32 N=8: .* differ'):
        attention.run_case(32, 8, 'cpu', 0.001, 1.0, [])


@pytest.mark.parametrize(
    'line, why',
    [
        (['--channels', '48'], '--channels 48: heads have 32 channels'),
        (['--against', 'HEAD'], '--attention is for none of --against'),
        (['--calibrate'], '--attention is for none of .* --calibrate'),
    ],
)
def test_what_is_refused(line, why, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['-', '--attention', *line])
    tool = importlib.import_module('benchmark_layer')
    with pytest.raises(SystemExit, match=f'^benchmark_layer.py: {why}'):
        tool.main()
