"""Layers exported to ONNX, by both exporters, run at other sizes."""

import warnings

import numpy as np
import pytest
import torch
from helpers import OLD_TORCH, calibrate, randomize
from torch import nn

from polynl_mm.attention import PolySA
from polynl_mm.fusion import FusedPolyNL, fuse_poly_nl
from polynl_mm.layers import PolyNL1d, PolyNL2d, PolyNL3d
from polynl_mm.ops import FORMS

onnxruntime = pytest.importorskip('onnxruntime')
pytest.importorskip('onnx')

LAYERS = {1: PolyNL1d, 2: PolyNL2d, 3: PolyNL3d}
SIZES = {1: [(11,), (3,)], 2: [(7, 3), (2, 9)], 3: [(2, 3, 5), (4, 1, 2)]}
C = 5

each_exporter = pytest.mark.parametrize(
    'dynamo',
    [
        False,
        pytest.param(
            True,
            marks=pytest.mark.skipif(OLD_TORCH, reason='came of age in 2.5'),
        ),
    ],
    ids=['older', 'dynamo'],
)


class SideBySide(nn.Module):
    """Several modules on one input, as one program."""

    def __init__(self, *modules):
        super().__init__()
        self.items = nn.ModuleList(modules)

    def forward(self, x):
        return tuple(module(x) for module in self.items)


def exported(model, x, dynamo, file, **kwargs):
    """Run an export of the model at x, by onnxruntime."""
    axes = {0: 'batch', **{i: f'size{i}' for i in range(2, x.dim())}}
    if dynamo:
        pytest.importorskip('onnxscript')
        auto = torch.export.Dim.AUTO
        kwargs['dynamic_shapes'] = [dict.fromkeys(axes, auto)]
    else:
        kwargs['dynamic_axes'] = dict(x=axes)
        kwargs['input_names'] = ['x']
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.onnx.export(model, (x,), file, dynamo=dynamo, **kwargs)
    session = onnxruntime.InferenceSession(file)
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x.numpy()})


def assert_equal(run, model, x):
    with torch.no_grad():
        wants = model(x)
    for got, want in zip(run(x), wants, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@each_exporter
@pytest.mark.parametrize('axes', LAYERS)
def test_every_form(axes, dynamo, tmp_path):
    torch.manual_seed(0)
    first, second = (torch.randn(2, C, *size) for size in SIZES[axes])
    layers = [
        LAYERS[axes](C, alpha_init=0.7, beta_init=-1.3, bias=bias, form=form)
        for form in FORMS
        for bias in (False, True)
    ]
    for layer in layers:
        for conv in (layer.w1, layer.w2, layer.w3):
            if conv.bias is not None:
                nn.init.normal_(conv.bias)
    model = SideBySide(*layers).eval()
    # Neither the input nor the branch alone.
    for y, layer in zip(model(first), layers):
        branch = y - layer.alpha * first
        assert branch.norm() > y.norm() / 3
        assert layer.alpha * first.norm() > y.norm() / 10
    run = exported(model, first, dynamo, tmp_path / 'layers.onnx')
    assert_equal(run, model, first)
    assert_equal(run, model, torch.cat([second, second.flip(0), second]))


@each_exporter
def test_fused(dynamo, tmp_path):
    model = nn.Sequential(
        nn.Conv2d(4, C, 1), nn.BatchNorm2d(C), PolyNL2d(C, bias=True)
    )
    model.eval()
    randomize(model)
    first, second = (torch.randn(2, 4, *size) for size in SIZES[2])
    calibrate(model, first)
    fuse_poly_nl(model)
    assert isinstance(model[2], FusedPolyNL)
    model = SideBySide(model)
    run = exported(model, first, dynamo, tmp_path / 'fused.onnx')
    assert_equal(run, model, first)
    assert_equal(run, model, torch.cat([second, second]))


def test_by_the_exporter_of_mmdeploy(tmp_path):
    """It asks the older exporter for operations of 2021."""
    model = SideBySide(PolyNL2d(C, beta_init=0.5)).eval()
    first, second = (torch.randn(2, C, *size) for size in SIZES[2])
    file = tmp_path / 'old.onnx'
    run = exported(model, first, False, file, opset_version=11)
    assert_equal(run, model, second)


class OfTokens(nn.Module):
    """A layer of tokens, of a sequence (B, C, N)."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.transpose(1, 2))


def test_attention(tmp_path):
    """By the older exporter, which is the one that loses sizes."""
    torch.manual_seed(0)
    first, second = torch.randn(2, 6, 11), torch.randn(3, 6, 5)
    layers = [
        PolySA(6, 2, form=form, norm=norm)
        for form in FORMS
        for norm in (False, True)
    ]
    model = SideBySide(*map(OfTokens, layers)).eval()
    for p in model.parameters():
        nn.init.normal_(p)
    run = exported(model, first, False, tmp_path / 'model.onnx')
    for x in (first, second):
        assert_equal(run, model, x)
