"""Check what a training with --amp did after steps with infinite gradients.

    python tools/check_loss_scaling.py BEFORE AFTER SCALE

BEFORE is the checkpoint that the training started from (load_from), AFTER the
one that it saved, and SCALE the factor of the loss that it began with, one so
large that the first gradients overflow. The GradScaler has to have skipped
those steps, and to have come down by it; the steps after them have to have
moved every parameter of the Poly-NL layers, and left all of the model finite.
Says in a line what was found; the exit code is 1 if it is not so.
"""

import argparse
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if os.path.isdir(os.path.join(ROOT, 'polynl_mm')):
    # A checkout, installed or not; in a wheel the package lies around here.
    sys.path.insert(0, ROOT)

from polynl_mm import stack

stack.end_in_a_line()

import torch
from mmengine.runner.checkpoint import CheckpointLoader

from polynl_mm.engine import safe_load  # noqa: F401  (checkpoints load safely)


def skipped_steps(before: dict, after: dict, scale: float) -> str:
    """Say how many steps were skipped, if that and the rest is as it should.

    Args:
        before (dict): State dict of the model at the start.
        after (dict): Checkpoint of mmengine at the end, of one optimizer that
            counts its steps (Adam's kind).
        scale (float): Factor of the loss at the start.

    Raises:
        ValueError: It is not as it should be; the message says what.
    """
    iterations = after['meta']['iter']
    optimizer = after['optimizer']
    if not optimizer.get('loss_scaler'):
        raise ValueError('the loss was not scaled: not a training with --amp')
    end = optimizer['loss_scaler']['scale']
    if not 0 < end < scale:
        raise ValueError(
            f'the scale went from {scale:g} to {end:g}, not down, as it must'
        )
    # Without those that were skipped.
    steps = [int(state['step']) for state in optimizer['state'].values()]
    taken = max(steps, default=0)
    if not 0 < taken < iterations:
        raise ValueError(
            f'{taken} of {iterations} steps were taken, expected some, but '
            'not all'
        )
    weights = after['state_dict']
    broken = [k for k, v in weights.items() if not v.isfinite().all()]
    if broken:
        raise ValueError(
            f'not finite: {", ".join(broken[:3])} ..., as all weights must be'
        )
    layers = [k for k in weights if 'poly_nl' in k]
    still = [k for k in layers if torch.equal(weights[k], before[k])]
    if still:
        raise ValueError(
            f'did not move: {", ".join(still[:3])} ..., as all parameters of '
            'Poly-NL layers must'
        )
    return (
        f'{iterations - taken} of {iterations} steps skipped, scale '
        f'{scale:g} -> {end:g}; all is finite, all of {len(layers)} '
        'parameters of Poly-NL layers moved'
    )


def main():
    """Check."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('before', help='checkpoint at the start')
    parser.add_argument('after', help='checkpoint at the end')
    parser.add_argument('scale', type=float, help='of the loss at the start')
    args = parser.parse_args()
    before, after = (
        CheckpointLoader.load_checkpoint(path, 'cpu', 'silent')
        for path in (args.before, args.after)
    )
    try:
        print(skipped_steps(before['state_dict'], after, args.scale))
    except ValueError as error:
        sys.exit(f'{parser.prog}: error: {error}')


if __name__ == '__main__':
    main()
