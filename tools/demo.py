"""Draw what a model of mmdet or mmseg finds in one image or in a folder."""

import os
import sys
from pathlib import Path
from pkgutil import resolve_name

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if os.path.isdir(os.path.join(ROOT, 'polynl_mm')):
    # A checkout, installed or not; in a wheel the package lies around here.
    sys.path.insert(0, ROOT)

import cv2

from polynl_mm.engine import checks, cli, start
from polynl_mm.engine.cli import StartError
from polynl_mm.engine.hosts import host_of, plain_loader

SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.png', '.tif', '.tiff', '.webp')


def parse_args():
    """Parse the command line."""
    parser = cli.Parser(description=__doc__)
    parser.add_argument('images', help='an image, or a folder of images')
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '--out',
        required=True,
        help='folder for the results: pictures in vis/, label maps of mmseg '
        'in pred/',
    )
    parser.add_argument(
        '--score-thr',
        type=float,
        default=0.3,
        help='mmdet: least score of what is drawn',
    )
    parser.add_argument(
        '--device', help='such as cuda:0 or cpu; by default a GPU if any'
    )
    parser.add_tiles()
    parser.add_config_options()
    return parser.parse_args()


def find_images(path):
    """Give the image or the images of the folder, all of them readable."""
    path = Path(path)
    if not path.exists():
        raise StartError(f'{path} does not exist')
    images = [path]
    if path.is_dir():
        images = [
            file
            for file in sorted(path.iterdir())
            if file.suffix.lower() in SUFFIXES
        ]
        if not images:
            raise StartError(f'{path} has no images ({", ".join(SUFFIXES)})')
    for image in images:
        if not cv2.haveImageReader(str(image)):
            raise StartError(f'{image} is not an image that OpenCV can read')
    return [str(image) for image in images]


def main():
    """Draw."""
    args = parse_args()
    images = find_images(args.images)
    cfg = start.read_config(args.config, args.cfg_options)
    checks.require(cfg, 'model', 'test_dataloader', 'visualizer')
    host = host_of(cfg)
    inferencer = resolve_name(host.inferencer)
    if args.tile is not None:
        data = list(checks.leaf_datasets(cfg.test_dataloader))
        host.tile(cfg, data, args.tile, args.overlap)
    checks.check_checkpoint(cfg, args.checkpoint)
    plain_loader(cfg)
    # Nothing but the pictures below is to be stored.
    cfg.visualizer.vis_backends = None
    infer = inferencer(model=cfg, weights=args.checkpoint, device=args.device)
    options = {host.score_thr: args.score_thr} if host.score_thr else {}
    infer(images, out_dir=args.out, **options)
    print(f'{len(images)} pictures in {os.path.join(args.out, "vis")}')


if __name__ == '__main__':
    cli.run(main)
