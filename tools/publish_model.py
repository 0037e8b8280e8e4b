"""Publish a checkpoint of a training: its weights, and what they are.

OUT-XXXXXXXX.pth, with the first eight digits of its SHA-256, holds the
state_dict and plain meta alone, and so torch's safe loader reads it where
nothing of this package is installed. What it is made from is read safely, too.
"""

import hashlib
import io
import os
import sys
from collections import OrderedDict

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if os.path.isdir(os.path.join(ROOT, 'polynl_mm')):
    # A checkout, installed or not; in a wheel the package lies around here.
    sys.path.insert(0, ROOT)

from polynl_mm import stack

stack.end_in_a_line()

import numpy as np
import torch

from polynl_mm.engine import checkpoints, checks, cli
from polynl_mm.engine.cli import StartError
from polynl_mm.engine.safe_load import read_checkpoint, reason


def parse_args():
    """Parse the command line."""
    parser = cli.Parser(description=__doc__)
    parser.add_argument('checkpoint', metavar='IN', help='checkpoint file')
    parser.add_argument(
        'out',
        metavar='OUT',
        help='where to put it; the digits go before .pth. In a folder, which '
        'is there or is written with a / at its end, the name is that of IN',
    )
    return parser.parse_args()


def weights(state_dict, path):
    """Give tensors that are no part of larger ones, and their versions."""
    for name, value in state_dict.items():
        if not isinstance(value, torch.Tensor):
            raise StartError(
                f'checkpoint {path}: its state_dict holds a '
                f'{type(value).__name__} as {name!r}, expected tensors alone'
            )
    published = OrderedDict(
        (name, value.detach().clone()) for name, value in state_dict.items()
    )
    # Some modules read an old checkpoint by the versions in here.
    if hasattr(state_dict, '_metadata'):
        published._metadata = plain(state_dict._metadata, 'versions')
    return published


def plain(value, where):
    """Give it in Python's own types; what has none is told and left out."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, dict):
        pairs = {
            key: plain(each, f'{where}[{key!r}]')
            for key, each in value.items()
        }
        return {k: v for k, v in pairs.items() if v is not None}
    if isinstance(value, (list, tuple)):
        kind = tuple if isinstance(value, tuple) else list
        return kind(plain(each, where) for each in value)
    if isinstance(value, (str, bool, int, float)) or value is None:
        return value
    cli.say(f'left out: {where}, a {type(value).__name__}')
    return None


def main():
    """Publish."""
    args = parse_args()
    checks.check_exists(args.checkpoint)
    try:
        found = read_checkpoint(args.checkpoint)
    except Exception as error:  # torch raises all kinds on a damaged file
        raise StartError(
            f'checkpoint {args.checkpoint} can not be read: {reason(error)}'
        ) from error
    if not isinstance(found, dict) or not isinstance(
        found.get('state_dict'), dict
    ):
        raise StartError(
            f'checkpoint {args.checkpoint} has no state_dict, as mmengine '
            'saves one'
        )
    buffer = io.BytesIO()
    torch.save(
        dict(
            meta=plain(found.get('meta', {}), 'meta'),
            state_dict=weights(found['state_dict'], args.checkpoint),
        ),
        buffer,
    )
    content = buffer.getvalue()
    digits = hashlib.sha256(content).hexdigest()[:8]
    folder, name = os.path.split(args.out)
    if not name or os.path.isdir(args.out):
        folder, name = args.out, os.path.basename(args.checkpoint)
    out = os.path.join(folder, f'{name.removesuffix(".pth")}-{digits}.pth')
    checks.check_output('OUT', out)
    checkpoints.WholeFiles().put(content, out)
    gone = ', '.join(sorted(set(found) - {'meta', 'state_dict'})) or 'nothing'
    print(f'{out}: {len(content):,} bytes; left out: {gone}')


if __name__ == '__main__':
    cli.run(main)
