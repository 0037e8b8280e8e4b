"""One Poly-NL layer and a whole ResNet-50 on a GPU: cases and tables.

Needs torch and Triton only. The unit of time is a 1x1 convolution C -> C of
the same regime, for the ResNet-50 the one without blocks.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from polynl_mm.layers import PolyNL2d
from polynl_mm.ops import FORMS

from . import timing
from .core import HERE
from .resnet import ResNet50, Tail, bottlenecks
from .rivals import ContextBlock, EfficientAttention, Formula, NonLocal
from .timing import MODES

# B, C, H, W: the stages of a detector at 800 x 1344, crops of segmentation,
# and both at the edges of what they are run with.
SHAPES = (
    (2, 256, 200, 336),
    (2, 512, 100, 168),
    (2, 1024, 50, 84),
    (2, 2048, 25, 42),
    (8, 1024, 40, 40),
    (2, 512, 64, 128),
    (1, 512, 128, 256),
    (1, 256, 512, 512),
)
# N above and below C, for the errors.
SMALL_SHAPES = ((2, 512, 48, 48), (2, 512, 16, 16))
PICTURE = (2, 3, 800, 1344)
UNIT, PLAIN = 'conv', 'plain'
# Methods of a Card. FLOPs of a whole ResNet would take longer than the rest.
STEP = ('launches', 'peak', 'eager', 'gpu')
LAYER_FIGURES = dict(forward=('flops', 'gpu'), training=('flops', *STEP))
RESNET_FIGURES = dict(forward=('launches', 'gpu'), training=STEP)


class Regime(NamedTuple):
    """In what a step computes.

    Attributes:
        title: For people.
        autocast: What autocast takes, None where it is off.
        most_positions: Beyond these NonLocal would take seconds.
        most_error: What a form may be off from float64, relatively.
    """

    title: str
    autocast: torch.dtype | None
    most_positions: int
    most_error: float

    @property
    def dtype(self) -> torch.dtype:
        """Of the features."""
        return self.autocast or torch.float32

    def __call__(self, device: str):
        """Give the context to compute in."""
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(device, self.autocast)


REGIMES = dict(
    bf16=Regime('bf16 autocast', torch.bfloat16, 40000, 3e-2),
    tf32=Regime('float32, convolutions in TF32', None, 17000, 5e-3),
)


class LeftOut(Exception):
    """Why a contender is not measured."""


def _layer(form: str) -> Callable[[int], nn.Module]:
    return partial(PolyNL2d, beta_init=0.5, form=form)


BLOCKS = dict(
    formula=Formula,
    **{form: _layer(form) for form in ('direct', 'gram', 'auto')},
    ContextBlock=ContextBlock,
    NonLocal=NonLocal,
    EfficientAttention=EfficientAttention,
)


class Variant(NamedTuple):
    """A ResNet-50: which block, where, fused or not."""

    block: str | None = None
    places: frozenset | set = frozenset()
    fused: bool = False

    def build(self, device: str) -> ResNet50:
        """All start alike."""
        torch.manual_seed(0)
        block = self.block and BLOCKS[self.block]
        with torch.device(device):
            return ResNet50(block, self.places, self.fused)


ALL, C4, END_OF_C4 = bottlenecks(3, 4, 5), bottlenecks(4), {(4, 5)}
VARIANTS = {
    PLAIN: Variant(),
    'formula': Variant('formula', ALL),
    'auto': Variant('auto', ALL),
    'fused': Variant('auto', ALL, fused=True),
    'ContextBlock': Variant('ContextBlock', ALL),
    'auto, c4': Variant('auto', C4),
    'fused, c4': Variant('auto', C4, fused=True),
    'NonLocal, c4': Variant('NonLocal', C4),
    'auto, end of c4': Variant('auto', END_OF_C4),
    'fused, end of c4': Variant('auto', END_OF_C4, fused=True),
    'NonLocal, end of c4': Variant('NonLocal', END_OF_C4),
}


# --------------------------------------------------------------------- calls


def layer_calls(
    module: nn.Module, x: torch.Tensor, dy: torch.Tensor, regime: Regime
) -> dict:
    """A forward, and one with the gradients of x and of all parameters."""
    device = x.device.type

    def forward():
        with torch.no_grad(), regime(device):
            return module(x)

    def training():
        with regime(device):
            y = module(x)
        return y, *torch.autograd.grad(y, [x, *module.parameters()], dy)

    return dict(forward=forward, training=training)


def resnet_calls(
    model: ResNet50, picture: torch.Tensor, regime: Regime
) -> Iterator[tuple[str, Callable]]:
    """Training, then inference without norms: the model is then folded."""
    device = picture.device.type
    learned = [p for p in model.parameters() if p.requires_grad]

    def training():
        with regime(device):
            y = model(picture)
        return torch.autograd.grad(y.float().mean(), learned)

    def forward():
        with torch.no_grad(), regime(device):
            return model(picture)

    yield 'training', training
    learned.clear()
    model.fold()
    yield 'forward', forward


def make_inputs(shape: tuple, device: str, regime: Regime) -> tuple:
    """x, wanting a gradient, and dL/dy. Neither has mean zero."""
    gen = torch.Generator(device).manual_seed(0)
    x, dy = (
        torch.randn(shape, generator=gen, device=device).add_(0.3)
        for _ in range(2)
    )
    return x.to(regime.dtype).requires_grad_(), dy.to(regime.dtype)


# -------------------------------------------------------------------- errors


def errors(device: str) -> list:
    """How far each way of computing the layer is from float64.

    On X at :data:`SMALL_SHAPES`, and behind a convolution and a norm.

    Returns:
        list: Of dict: regime, shape, name, ``relative`` error of the value
            and of each gradient, the largest, and whether it is ``right``.
    """
    found = []
    for regime_name, regime in REGIMES.items():
        for shape in SMALL_SHAPES:
            for behind in (False, True):
                for name, case in _errors_at(shape, behind, regime, device):
                    case.update(regime=regime_name, shape=shape, name=name)
                    if 'worst' in case:
                        # A NaN is not.
                        case['right'] = case['worst'] <= regime.most_error
                    found.append(case)
    return found


def _errors_at(shape, behind, regime, device):
    batch, c, *size = shape
    # Behind a convolution it is a quarter of the channels that come in.
    narrow = c // 4 if behind else c
    x, dy = make_inputs((batch, narrow, *size), device, regime)
    dy = make_inputs(shape, device, regime)[1] if behind else dy

    def build(block, fused=False):
        torch.manual_seed(0)
        with torch.device(device):
            made = block(c)
            made = Tail(narrow, c, made, fused) if behind else made
        return made.eval()

    truth = build(Formula).double()
    state = {k: v.float() for k, v in truth.state_dict().items()}
    wide = x.detach().double().requires_grad_()
    exact = Regime('', None, 0, 0)
    expected = layer_calls(truth, wide, dy.double(), exact)['training']()
    contenders = dict(formula=Formula, **{f: BLOCKS[f] for f in FORMS})
    if behind:
        contenders['fused'] = BLOCKS['auto']
    names = ['y', 'x', *(name for name, _ in truth.named_parameters())]
    for name, block in contenders.items():
        module = build(block, name == 'fused')
        module.load_state_dict(state)
        label = f'{name} behind a convolution' if behind else name
        try:
            got = layer_calls(module, x, dy, regime)['training']()
            relative = {
                key: ((a.double() - b).norm() / b.norm()).item()
                for key, a, b in zip(names, got, expected)
            }
        except Exception as error:
            yield label, dict(error=text_of(error), right=False)
            continue
        # Python's max would lose a NaN.
        worst = torch.tensor(list(relative.values())).max().item()
        yield label, dict(relative=relative, worst=worst)


# --------------------------------------------------------------------- cases


def text_of(error: Exception) -> str:
    """One line."""
    first = (str(error).splitlines() or [''])[0]
    return f'{type(error).__name__}: {first}'[:200]


def measure(case: dict, card, calls, figures: dict) -> None:
    """Figures of calls by mode. What fails is told in ``errors``.

    Args:
        case (dict): Written to.
        card (Card): What takes them.
        calls (iterable): Of (mode, call).
        figures (dict): Methods of ``card`` by mode.
    """
    for mode, call in calls:
        case[mode] = {}
        for figure in figures[mode]:
            try:
                case[mode][figure] = getattr(card, figure)(call)
            except Exception as error:
                told = case.setdefault('errors', {})
                told[f'{mode}, {figure}'] = text_of(error)


def _layer_case(case, name, card, shape, regime) -> None:
    _, c, h, w = shape
    if name == 'NonLocal' and h * w > regime.most_positions:
        raise LeftOut('it would take too long')
    torch.manual_seed(0)
    with torch.device(card.device):
        if name == UNIT:
            module = nn.Conv2d(c, c, 1, bias=False)
        else:
            module = BLOCKS[name](c)
    x, dy = make_inputs(shape, card.device, regime)
    calls = layer_calls(module, x, dy, regime).items()
    measure(case, card, calls, LAYER_FIGURES)
    # Read x and the weights, write y; then x, dy and the weights, and the
    # gradients: nothing that gives the same can do with less.
    size = x.element_size()
    weights = sum(p.numel() for p in module.parameters()) * 4
    case['forward']['bytes'] = 2 * x.numel() * size + weights
    case['training']['bytes'] = 5 * x.numel() * size + 3 * weights
    if name == 'auto':
        case['took'] = {
            mode: HERE.chosen(x, backward=mode == 'training') for mode in MODES
        }


def _resnet_case(case, name, card, regime) -> None:
    variant = VARIANTS[name]
    case['blocks'] = len(variant.places)
    model = variant.build(card.device)
    picture = torch.randn(PICTURE, device=card.device)
    calls = resnet_calls(model, picture, regime)
    measure(case, card, calls, RESNET_FIGURES)


def run(card, over: Callable[[], bool], keep: Callable[[dict, str], None]):
    """All figures.

    Args:
        card (Card): What takes them.
        over (callable): Whether the time is: what is left is left out.
        keep (callable): Given the result and a line after every case.

    Returns:
        dict: ``machine``, ``ceilings``, ``errors``, and the rows of ``layer``
            and ``resnet``: dict with ``regime``, ``contenders`` and, of a
            layer, ``shape``.
    """
    result = dict(machine=str(card), layer=[], resnet=[])
    result['ceilings'] = card.ceilings()
    result['errors'] = errors(card.device)
    keep(result, _ceilings(result['ceilings']))

    def contenders(row, names, measured):
        for name in names:
            case = row['contenders'][name] = {}
            started = time.monotonic()
            try:
                if over():
                    raise LeftOut('the time was over')
                measured(case, name)
            except LeftOut as why:
                case['left_out'] = str(why)
            except Exception as error:
                case.setdefault('errors', {})[''] = text_of(error)
            card.tidy()
            case['seconds_taken'] = time.monotonic() - started
            gpu = figure(row, name, 'training', 'gpu')
            keep(result, f'{where(row)} {name}: {_cell(gpu, ".0f", 1e6)} µs')

    for shape in SHAPES:
        for name, regime in REGIMES.items():
            row = dict(regime=name, shape=shape, contenders={})
            result['layer'].append(row)
            contenders(
                row,
                [UNIT, *BLOCKS],
                partial(_layer_case, card=card, shape=shape, regime=regime),
            )
    for name, regime in REGIMES.items():
        row = dict(regime=name, contenders={})
        result['resnet'].append(row)
        contenders(
            row,
            VARIANTS,
            partial(_resnet_case, card=card, regime=regime),
        )
    return result


# -------------------------------------------------------------------- tables


def figure(row: dict, name: str, mode: str, what: str) -> float | None:
    """A figure of a contender, None where it is not known."""
    return row['contenders'].get(name, {}).get(mode, {}).get(what)


def relative(
    row: dict, name: str, unit: str, mode: str, what: str = 'gpu'
) -> float | None:
    """A figure of a contender in units of another's."""
    values = [figure(row, k, mode, what) for k in (name, unit)]
    return None if None in values else values[0] / values[1]


