"""Average precision of WIDER Face (val) from the text files of any detector.

    python tools/eval_wider_face.py PRED_DIR GT_DIR

PRED_DIR has a file event/name.txt for every picture, as official tools
write them: the name of the picture, the number of detections, and for each a
line 'left top width height score', in any order, scores of any range. GT_DIR
is ground_truth/ of the official eval_tools.

The last line on stdout is a JSON object with easy, medium and hard: fractions
in [0, 1] with all their digits, null where a setting keeps no face. Boxes that
are fractions of the picture, or meet faces only as x1 y1 x2 y2, are an error.
"""

import argparse
import json
import math
import os
import sys
from functools import partial
from pathlib import Path

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if os.path.isdir(os.path.join(ROOT, 'polynl_mm')):
    # A checkout, installed or not; in a wheel the package lies around here.
    sys.path.insert(0, ROOT)

from polynl_mm import stack

stack.end_in_a_line()

from tqdm import tqdm

from polynl_mm.faces.ap import average_precision, misread, precision_recall
from polynl_mm.faces.files import load_wider_face_gt, read_predictions

# AP that no detector stays below that has learnt anything.
LOW = 0.05


def parse_args():
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        'pred_dir', metavar='PRED_DIR', help='folder of the event folders'
    )
    parser.add_argument(
        'gt_dir',
        metavar='GT_DIR',
        help='folder of wider_face_val.mat and wider_*_val.mat',
    )
    parser.add_argument(
        '--missing-as-empty',
        action='store_true',
        help='take a missing file for one without detections, as the MATLAB '
        'toolbox does',
    )
    parser.add_argument(
        '--json',
        type=Path,
        metavar='FILE',
        help='write the JSON object to a file, too',
    )
    parser.add_argument(
        '--plot',
        type=Path,
        metavar='FILE.png',
        help='draw the curves of precision over recall',
    )
    return parser.parse_args()


def check_pixels(pred_dir, predictions):
    """Refuse boxes that are fractions of the picture instead of pixels."""
    most = max(
        (abs(rows[:, :4]).max() for rows in predictions.values() if len(rows)),
        default=math.inf,
    )
    # No face is a pixel wide in a picture of a pixel.
    if most <= 1:
        raise ValueError(
            f'{pred_dir}: no left, top, width or height is above 1, expected '
            'pixels of the original picture, not fractions of it'
        )


def check_layout(pred_dir, gt, predictions, ap):
    """Say what a very low AP comes from, if it can be seen."""
    if any(value >= LOW for value in ap.values()):
        return
    met, layout = misread(gt, predictions)
    said = (
        f'{pred_dir}: {met} of {len(gt.boxes)} faces are met by a detection '
        '(IoU of at least 0.5)'
    )
    if layout:
        raise ValueError(
            f'{said}, and as {layout} many more: expected left top width '
            'height'
        )
    print(f'eval_wider_face.py: warning: {said}', file=sys.stderr)


def draw(curves, ap, file):
    """Draw precision over recall of the settings into a picture file."""
    # Needs no display, and is not worth its time where nothing is drawn.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 5), layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(
        xlabel='recall',
        ylabel='precision',
        xlim=(0, 1),
        ylim=(0, 1.01),
        title='WIDER Face, val',
    )
    for setting, curve in curves.items():
        # Without the thresholds that no detection reaches.
        begun = curve.precision > 0
        axes.plot(
            curve.recall[begun],
            curve.precision[begun],
            label=f'{setting}: AP {ap[setting]:.4f}',
        )
    axes.grid(alpha=0.3)
    axes.legend(loc='lower left')
    figure.savefig(file, dpi=150)


def main():
    """Evaluate."""
    args = parse_args()
    # None is quiet where stderr is no terminal.
    track = partial(tqdm, disable=None, unit='picture', leave=False)
    for file in filter(None, (args.json, args.plot)):
        file.parent.mkdir(parents=True, exist_ok=True)

    gt = load_wider_face_gt(args.gt_dir)
    predictions = read_predictions(
        args.pred_dir,
        gt.images,
        args.missing_as_empty,
        partial(track, desc='reading'),
    )
    check_pixels(args.pred_dir, predictions)
    counts = [len(rows) for rows in predictions.values()]
    print(
        f'{len(counts)} pictures, {sum(counts)} detections in '
        f'{sum(map(bool, counts))} of them',
        file=sys.stderr,
    )
    curves = precision_recall(
        gt, predictions, track=partial(track, desc='matching')
    )
    ap = {name: average_precision(curve) for name, curve in curves.items()}
    check_layout(args.pred_dir, gt, predictions, ap)
    result = json.dumps(
        {
            name: None if math.isnan(value) else value
            for name, value in ap.items()
        }
    )
    print(result, flush=True)
    if args.json:
        args.json.write_text(result + '\n')
    if args.plot:
        draw(curves, ap, args.plot)


if __name__ == '__main__':
    try:
        main()
    except (OSError, ValueError) as error:
        print(f'eval_wider_face.py: error: {error}', file=sys.stderr)
        sys.exit(2)
