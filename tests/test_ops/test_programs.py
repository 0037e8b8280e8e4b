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
        # Some torch can not compile what takes all of a ParameterList.
        params = [self.params[k] for k in range(5)]
        y = on_x(x, *params, form=self.form)
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


@all_forms
@pytest.mark.parametrize('dynamic', [None, True])
@pytest.mark.skipif(OLD_TORCH, reason='torch.compile came of age in 2.5')
def test_compiled_once_for_many_sizes(form, dynamic):
    """Sizes become symbols at the second one, or at once."""
    torch._dynamo.reset()
    inputs = make_inputs((2, 5, 7, 3))
    model = InPlace(inputs, form)
    compiled = torch.compile(
        model, fullgraph=True, backend='aot_eager', dynamic=dynamic
    )
    for size in ((7, 3), (4, 9), (11, 2)):
        x = make_inputs((2, 5, *size))[0]
        assert_near(compiled(x), poly_nl_loop(x, *inputs[1:]) + x, 1e-13)


@pytest.mark.parametrize('form', ['direct', 'gram'])
@pytest.mark.skipif(OLD_TORCH, reason='torch.compile came of age in 2.5')
def test_compiled_gradient_does_not_see_autocast(form, device):
    """Of parameters in float32, of which only N x C products are low."""
    torch._dynamo.reset()
    inputs = make_inputs((2, 16, 12, 20), dtype=torch.float32)
    model = InPlace(inputs, form)
    inputs = [inputs[0], *model.params, None, None, None]
    dy = torch.randn_like(inputs[0]).bfloat16()
    errors = []
    for run in (model, torch.compile(model, backend='aot_eager')):
        with torch.autocast(device, torch.bfloat16):
            y = run(inputs[0] * 1)
        exact = [t if t is None else t.detach().double() for t in inputs]
        exact[0] = exact[0].bfloat16().double()
        exact = [t if t is None else t.requires_grad_() for t in exact]
        truth = on_x(*exact, form='direct')
        wants = gradients(truth, exact, dy.double())
        gots = gradients(y - inputs[0].bfloat16(), inputs, dy)
        errors.append(
            {
                k: ((gots[k].double() - w).norm() / w.norm()).item()
                for k, w in wants.items()
                if k in ('w1', 'w2', 'w3', 'alpha')
            }
        )
    eager, compiled = errors
    for name, error in eager.items():
        assert compiled[name] <= 2 * error + 1e-6, (name, errors)


def test_panels_are_no_part_of_a_program():
    """One product where the eager form takes the half of it in panels."""
    inputs = make_inputs((1, 256, 40))
    traced = torch.jit.trace(
        InPlace(inputs, 'gram'), inputs[0].detach(), check_trace=False
    )
    assert str(traced.graph).count('aten::bmm') == 2
    want = on_x(*inputs, form='direct') + inputs[0]
    assert_near(traced(inputs[0]), want.detach(), 1e-12)
