"""IoU of Cityscapes (val) by the official scripts, from saved label maps.

    python tools/eval_cityscapes.py PRED_DIR GT_DIR

PRED_DIR has, in any sub-folder, one PNG <city>_<sequence>_<frame>*.png for
every picture, with label ids (road is 7, not 0), as the test server takes
them. GT_DIR is gtFine/val of the release. The numbers are those of
cityscapesscripts' evalPixelLevelSemanticLabeling.

The last line on stdout is a JSON object with mIoU and the IoU of each class:
fractions in [0, 1] with all their digits, null for a class that does not
occur.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
from PIL import Image


def parse_args():
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        'pred_dir', metavar='PRED_DIR', type=Path, help='folder of PNGs'
    )
    parser.add_argument(
        'gt_dir',
        metavar='GT_DIR',
        type=Path,
        help='folder of <city>/*_gtFine_{labelIds,instanceIds}.png',
    )
    parser.add_argument(
        '--json',
        type=Path,
        metavar='FILE',
        help='write the JSON object to a file, too',
    )
    return parser.parse_args()


def official():
    """Give the module of the official evaluation."""
    if not hasattr(np, 'in1d'):
        # cityscapesscripts 2.3.0 calls it, numpy 2.4 no longer has it.
        np.in1d = lambda x, *args, **kw: np.isin(np.ravel(x), *args, **kw)
    try:
        from cityscapesscripts.evaluation import (
            evalPixelLevelSemanticLabeling as module,
        )
    except ImportError as error:
        raise ValueError(f'{error}: pip install cityscapesscripts') from error
    return module


def pair(pred_dir: Path, gt_dir: Path) -> dict:
    """Path of every ground truth -> path of its prediction.

    Raises:
        ValueError: No ground truth, or not exactly one prediction for one.
    """
    truths = sorted(gt_dir.glob('*/*_gtFine_labelIds.png'))
    if not truths:
        raise ValueError(f'{gt_dir} has no <city>/*_gtFine_labelIds.png')
    if not pred_dir.is_dir():
        raise ValueError(f'{pred_dir} is not a folder')
    found = {}
    for file in sorted(pred_dir.rglob('*.png')):
        found.setdefault('_'.join(file.stem.split('_')[:3]), []).append(file)
    pairs = {}
    for truth in truths:
        name = '_'.join(truth.name.split('_')[:3])
        files = found.get(name, [])
        if len(files) != 1:
            raise ValueError(
                f'{pred_dir} has {len(files)} predictions {name}*.png for '
                f'{truth}, one was expected'
            )
        pairs[truth] = files[0]
    return pairs


def check(truth: Path, prediction: Path, known: set) -> set:
    """Check what the official script leaves to an index error.

    Returns:
        set: The ids in the prediction.

    Raises:
        ValueError: Another size, not one channel, or values that are no
            label ids.
    """
    image, expected = Image.open(prediction), Image.open(truth).size
    # Palettes are fine: their indices count.
    if image.size != expected or image.mode not in ('L', 'P'):
        raise ValueError(
            f'{prediction}: mode {image.mode}, width and height {image.size}; '
            f'one channel of 8 bits and {expected}, as in {truth}, were '
            'expected'
        )
    ids = set(np.unique(np.asarray(image)).tolist())
    strange = ids - known
    if strange:
        raise ValueError(
            f'{prediction}: values {sorted(strange)} are no label ids of '
            'Cityscapes, 0 to 33 (train ids have to be converted first)'
        )
    return ids


def check_ids(pred_dir: Path, ids: set, labels: list) -> None:
    """Check that ids can be label ids, where train ids are as small.

    A model that is trained on what is evaluated gives no other id, and train
    ids, 0 to 18, name void classes for road, sidewalk, building and others.

    Args:
        pred_dir: Where they are, for the message.
        ids: All that any prediction has.
        labels: Those of the official script.

    Raises:
        ValueError: They are train ids.
    """
    evaluated = {label.id for label in labels if not label.ignoreInEval}
    train = {label.trainId for label in labels if not label.ignoreInEval}
    void = sorted(ids - evaluated)
    if void and ids <= train:
        raise ValueError(
            f'{pred_dir}: the ids are {min(ids)} to {max(ids)}, and of them '
            f'{void} are never evaluated: train ids, expected label ids (road '
            'is 7, not 0)'
        )
    if void:
        print(
            f'eval_cityscapes.py: warning: {pred_dir} has pixels of the ids '
            f'{void}, which are never evaluated: each counts as wrong',
            file=sys.stderr,
        )


def main():
    """Evaluate."""
    args = parse_args()
    module = official()
    pairs = pair(args.pred_dir, args.gt_dir)
    known = {label.id for label in module.labels if label.id >= 0}
    ids = set()
    for truth, prediction in pairs.items():
        ids |= check(truth, prediction, known)
    check_ids(args.pred_dir, ids, module.labels)
    module.args.JSONOutput = False
    scores = module.evaluateImgLists(
        [str(file) for file in pairs.values()],
        [str(file) for file in pairs],
        module.args,
    )
    classes = {
        label.name: scores['classScores'][label.name]
        for label in module.labels
        if not label.ignoreInEval
    }
    result = {'mIoU': scores['averageScoreClasses'], **classes}
    line = json.dumps(
        {k: None if math.isnan(v) else v for k, v in result.items()}
    )
    print(line, flush=True)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(line + '\n')


if __name__ == '__main__':
    try:
        main()
    except (OSError, ValueError) as error:
        print(f'eval_cityscapes.py: error: {error}', file=sys.stderr)
        sys.exit(2)
