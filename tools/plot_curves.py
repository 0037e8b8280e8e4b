"""Draw the curves of trainings: loss, metrics, and what Poly-NL layers do.

Of each work directory those of the newest run, and of the runs that it was
resumed from. In one panel each: the loss, the metrics of the validation, and
of the layers alpha, beta, the branch's share of the output, and the spread of
the gate (polynl_mm.PolyNLHook).

A run is taken for a resumed one if its checkpoint was in the work directory,
or in the folder that the CheckpointHook's out_dir gives it; runs before one
that was resumed from elsewhere are left out, and a line says so.

A validation is drawn at its iteration. Of a training by epochs the log must
have lines of two epochs in a row for that, or fit the length that an epoch had
in the run before; else it is drawn at the iteration that was logged last
before it.
"""

import json
import math
import os
import sys
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if os.path.isdir(os.path.join(ROOT, 'polynl_mm')):
    # A checkout, installed or not; in a wheel the package lies around here.
    sys.path.insert(0, ROOT)

from polynl_mm import stack

stack.end_in_a_line()

import matplotlib

matplotlib.use('Agg')
from matplotlib import pyplot as plt
from matplotlib.backend_bases import FigureCanvasBase
from mmengine.config import Config

from polynl_mm.engine import checks, cli
from polynl_mm.engine.cli import StartError

# By the ends of the keys of the hook; with what the panel is called.
LAYERS = {
    '.alpha': 'alpha',
    '.beta': 'beta',
    '.share': 'share of the branch, |branch| / |Y|',
    '.gate_spread': 'spread of the gate',
}
# Keys of a training's line that say when and how fast.
TIMES = ('step', 'iter', 'epoch', 'time', 'data_time', 'memory')
# Lines of one training differ by these.
STYLES = ('-', '--', ':', '-.')


def parse_args():
    """Parse the command line."""
    parser = cli.Parser(description=__doc__)
    parser.add_argument(
        'work_dirs', nargs='+', metavar='WORK_DIR', help='of a training'
    )
    parser.add_argument(
        '--keys',
        nargs='+',
        metavar='GLOB',
        help="which keys of vis_data/scalars.json, as 'mIoU' or '*.beta'; by "
        'default the loss, all metrics and all of the layers',
    )
    parser.add_argument(
        '--out', required=True, help='the picture, .png, .pdf or .svg'
    )
    return parser.parse_args()


def runs(work_dir):
    """Give the scalars of the newest run and of those before it, in order."""
    files = sorted(Path(work_dir).glob('*/vis_data/scalars.json'))
    if not files:
        raise StartError(
            f'{work_dir} has no <time of the start>/vis_data/scalars.json: it '
            'is no work directory of a training, or nothing was logged yet'
        )
    found = []
    for file in reversed(files):
        found.insert(0, file)
        # As mmengine has written it for this run.
        config = file.parent / 'config.py'
        if not config.is_file():
            break
        cfg = read(config)
        if not cfg.get('resume'):
            break
        # None is the newest one of the work directory.
        source = cfg.get('load_from')
        if source and not is_own(source, work_dir, cfg):
            if len(found) < len(files):
                cli.say(
                    f'{file.parent.parent} was resumed from {source}, which '
                    f'is not of {work_dir}: the runs before it are left out'
                )
            break
    return found


def read(config):
    """Read the config of a run."""
    try:
        return Config.fromfile(config, import_custom_modules=False)
    except Exception as error:  # it is Python, and raises all kinds
        raise StartError(
            f'{config} can not be read: {error}; without that file the run '
            'counts as one that was not resumed'
        ) from error


def is_own(checkpoint, work_dir, cfg):
    """Whether a checkpoint lies where the runs of a work directory save."""
    # Relative paths, and a work directory that was moved since: as it was
    # called then, too.
    folders = {str(work_dir), cfg.get('work_dir') or str(work_dir)}
    hook = (cfg.get('default_hooks') or {}).get('checkpoint') or {}
    if hook.get('out_dir'):
        names = [os.path.basename(os.path.normpath(each)) for each in folders]
        folders |= {os.path.join(hook['out_dir'], name) for name in names}
    path = os.path.realpath(os.path.expanduser(checkpoint))
    return os.path.dirname(path) in map(os.path.realpath, folders)


