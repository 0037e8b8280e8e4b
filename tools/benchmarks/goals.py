"""What Poly-NL layers should cost, and where they come closest to that."""

from __future__ import annotations

import math

from . import gpu, timing
from .layer import UNIT, relative, where
from .timing import MODES

# Of a layer on a GPU, forward and backward: regime, multiples of C that N is
# at least and less than, unit of the time, limit.
GPU_LAYER = (
    ('tf32', 4, math.inf, gpu.UNIT, 2.2),
    ('tf32', 0, math.inf, 'formula', 0.5),
    ('bf16', 8, math.inf, gpu.UNIT, 2.3),
    ('bf16', 16, math.inf, 'ContextBlock', 1),
    ('bf16', 4, 8, gpu.UNIT, 2.8),
    ('bf16', 0.5, 2, gpu.UNIT, 3.6),
    ('bf16', 0.5, 2, 'formula', 1),
)
GPU_LAUNCHES = dict(layer=20, fused=30)
# Of a ResNet-50 in units of the one without blocks.
GPU_RESNET = (
    ('bf16', 'training', 'fused', 1.15),
    ('tf32', 'training', 'fused', 1.12),
    ('bf16', 'forward', 'fused', 1.1),
    ('tf32', 'forward', 'fused', 1.1),
    *(
        (regime, 'training', f'{name}, end of c4', 1.03)
        for regime in gpu.REGIMES
        for name in ('auto', 'fused')
    ),
)


def _worst(goal: str, limit: float, cases: list, at_most: bool = True) -> dict:
    """Of ``cases``: (value, where, ratio of operations or None)."""
    value, where, by_flops = (max if at_most else min)(cases)
    return dict(
        goal=goal,
        limit=limit,
        worst=value,
        where=where,
        by_flops=by_flops,
        reached=value <= limit if at_most else value >= limit,
    )


def goals(rows: list) -> list:
    """Each goal with the worst case of the table, and whether it is reached.

    ``by_flops`` is what a ratio of two times would be there if time were
    floating point operations alone.
    """
    out = []

    def worst(goal, limit, cases, at_most=True):
        if cases:
            out.append(_worst(goal, limit, cases, at_most))

    def ratios(rows, mode, name, unit):
        """Cases of one time in units of another."""
        cases = []
        for row in rows:
            flops = [
                row['contenders'][k][f'{mode}_flops'] for k in (name, unit)
            ]
            value = relative(row, name, mode, unit)[0]
            cases.append((value, where(row), flops[0] / flops[1]))
        return cases

    wide = [r for r in rows if r['c'] >= 256]
    for label, chosen, cost, gain in (
        ('N >= 8C', [r for r in wide if r['n'] >= 8 * r['c']], 1.6, 2.1),
        (
            '4C <= N < 8C',
            [r for r in wide if 4 * r['c'] <= r['n'] < 8 * r['c']],
            2.0,
            1.7,
        ),
    ):
        worst(
            f'{label}: training, auto / conv',
            cost,
            ratios(chosen, 'training', 'auto', UNIT),
        )
        worst(
            f'{label}: training, direct / auto',
            gain,
            ratios(chosen, 'training', 'direct', 'auto'),
            at_most=False,
        )
        worst(
            f'{label}: forward, auto / conv',
            2.2,
            ratios(chosen, 'forward', 'auto', UNIT),
        )
        kept = [
            (
                r['contenders']['auto']['saved_bytes']['large']
                / (r['c'] * r['n'] * 4),
                where(r),
                None,
            )
            for r in chosen
        ]
        worst(f'{label}: large tensors kept for backward / input', 1.1, kept)
    for mode in MODES:
        for form in ('direct', 'gram'):
            worst(
                f'anywhere: {mode}, auto / {form}',
                1.1,
                ratios(rows, mode, 'auto', form),
            )
    slopes = []
    # Two positions at least four times the channels, the largest ones.
    for c in sorted({r['c'] for r in rows}):
        few, many = ([None] * 2 + [r for r in rows if r['c'] == c])[-2:]
        if few is None or few['n'] < 4 * c:
            continue
        before, after = (
            timing.seconds(row['contenders']['auto']['training'])[0]
            for row in (few, many)
        )
        slope = math.log(after / before) / math.log(many['n'] / few['n'])
        slopes.append((abs(slope - 1), f'C={c}: slope {slope:.3f}', None))
    worst('large N: |slope of log time over log N - 1|', 0.1, slopes)
    return out


def gpu_goals(result: dict) -> list:
    """The same of what :func:`gpu.run` gives.

    ``worst`` and ``reached`` are None where nothing of a goal was measured.
    """
    out = []

    def add(goal, limit, rows, value_of):
        values = [(value_of(row), gpu.where(row), None) for row in rows]
        known = [case for case in values if case[0] is not None]
        if known:
            out.append(_worst(goal, limit, known))
        else:
            unknown = dict.fromkeys(('worst', 'where', 'by_flops', 'reached'))
            out.append(dict(goal=goal, limit=limit, **unknown))

    def of(part, regime):
        return [row for row in result[part] if row['regime'] == regime]

    def per_channel(row):
        _, c, h, w = row['shape']
        return h * w / c

    def ratio(name, unit, mode='training'):
        return lambda row: gpu.relative(row, name, unit, mode)

    def over_the_better(row):
        ratios = [ratio('auto', form)(row) for form in ('direct', 'gram')]
        return None if None in ratios else max(ratios)

    for regime, least, most, unit, limit in GPU_LAYER:
        rows = [
            row
            for row in of('layer', regime)
            if least <= per_channel(row) < most
        ]
        bounds = [f'{least:g}C <='] * (least > 0) + ['N']
        bounds += [f'< {most:g}C'] * (most < math.inf)
        place = ' '.join(bounds) if len(bounds) > 1 else 'anywhere'
        add(
            f'{regime}, {place}: auto / {unit}',
            limit,
            rows,
            ratio('auto', unit),
        )
    for regime in gpu.REGIMES:
        add(
            f'{regime}, anywhere: auto / the better form',
            1.1,
            of('layer', regime),
            over_the_better,
        )
        add(
            f'{regime}, anywhere: launches of the layer',
            GPU_LAUNCHES['layer'],
            of('layer', regime),
            lambda row: gpu.figure(row, 'auto', 'training', 'launches'),
        )
        add(
            f'{regime}, ResNet-50: launches of a fused block',
            GPU_LAUNCHES['fused'],
            of('resnet', regime),
            lambda row: gpu.launches_per_block(row, 'fused'),
        )
    for regime, mode, name, limit in GPU_RESNET:
        what = 'inference' if mode == 'forward' else mode
        add(
            f'{regime}, ResNet-50, {what}: {name} / plain',
            limit,
            of('resnet', regime),
            ratio(name, gpu.PLAIN, mode),
        )
    return out


def told(goals: list) -> str:
    """Give a line for each goal."""
    lines = []
    for goal in goals:
        if goal['reached'] is None:
            lines.append(f'NOT KNOWN {goal["goal"]} (limit {goal["limit"]})')
            continue
        flops = goal['by_flops']
        lines.append(
            f'{"reached " if goal["reached"] else "SHORT OF"} '
            f'{goal["goal"]}: {goal["worst"]:.3g} (limit {goal["limit"]}, '
            f'worst at {goal["where"]}'
            + (f', by operations {flops:.2f})' if flops else ')')
        )
    return '\n'.join(lines)
