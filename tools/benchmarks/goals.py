"""What one Poly-NL layer should cost, and where it comes closest to that."""

from __future__ import annotations

import math

from . import timing
from .layer import UNIT, relative, where
from .timing import MODES


def goals(rows: list) -> list:
    """Each goal with the worst case of the table, and whether it is reached.

    ``by_flops`` is what a ratio of two times would be there if time were
    floating point operations alone.
    """
    out = []

    def worst(goal, limit, cases, at_most=True):
        """Of ``cases``: (value, where, ratio of operations or None)."""
        if not cases:
            return
        value, where, by_flops = (max if at_most else min)(cases)
        out.append(
            dict(
                goal=goal,
                limit=limit,
                worst=value,
                where=where,
                by_flops=by_flops,
                reached=value <= limit if at_most else value >= limit,
            )
        )

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