def where(row: dict) -> str:
    """Name of a case."""
    at = 'x'.join(map(str, row.get('shape', ())))
    return f'{at} {row["regime"]}'.strip()


def _cell(value: float | None, form: str = '.2f', scale: float = 1) -> str:
    return '–' if value is None else format(value * scale, form)


def tables(result: dict) -> str:
    """Markdown."""
    parts = ['Ceilings: ' + _ceilings(result['ceilings'])]
    head = ['regime', 'B×C×H×W', '', 'largest relative error', 'of']
    parts.append('Errors against float64, value and every gradient')
    parts.append(timing.table(head, [*map(_error_line, result['errors'])]))
    for name, regime in REGIMES.items():
        rows = [row for row in result['layer'] if row['regime'] == name]
        for title, mode, what in (
            ('Forward + backward, GPU time', 'training', 'gpu'),
            ('Forward, GPU time', 'forward', 'gpu'),
            ('Forward + backward, eager', 'training', 'eager'),
        ):
            parts.append(f'{title}, {regime.title}, in units of one 1×1 conv')
            parts.append(_times(rows, mode, what))
        parts.append(
            f'Forward + backward, {regime.title}: launches / memory added at '
            'the peak, in units of the input'
        )
        parts.append(_launches(rows))
        parts.append(
            f'Forward + backward, {regime.title}: TFLOP/s of the operations '
            f'counted (ceiling {result["ceilings"][name] / 1e12:.0f}) / TB/s '
            'of the least that any layer reads and writes (ceiling '
            f'{result["ceilings"]["copy"] / 1e12:.2f})'
        )
        parts.append(_rates(rows))
    for row in result['resnet']:
        title = REGIMES[row['regime']].title
        picture = '×'.join(map(str, PICTURE))
        parts.append(f'ResNet-50, {picture}, norms frozen, {title}')
        parts.append(_resnet_table(row))
    parts += _failures(result)
    return '\n\n'.join(parts)


