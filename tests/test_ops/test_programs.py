"""The operation within programs: traced, compiled, exported."""

import pytest
import torch
from helpers import (
    OLD_TORCH,
    assert_near,
    gradients,
    make_inputs,
    on_x,
)
from oracles import poly_nl_loop

from polynl_mm.ops import FORMS

all_forms = pytest.mark.parametrize('form', FORMS)


class InPlace(torch.nn.Module):
    """As a host's block: the parameters want gradients; it adds in place."""

    def __init__(self, inputs, form):
        super().__init__()
        self.form = form
        self.params = torch.nn.ParameterList(inputs[1:6])

    def forward(self, x):
        y = on_x(x, *self.params, form=self.form)
        y += x
        return y


@all_forms
def test_traced_at_one_size_runs_at_another(form, tmp_path):
    inputs = make_inputs((2, 5, 7, 3))
    other = make_inputs((1, 5, 2, 1), seed=1)[0].detach()
    traced = torch.jit.trace(
        InPlace(inputs, form), inputs[0].detach(), check_trace=False
    )
    traced.save(tmp_path / 'traced.pt')
    traced = torch.jit.load(tmp_path / 'traced.pt')
    want = poly_nl_loop(other, *inputs[1:]) + other
    assert_near(traced(other), want, 1e-13)


@all_forms
@pytest.mark.skipif(OLD_TORCH, reason='torch.compile came of age in 2.5')
def test_compiled_in_one_graph(form):
    inputs = make_inputs((2, 5, 7, 3))
    model = InPlace(inputs, form)
    inputs = [inputs[0], *model.params, None, None, None]
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    truth = poly_nl_loop(*inputs) + inputs[0]
    dy = torch.randn_like(truth)
    # Not a leaf, as x is not one within a network.
    y = compiled(inputs[0] * 1)
    assert_near(y, truth, 1e-13)
    wants, gots = gradients(truth, inputs, dy), gradients(y, inputs, dy)
    for name, want in wants.items():
        assert_near(gots[name], want, 1e-12, name)


@all_forms
@pytest.mark.skipif(OLD_TORCH, reason='torch.export came of age in 2.5')
def test_exported_with_dynamic_size(form):
    inputs = make_inputs((2, 5, 7, 3))
    other = make_inputs((3, 5, 1, 2), seed=1)[0].detach()
    model = InPlace(inputs, form).eval()
    auto = torch.export.Dim.AUTO
    program = torch.export.export(
        model,
        (inputs[0].detach(),),
        dynamic_shapes=[{0: auto, 2: auto, 3: auto}],
    )
    want = poly_nl_loop(other, *inputs[1:]) + other
    assert_near(program.module()(other), want, 1e-13)
