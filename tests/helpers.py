"""What several tests share: inputs, both doors of the operation, models as if
they were trained, measures."""

import math
from functools import partial
from importlib.metadata import distributions

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils.flop_counter import FlopCounterMode

from polynl_mm.layers import PolyNL
from polynl_mm.ops import Conv, Params, poly_nl, poly_nl_behind, project

OLD_TORCH = tuple(map(int, torch.__version__.split('.')[:2])) < (2, 5)
# The maintained forks of OpenMMLab's packages stand in their place.
FORKS = any(each.name == 'onedl-mmengine' for each in distributions())
HALF_TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3e-2}
# What the branch is of the layer's input in a model that calibrate has seen.
SHARE = 0.4
DEVICES = ['cpu', *(['cuda'] if torch.cuda.is_available() else [])]

# The arguments of the two doors, one by one: see on_x and behind.
NAMES = ('x', *Params._fields)
BEHIND = ('h', *Conv._fields, *Params._fields)


# ------------------------------------------------------------------- inputs


def make_inputs(shape, bias=False, dtype=torch.float64, seed=0):
    """x, three weights, alpha, beta and three biases, all with gradients."""
    gen = torch.Generator().manual_seed(seed)
    c = shape[1]
    sizes = [shape, *[(c, c)] * 3, (1,), (1,), *[(c,)] * 3]
    tensors = [randn(*size, generator=gen) for size in sizes]
    for w in tensors[1:4]:
        w /= math.sqrt(c)
    tensors[0] += 0.5
    tensors[4].fill_(0.7)
    tensors[5].fill_(-1.3)
    tensors = [t.to(dtype).requires_grad_() for t in tensors]
    return tensors if bias else [*tensors[:6], None, None, None]


def make_pair(shape, c, bias=False, dtype=torch.float64, seed=0):
    """h, a, b of the convolution, then what make_inputs has after x."""
    gen = torch.Generator().manual_seed(seed)
    h, a, b = (
        randn(*size, generator=gen) for size in (shape, (c, shape[1]), (c,))
    )
    h, a = h + 0.5, a / math.sqrt(shape[1])
    inputs = [h, a, b, *make_inputs((1, c, 1), bias, seed=seed + 1)[1:]]
    with torch.no_grad():  # the branch as large as the rest
        y, x = after_conv(*inputs), after_conv(*inputs[:6], 1.0, 0.0)
        inputs[7] *= 1 if not y.numel() else x.norm() / (y - 0.7 * x).norm()
    return [
        t if t is None else t.detach().to(dtype).requires_grad_()
        for t in inputs
    ]


def randn(*size, generator):
    """float64 on the device of the test, the same on every device."""
    t = torch.randn(
        size, generator=generator, dtype=torch.float64, device='cpu'
    )
    # Where the test has set no device, this is the CPU.
    return t.to(torch.empty(0).device)


def strided(kind, x):
    """The same values in another memory layout."""
    if kind == 'channels_last':
        return x.contiguous(memory_format=torch.channels_last)
    if kind == 'sliced':
        return torch.stack([x, x + 1], -1).flatten(-2)[..., ::2]
    if kind == 'transposed':
        return x.mT.contiguous().mT
    if kind == 'expanded':
        return x[:, :, :1, :1].expand(x.shape)
    raise AssertionError(kind)


# -------------------------------------------------------------------- doors


def on_x(x, *params, **kwargs):
    """The layer on X; arguments by NAMES."""
    return poly_nl(x, Params(*params), **kwargs)


def behind(*inputs, **kwargs):
    """The layer behind a convolution; arguments by BEHIND."""
    return poly_nl_behind(*projected(*inputs), **kwargs)


def projected(h, a, b, *params):
    """The arguments of poly_nl_behind."""
    conv = Conv(a, b)
    return h, conv, project(conv, Params(*params))


def after_conv(h, a, b, *params):
    """What behind computes, the slow way: the convolution, then the layer."""
    x = torch.einsum('oi,bin->bon', a, h.flatten(2)) + b[:, None]
    return on_x(x.unflatten(2, h.shape[2:]), *params, form='direct')


