"""Draw what a model finds in one image or in a folder."""

import os
import sys
from pathlib import Path
from pkgutil import resolve_name

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if os.path.isdir(os.path.join(ROOT, 'polynl_mm')):
    # A checkout, installed or not; in a wheel the package lies around here.
    sys.path.insert(0, ROOT)

from polynl_mm import stack

stack.end_in_a_line()

import cv2
import numpy as np
from rich.progress import track

from polynl_mm.engine import checks, cli, start
from polynl_mm.engine.cli import StartError
from polynl_mm.engine.hosts import host_of, plain_loader
from polynl_mm.limits import MAX_PIXELS, decode_picture

SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.png', '.tif', '.tiff', '.webp')


def parse_args():
    """Parse the command line."""
    parser = cli.Parser(description=__doc__)
    parser.add_argument('images', help='an image, or a folder of images')
    parser.add_argument(
        'config', help='config file, or the name of one of polynl_mm'
    )
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '--out',
        required=True,
        help='folder for the results: pictures in vis/, label maps of mmseg '
        'in pred/, by the number of the picture in the folder, from 0',
    )
    parser.add_argument(
        '--score-thr',
        type=float,
        default=0.3,
        help='mmdet: least score of what is drawn',
    )
    parser.add_device()
    parser.add_argument(
        '--max-pixels',
        type=int,
        default=MAX_PIXELS,
        help='draw no image of more pixels; decoded, each takes 3 bytes',
    )
    parser.add_tiles()
    parser.add_config_options()
    return parser.parse_args()


def find_images(path, max_pixels):
    """Give the image, or those of the folder that may be images."""
    path = Path(path)
    if not path.exists():
        raise StartError(f'{path} does not exist')
    if not path.is_dir():
        check_image(path, max_pixels)
        return [str(path)]
    images = [
        str(file)
        for file in sorted(path.iterdir())
        if file.is_file()
        and (file.suffix.lower() in SUFFIXES or cv2.haveImageReader(str(file)))
    ]
    if not images:
        raise StartError(f'{path} has no images ({", ".join(SUFFIXES)})')
    return images


def check_image(path, max_pixels):
    """Decode an image as the hosts do, whose errors name no file.

    Raises:
        StartError: It is none, or none that they can draw on.
    """
    # Not for those who ask for --help alone.
    from mmcv import imfrombytes

    path = Path(path)
    try:
        content = path.read_bytes()
        pixels = decode_picture(content, path, imfrombytes, max_pixels)
    except (OSError, ValueError) as error:
        raise StartError(str(error)) from error
    if pixels.dtype != np.uint8:
        raise StartError(f'{path}: pixels are {pixels.dtype}, expected uint8')
    if not cv2.haveImageWriter(path.name):
        raise StartError(
            f'{path}: the drawing would have this name, and OpenCV writes no '
            f'{path.suffix or "file without suffix"}: rename it to .png'
        )


def main():
    """Draw; the exit code is 1 if some of the images could not be drawn."""
    args = parse_args()
    if args.device:
        checks.check_device(args.device)
    images = find_images(args.images, args.max_pixels)
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
    drawings = os.path.join(args.out, 'vis')
    checks.check_output('--out', drawings, folder=True)
    if os.path.samefile(drawings, os.path.dirname(images[0]) or '.'):
        raise StartError(
            f'--out {args.out}: the drawings in {drawings} would replace the '
            'images: give another folder'
        )
    infer = inferencer(model=cfg, weights=args.checkpoint, device=args.device)
    infer.show_progress = False
    options = {host.score_thr: args.score_thr} if host.score_thr else {}
    bad = 0
    for number, image in enumerate(track(images, 'Drawing')):
        # One by one, as the hosts keep the results of all that they are given.
        try:
            check_image(image, args.max_pixels)
        except StartError as error:
            bad += 1
            cli.say(f'not drawn: {error}')
            continue
        # By which mmseg names a label map.
        infer.num_pred_imgs = number
        infer(image, out_dir=args.out, **options)
    print(f'{len(images) - bad} pictures in {drawings}')
    if bad:
        cli.say(f'{bad} of {len(images)} pictures could not be drawn')
    return min(bad, 1)


if __name__ == '__main__':
    cli.run(main)