def lines(file):
    """Give the lines of a file of scalars, each a dict."""
    found = []
    for number, text in enumerate(file.read_text().splitlines(True), 1):
        try:
            line = json.loads(text)
            line['step'] + 0
        except (ValueError, TypeError, KeyError) as error:
            if isinstance(error, ValueError) and not text.endswith('\n'):
                # A training that was killed, or had no room left.
                cli.say(f'{file}, line {number} is cut off: passed over')
                break
            raise StartError(
                f'{file}, line {number}: expected a JSON object with a step, '
                f'got {text.rstrip()[:60]!r}'
            ) from error
        found.append(line)
    return found


def is_validation(line):
    """Whether a line is one of metrics."""
    layers = any(key.startswith('poly_nl/') for key in line)
    return not layers and not {'iter', 'lr'} & {*line}


def first_lines(log):
    """Give epoch -> iteration of its first line."""
    first = {}
    for line in log:
        if 'epoch' in line and not is_validation(line):
            first.setdefault(line['epoch'], line['step'])
    return first


def epoch_length(log):
    """Tell how many iterations an epoch of a run has; None if not known.

    Within each epoch the first line is of the same iteration, but for one
    that a run was resumed in.

    Args:
        log: The lines of the run.
    """
    first = first_lines(log)
    for epoch in sorted(first, reverse=True):
        if epoch - 1 in first:
            return first[epoch] - first[epoch - 1]
    return None


def begin_of(log, begun, length):
    """Tell where a run began.

    Args:
        log: The lines of the run.
        begun: What this has given of the runs before it.
        length: Of an epoch of this run; None if that is not known.

    Returns:
        tuple: How many epochs and iterations were done, and the length. The
        iterations are None where they are not known.
    """
    # Without lines of training the first is a validation's.
    epochs = [*first_lines(log)] or [line['step'] for line in log]
    done = min(epochs, default=1) - 1
    before = [run for run in begun if run[0] <= done]
    epoch, begin, each = before[-1] if before else (0, 0, length)
    if begin is None or each is None and epoch != done:
        return done, None, length
    return done, begin + (done - epoch) * (each or 0), length


def places(log, by_epoch, run):
    """Give the iteration of each line of a run, None where it is not known.

    The step of a validation is an iteration or, where the training counts
    epochs, the epoch that has ended.

    Args:
        log: The lines.
        by_epoch: Whether the training counts epochs.
        run: See :func:`begin_of`.
    """
    done, begin, length = run
    shown = [line['step'] for line in log if not is_validation(line)]
    # Nothing is without a line for longer.
    steps = shown if begin is None else [begin, *shown]
    gap = max((b - a for a, b in zip(steps, steps[1:])), default=math.inf)
    # That of the line of training before, at the beginning of the one after.
    epoch = next(
        (line['epoch'] for line in log if 'epoch' in line),
        math.inf if by_epoch else None,
    )
    now, later = begin or 0, [*shown, math.inf]
    for line in log:
        step = line['step']
        if not is_validation(line):
            epoch = line.get('epoch', epoch)
            now = later.pop(0)
            yield step
        elif epoch is None or step > epoch:
            # Without epochs a host may write 0.
            yield step or None
        elif begin is None or length is None:
            yield None
        else:
            end = begin + (step - done) * length
            # Else the length is not that of this run, or it began within an
            # epoch.
            fits = now <= end < min(later[0], now + gap)
            yield end if fits else None


def curves(work_dir):
    """Read the curves of a training.

    Returns:
        dict: key -> {iteration: value}, and the set of those that are
        metrics.
    """
    found, metrics = {}, set()
    logs = [lines(file) for file in runs(work_dir)]
    by_epoch = any('epoch' in line for log in logs for line in log)
    begun, length = [], None
    for log in logs:
        # Another batch size, or number of processes, makes another length.
        length = epoch_length(log) or length
        begun.append(begin_of(log, begun, length))
        steps = [*places(log, by_epoch, begun[-1])]
        # What a killed run had done beyond the checkpoint that this one went
        # on from was done again; not what a validation comes after.
        begin = min(
            (s + is_validation(line) for s, line in zip(steps, log) if s),
            default=math.inf,
        )
        for points in found.values():
            for later in [each for each in points if each >= begin]:
                del points[later]
        now = max(
            (each for points in found.values() for each in points), default=0
        )
        for line, step in zip(log, steps):
            # Where it is not known, at the iteration that was logged last.
            now = step or now
            add(found, line, now)
            if is_validation(line):
                metrics |= {key for key in line if is_curve(key, line)}
    return found, metrics