FORMS = {form: partial(on_x, form=form) for form in ('direct', 'gram')}


# ------------------------------------------------- models as if trained


def randomize(model, seed=0):
    """Draw what hosts and layers start at 0 or 1, as if it were trained."""
    generator = torch.Generator().manual_seed(seed)

    def draw(t, mean=0.0, spread=0.3):
        noise = torch.randn(t.shape, generator=generator, dtype=t.dtype)
        t.copy_(mean + spread * noise.clamp(-2, 2))

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, _ConvNd) and module.bias is not None:
                draw(module.bias)
            if not isinstance(module, _BatchNorm):
                continue
            for t, mean in (
                (module.weight, 1),
                (module.bias, 0),
                (module.running_mean, 0),
                (module.running_var, 1),
            ):
                if t is not None:
                    draw(t, mean)
    return model


def layers_of(model):
    return {k: m for k, m in model.named_modules() if isinstance(m, PolyNL)}


def calibrate(model, *args):
    """Set every beta such that the branch is SHARE of the layer's input."""

    def set_beta(layer, args):
        x = args[0]
        layer.beta.fill_(1)
        branch = type(layer).forward(layer, x) - layer.alpha * x
        layer.beta.fill_(SHARE * x.std() / branch.std())

    handles = [
        layer.register_forward_pre_hook(set_beta)
        for layer in layers_of(model).values()
    ]
    with torch.no_grad():
        model(*args)
    for handle in handles:
        handle.remove()
    betas = [layer.beta for layer in layers_of(model).values()]
    assert betas and all(b.isfinite() and b > 1e-9 for b in betas)


# ----------------------------------------------------------------- measures


def gradients(y, inputs, dy):
    """Of each input by name, zeros where y does not depend on it."""
    names = NAMES if len(inputs) == len(NAMES) else BEHIND
    named = {k: t for k, t in zip(names, inputs) if t is not None}
    grads = torch.autograd.grad(y, list(named.values()), dy, allow_unused=True)
    return {
        k: torch.zeros_like(t) if g is None else g
        for (k, t), g in zip(named.items(), grads)
    }


def assert_near(got, want, tolerance, name=''):
    """Largest error, relative to the largest value of the truth."""
    assert got.shape == want.shape, name
    if want.numel() == 0:
        return
    assert torch.isfinite(got).all(), name
    error = (got.double().cpu() - want.double().cpu()).abs().max()
    assert error <= tolerance * want.double().abs().max().clamp_min(1e-30), (
        f'{name}: error {error:.3g}, largest value {want.abs().max():.3g}'
    )


def assert_all_near(gots, wants, tolerance):
    """The same of dictionaries."""
    assert gots.keys() == wants.keys()
    for name, want in wants.items():
        assert_near(gots[name], want, tolerance, name)


def count_flops(f, *args):
    """Floating point operations of the products, and the result."""
    with FlopCounterMode(display=False) as counter:
        out = f(*args)
    return counter.get_total_flops(), out


def nodes_of(y):
    """Names of the nodes of the graph that y comes from."""
    names, todo = set(), [y.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in names:
            names.add(node)
            todo += [n for n, _ in node.next_functions]
    return {type(node).__name__ for node in names}


# ------------------------------------------------------------------- states


def differing(a, b, path=''):
    """Give the paths of what is not bit-equal in two states."""
    if isinstance(a, torch.Tensor):
        if a.dtype != b.dtype or a.numpy().tobytes() != b.numpy().tobytes():
            yield path
    elif isinstance(a, dict):
        if a.keys() != b.keys():
            yield f'{path} (keys)'
            return
        for key in a:
            yield from differing(a[key], b[key], f'{path}.{key}')
    elif isinstance(a, (list, tuple)):
        if len(a) != len(b):
            yield f'{path} (length)'
            return
        for i, (each, other) in enumerate(zip(a, b)):
            yield from differing(each, other, f'{path}.{i}')
    elif a != b:
        yield path
