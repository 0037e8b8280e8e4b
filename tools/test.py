"""Evaluate a checkpoint of mmdet, mmseg or recognition, on GPUs or without."""

import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if os.path.isdir(os.path.join(ROOT, 'polynl_mm')):
    # A checkout, installed or not; in a wheel the package lies around here.
    sys.path.insert(0, ROOT)

from polynl_mm import stack

stack.end_in_a_line()

from mmengine.config import ConfigDict
from mmengine.registry import METRICS

from polynl_mm.engine import checks, cli, start
from polynl_mm.engine.cli import StartError
from polynl_mm.engine.hooks import PolyNLHook
from polynl_mm.engine.hosts import host_of
from polynl_mm.engine.runner import ClassesHook


def parse_args():
    """Parse the command line."""
    parser = cli.Parser(description=__doc__)
    parser.add_job()
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '--out',
        metavar='PATH',
        help='save the predictions: mmdet: to this .pkl or .pickle file; '
        'mmseg: as label maps into this folder; classifiers: scores to a '
        '.pkl or .pickle file',
    )
    parser.add_argument(
        '--show', action='store_true', help='show predictions in a window'
    )
    parser.add_argument(
        '--show-dir',
        help='draw predictions into this folder (mmdet: below the work '
        'directory and the time of the run; mmseg: at the interval of the '
        "config's SegVisualizationHook)",
    )
    parser.add_argument(
        '--wait-time',
        type=float,
        default=2,
        help='seconds that --show shows a picture',
    )
    parser.add_argument(
        '--tta', action='store_true', help='test-time augmentation'
    )
    parser.add_argument(
        '--fuse',
        action='store_true',
        help='compute Poly-NL layers behind a 1x1 convolution from its input '
        '(the log says which): the same results to rounding, faster',
    )
    parser.add_tiles()
    return parser.parse_args()


def set_show(cfg, args):
    """Switch the visualization hook on."""
    option = '--show and --show-dir'
    host = host_of(cfg, option)
    if host.show_dir is None:
        raise StartError(
            f'{option} are not for classification: tools/demo.py draws'
        )
    hook = (cfg.get('default_hooks') or {}).get('visualization')
    if hook is None:
        raise StartError(
            f'{option} need default_hooks.visualization, which config '
            f'{cfg.filename} has not'
        )
    hook.draw = True
    if args.show:
        hook.show = True
        hook.wait_time = args.wait_time
    if args.show_dir:
        checks.require(cfg, host.show_dir.split('.')[0])
        cfg.merge_from_dict({host.show_dir: args.show_dir})


def set_tiles(cfg, args):
    """Have the pictures taken tile by tile."""
    data = list(checks.leaf_datasets(cfg.test_dataloader))
    host_of(cfg, '--tile').tile(cfg, data, args.tile, args.overlap)


def set_tta(cfg):
    """Put the model and the pipeline of test-time augmentation in place."""
    data = list(checks.leaf_datasets(cfg.test_dataloader))
    defaults = host_of(cfg, '--tta').tta_defaults(cfg, data[0])
    for key, value in defaults.items():
        cfg.setdefault(key, value)
    checks.require(cfg, 'tta_model', 'tta_pipeline')
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    for each in data:
        each.pipeline = cfg.tta_pipeline


def set_fuse(runner):
    """Tell the hook that fuses, which the config may have already."""
    for hook in runner.hooks:
        if isinstance(hook, PolyNLHook):
            hook.fuse_test = True
            return
    runner.register_hook(PolyNLHook(fuse_test=True))


def main():
    """Evaluate."""
    args = parse_args()
    cfg = start.load_config(args)
    checks.require(
        cfg, 'model', 'test_dataloader', 'test_cfg', 'test_evaluator'
    )
    runner_class = start.runner_class(cfg)
    checks.check_exists(args.checkpoint)
    if args.show or args.show_dir:
        set_show(cfg, args)
    saver = host_of(cfg, '--out').out(cfg, args.out) if args.out else None
    checks.check_data(cfg, 'test')
    if args.tile is not None:
        set_tiles(cfg, args)
    checks.check_checkpoint(cfg, args.checkpoint)
    cfg.load_from = args.checkpoint
    cfg.resume = False
    if args.tta:
        set_tta(cfg)
    if args.out:
        checks.check_output('--out', args.out, folder=saver is None)
    runner = start.build_runner(runner_class, cfg, 'test')
    pictures = runner.test_dataloader.dataset
    if args.show_dir:
        checks.check_names(pictures, '--show-dir')
    if args.out and saver is None:
        checks.check_names(pictures, '--out', suffix=False)
    if args.fuse:
        set_fuse(runner)
    runner.register_hook(ClassesHook())
    if saver:
        runner.test_evaluator.metrics.append(METRICS.build(saver))
    runner.test()


if __name__ == '__main__':
    cli.run(main)