def add(found, line, step):
    """Add the values of a line to the curves."""
    for key, value in line.items():
        if is_curve(key, line):
            found.setdefault(key, {})[step] = value


def is_curve(key, line):
    """Whether a key of a line is that of a curve."""
    return key not in TIMES and isinstance(line[key], (int, float))


def panel_of(key, metrics):
    """Name the panel that a key is drawn in."""
    if key.startswith('poly_nl/'):
        for end, name in LAYERS.items():
            if key.endswith(end):
                return name
    if key in metrics:
        return 'metrics of the validation'
    return 'loss' if 'loss' in key else key


def chosen(trainings, patterns):
    """Give the panels: name -> keys, in order.

    Raises:
        StartError: No training has a key that a pattern fits.
    """
    keys = list(dict.fromkeys(k for found, _ in trainings for k in found))
    metrics = set().union(*(metrics for _, metrics in trainings))
    if patterns:
        wanted = []
        for pattern in patterns:
            fitting = [key for key in keys if fnmatchcase(key, pattern)]
            if not fitting:
                near = get_close_matches(pattern, keys, n=5, cutoff=0.3)
                raise StartError(
                    f'--keys {pattern}: no such key; nearest: '
                    f'{", ".join(near or keys[:5])}'
                )
            wanted += fitting
    else:
        wanted = [
            key
            for key in keys
            if key == 'loss' or key in metrics or key.startswith('poly_nl/')
        ]
    order = ('loss', 'metrics of the validation', *LAYERS.values())
    order = {name: number for number, name in enumerate(order)}
    panels = {}
    for key in dict.fromkeys(wanted):
        panels.setdefault(panel_of(key, metrics), []).append(key)
    return dict(
        sorted(panels.items(), key=lambda item: order.get(item[0], len(order)))
    )


def short(key):
    """Name a curve within its panel."""
    key = key.removeprefix('poly_nl/')
    for end in LAYERS:
        key = key.removesuffix(end)
    return key


def main():
    """Read, draw."""
    args = parse_args()
    kinds = FigureCanvasBase.get_supported_filetypes()
    if Path(args.out).suffix[1:].lower() not in kinds:
        raise StartError(
            f'--out {args.out}: expected a name that ends in one of '
            f'.{", .".join(kinds)}'
        )
    trainings = [curves(work_dir) for work_dir in args.work_dirs]
    panels = chosen(trainings, args.keys)
    if not panels:
        raise StartError(
            f'{", ".join(args.work_dirs)}: nothing that is drawn by default '
            'was logged: give --keys'
        )
    checks.check_output('--out', args.out)
    figure, axes = plt.subplots(
        len(panels),
        figsize=(8, 2.4 * len(panels)),
        sharex=True,
        squeeze=False,
        layout='constrained',
    )
    names = [os.path.normpath(each) for each in args.work_dirs]
    for (title, keys), axis in zip(panels.items(), axes[:, 0]):
        for k, (name, (found, _)) in enumerate(zip(names, trainings)):
            for i, key in enumerate(keys):
                points = found.get(key)
                if not points:
                    continue
                label = name if len(keys) == 1 else f'{name}: {short(key)}'
                axis.plot(
                    *zip(*sorted(points.items())),
                    STYLES[i % len(STYLES)],
                    color=f'C{k}',
                    marker='.' if len(points) < 20 else None,
                    linewidth=1,
                    label=label,
                )
        axis.set_title(title, fontsize='small', loc='left')
        axis.legend(fontsize='xx-small')
        axis.grid(alpha=0.3)
    axes[-1, 0].set_xlabel('iteration')
    figure.savefig(args.out)
    print(f'{sum(map(len, panels.values()))} keys in {args.out}')


if __name__ == '__main__':
    cli.run(main)
