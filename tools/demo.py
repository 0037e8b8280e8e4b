"""Draw what a model of mmdet or mmseg finds in one image or in a folder."""

import os
import sys
from pathlib import Path

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if os.path.isdir(os.path.join(ROOT, 'polynl_mm')):
    # A checkout, installed or not; in a wheel the package lies around here.
    sys.path.insert(0, ROOT)

import cv2
from mmcv.transforms import TRANSFORMS, LoadImageFromFile

from polynl_mm.engine import checks, cli, start
from polynl_mm.engine.cli import StartError

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


def inferencer_class(cfg):
    """Give the inferencer of the config's host."""
    host = cfg.get('default_scope')
    if host == 'mmdet':
        from mmdet.apis import DetInferencer

        return DetInferencer
    if host == 'mmseg':
        from mmseg.apis import MMSegInferencer

        return MMSegInferencer
    raise StartError(
        f'config {cfg.filename} has default_scope={host!r}, expected mmdet or '
        'mmseg'
    )


def plain_loader(cfg):
    """Name the loader of the test pipeline as the inferencers know it.

    They put their own in its place, but only in that of mmcv's.
    """
    for transform in cfg.test_dataloader.dataset.pipeline:
        kind = TRANSFORMS.get(transform.type)
        if kind is not None and issubclass(kind, LoadImageFromFile):
            transform.type = 'LoadImageFromFile'


def main():
    """Draw."""
    args = parse_args()
    images = find_images(args.images)
    cfg = start.read_config(args.config, args.cfg_options)
    checks.require(cfg, 'model', 'test_dataloader', 'visualizer')
    kind = inferencer_class(cfg)
    checks.check_checkpoint(cfg, args.checkpoint)
    plain_loader(cfg)
    # Nothing but the pictures below is to be stored.
    cfg.visualizer.vis_backends = None
    infer = kind(model=cfg, weights=args.checkpoint, device=args.device)
    options = {}
    if 'pred_score_thr' in kind.visualize_kwargs:
        options['pred_score_thr'] = args.score_thr
    infer(images, out_dir=args.out, **options)
    print(f'{len(images)} pictures in {os.path.join(args.out, "vis")}')


if __name__ == '__main__':
    cli.run(main)