def _ceilings(found: dict) -> str:
    products = ', '.join(
        f'{name} {value / 1e12:.0f}'
        for name, value in found.items()
        if name != 'copy'
    )
    return (
        f'copy {found["copy"] / 1e12:.2f} TB/s; products of 8192³ {products} '
        'TFLOP/s'
    )


def _error_line(case: dict) -> list:
    cells = [case['regime'], '×'.join(map(str, case['shape'])), case['name']]
    if 'error' in case:
        return [*cells, case['error'], '']
    at = max(case['relative'], key=lambda key: case['relative'][key])
    wrong = '' if case['right'] else ' **wrong**'
    return [*cells, f'{case["worst"]:.1e}{wrong}', at]


def _shape(row: dict) -> str:
    return '×'.join(map(str, row['shape']))


def _times(rows, mode, what) -> str:
    head = ['B×C×H×W', '1×1 conv, µs', *BLOCKS, 'auto took']
    lines = []
    for row in rows:
        cells = [_shape(row), _cell(figure(row, UNIT, mode, what), '.0f', 1e6)]
        for name in BLOCKS:
            cells.append(_cell(relative(row, name, UNIT, mode, what)))
        took = row['contenders'].get('auto', {}).get('took', {})
        lines.append([*cells, took.get(mode, '–')])
    return timing.table(head, lines)


