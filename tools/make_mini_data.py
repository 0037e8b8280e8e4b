#!/usr/bin/env python
"""The command of ``projects/mini_data``, whose description it prints."""

import argparse
import os
import sys
from pathlib import Path

# In a wheel the project lies in polynl_mm/projects, beside this folder.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / 'projects'))

import mini_data
from mini_data import SPLITS, UserError
from mini_data.build import DATASETS, build


def number_from(least: int):
    """Argparse type: an integer that is not below ``least``."""

    def parse(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(
                f'{value} is below {least}, expected no less'
            )
        return value

    parse.__name__ = 'integer'
    return parse


def parse_args(argv=None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=mini_data.__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    names = parser.add_subparsers(dest='dataset', required=True)
    for name, dataset in DATASETS.items():
        sub = names.add_parser(
            name,
            description=dataset.make.__doc__,
            formatter_class=argparse.RawTextHelpFormatter,
        )
        sub.add_argument('--out', type=Path, required=True, metavar='DIR')
        sub.add_argument('--seed', type=number_from(0), required=True)
        for split in SPLITS:
            default = getattr(dataset, split)
            sub.add_argument(
                f'--{split}',
                type=number_from(2),
                default=default,
                metavar='N',
                help=f'pictures for {split}, at least 2 ({default})',
            )
    return parser.parse_args(argv)


def main(argv=None) -> None:
    """Make what the command line asks for and say what was done."""
    args = parse_args(argv)
    sizes = {split: getattr(args, split) for split in SPLITS}
    try:
        # Where a link leads to, as a folder takes the place of no link.
        out = Path(os.path.realpath(args.out))
        made = build(args.dataset, out, args.seed, sizes)
    except (UserError, OSError) as error:
        sys.exit(f'make_mini_data.py: {error}')
    state = 'made' if made else 'up to date'
    print(
        f'{args.out}: {args.dataset} {state}, '
        f'{args.train} train and {args.val} val pictures, seed {args.seed}'
    )


if __name__ == '__main__':
    main()
