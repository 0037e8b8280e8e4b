"""Draw where a Poly-NL layer looks from chosen points of a picture.

For each point a picture with a mark at it, and beside it what each position
adds there to the branch of the layer, along that branch: red adds, blue takes
away, nothing is drawn at 0. The sum is the length of the branch.
"""

import os
import sys
from pathlib import Path

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if os.path.isdir(os.path.join(ROOT, 'polynl_mm')):
    # A checkout, installed or not; in a wheel the package lies around here.
    sys.path.insert(0, ROOT)

from polynl_mm import stack

stack.end_in_a_line()

import cv2
import numpy as np
from mmengine.device import get_device
from mmengine.runner import load_checkpoint

from polynl_mm.engine import checks, cli, start
from polynl_mm.engine.cli import StartError

GAP = 4


def parse_args():
    """Parse the command line."""
    parser = cli.Parser(description=__doc__)
    parser.add_argument('image', help='a picture')
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '--at',
        required=True,
        action='append',
        nargs=2,
        type=int,
        metavar=('X', 'Y'),
        help='a point, in pixels of the picture from its top left; may be '
        'given several times',
    )
    parser.add_argument(
        '--out',
        required=True,
        help='folder for <picture>_<x>_<y>.png; --layer, --call and --of '
        'class, where they are given, go before the .png: '
        '<picture>_<x>_<y>_<PATH>_call<K>_class.png',
    )
    parser.add_argument(
        '--layer',
        metavar='PATH',
        help='of the layer in the model, such as decode_head.poly_nl; by '
        'default the last',
    )
    parser.add_argument(
        '--call',
        type=int,
        metavar='K',
        help='which of its calls, from 0, of a layer that is called several '
        'times (levels of a pyramid)',
    )
    parser.add_argument(
        '--of',
        choices=('branch', 'class'),
        default='branch',
        help='what is added to: the branch at the point, or, to first order, '
        'the score of the class found there (mmseg, classifiers)',
    )
    parser.add_argument(
        '--beside',
        nargs=2,
        metavar=('CONFIG', 'CHECKPOINT'),
        help='another model, of which the same is drawn beside; where it has '
        'no such --layer, of its last Poly-NL layer, or what its last '
        'NonLocal2d attends to',
    )
    parser.add_device()
    parser.add_config_options()
    return parser.parse_args()


def options_for(config, options):
    """Give those of the settings that have a place in another config."""
    cfg = start.read_config(config)
    fitting = {}
    for key, value in options.items():
        place = cfg
        try:
            for part in key.split('.')[:-1]:
                place = place[int(part) if part.isdigit() else part]
        except (KeyError, IndexError, TypeError):
            cli.say(f'{config} has no place for --cfg-options {key}')
        else:
            fitting[key] = value
    return fitting


def load(cfg, checkpoint, device):
    """Build a model, with its weights, to be looked at."""
    model = checks.build_model(cfg)
    load_checkpoint(model, checkpoint, map_location='cpu', logger='silent')
    model.to(device).eval()
    return model


def main():
    """Look, and draw."""
    args = parse_args()
    device = args.device or get_device()
    checks.check_device(device)
    models = [(args.config, args.checkpoint, args.cfg_options)]
    if args.beside:
        options = options_for(args.beside[0], args.cfg_options or {})
        models.append((*args.beside, options))
    jobs = []
    for config, checkpoint, options in models:
        cfg = start.read_config(config, options)
        checks.require(cfg, 'model', 'test_dataloader')
        checks.check_checkpoint(cfg, checkpoint)
        jobs.append((cfg, checkpoint))
    # Bound to mmcv, which has its say before it is imported.
    from polynl_mm.engine.influence import Picture, draw, name_of, views

    score = None
    if args.of == 'class':
        score = lambda scores, point: scores.max()  # noqa: E731
    seen = []
    for cfg, checkpoint in jobs:
        try:
            picture = Picture(cfg, args.image)
            picture.check(args.at)
            model = load(cfg, checkpoint, device)
            layer = args.layer
            if seen and layer and layer not in dict(model.named_modules()):
                cli.say(f'{cfg.filename} has no {layer}: its last is drawn')
                layer = None
            found = views(model, picture, args.at, layer, args.call, score)
        except (OSError, ValueError) as error:
            raise StartError(f'{args.image}, {cfg.filename}: {error}') from (
                error
            )
        print(f'{cfg.filename}: {found.layer}')
        seen.append(found)
    checks.check_output('--out', args.out, folder=True)
    for k, (x, y) in enumerate(args.at):
        panels = [draw(picture.pixels, None, (x, y))]
        panels += [draw(picture.pixels, f.maps[k], (x, y)) for f in seen]
        gap = np.full((len(picture.pixels), GAP, 3), 255, np.uint8)
        row = np.hstack([each for p in panels for each in (p, gap)][:-1])
        name = name_of(
            *(Path(args.image).stem, (x, y), args.layer, args.call),
            None if args.of == 'branch' else args.of,
        )
        path = Path(args.out) / f'{name}.png'
        if not cv2.imwrite(str(path), row[..., ::-1]):
            raise StartError(f'{path} can not be written')
        print(f'{path}: sum {seen[0].sums[k]:.4g}')


if __name__ == '__main__':
    cli.run(main)