def _launches(rows) -> str:
    lines = []
    for row in rows:
        b, c, h, w = row['shape']
        size = b * c * h * w * REGIMES[row['regime']].dtype.itemsize
        cells = [_shape(row)]
        for name in (UNIT, *BLOCKS):
            count = figure(row, name, 'training', 'launches')
            peak = figure(row, name, 'training', 'peak')
            cells.append(
                f'{_cell(count, ".0f")} / {_cell(peak, ".1f", 1 / size)}'
            )
        lines.append(cells)
    return timing.table(['B×C×H×W', UNIT, *BLOCKS], lines)


def _rates(rows) -> str:
    lines = []
    for row in rows:
        cells = [_shape(row)]
        for name in (UNIT, *BLOCKS):
            seconds = figure(row, name, 'training', 'gpu')
            rates = []
            for what in ('flops', 'bytes'):
                value = figure(row, name, 'training', what)
                known = None not in (value, seconds)
                rates.append(value / seconds if known else None)
            cells.append(
                f'{_cell(rates[0], ".0f", 1e-12)} / '
                f'{_cell(rates[1], ".2f", 1e-12)}'
            )
        lines.append(cells)
    return timing.table(['B×C×H×W', UNIT, *BLOCKS], lines)


def _resnet_table(row) -> str:
    head = ['', 'blocks', 'training, GPU ms', 'of plain', 'eager ms', 'MiB']
    head += ['launches', 'more, per block']
    head += ['inference, GPU ms', 'of plain', 'launches']
    lines = []
    for name, case in row['contenders'].items():
        step = partial(figure, row, name, 'training')
        alone = partial(figure, row, name, 'forward')
        lines.append(
            [
                *(name, case.get('blocks', '–')),
                _cell(step('gpu'), '.2f', 1e3),
                _cell(relative(row, name, PLAIN, 'training')),
                _cell(step('eager'), '.1f', 1e3),
                _cell(step('peak'), '.0f', 2**-20),
                _cell(step('launches'), '.0f'),
                _cell(launches_per_block(row, name), '.1f'),
                _cell(alone('gpu'), '.2f', 1e3),
                _cell(relative(row, name, PLAIN, 'forward')),
                _cell(alone('launches'), '.0f'),
            ]
        )
    return timing.table(head, lines)


def launches_per_block(row: dict, name: str) -> float | None:
    """Launches of a training step more than plain, for each block."""
    more = [figure(row, k, 'training', 'launches') for k in (name, PLAIN)]
    blocks = row['contenders'].get(name, {}).get('blocks')
    return None if None in more or not blocks else (more[0] - more[1]) / blocks


def _failures(result: dict) -> Iterator[str]:
    for row in (*result['layer'], *result['resnet']):
        for name, case in row['contenders'].items():
            if 'left_out' in case:
                yield f'{where(row)}: {name} left out: {case["left_out"]}'
            for what, text in case.get('errors', {}).items():
                what = what and f' ({what})'
                yield f'{where(row)}: {name}{what} failed: {text}'
