"""Evaluate a checkpoint of any mmdet or mmseg config, on GPUs or without."""

import os
import sys
from copy import deepcopy
from inspect import signature

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if os.path.isdir(os.path.join(ROOT, 'polynl_mm')):
    # A checkout, installed or not; in a wheel the package lies around here.
    sys.path.insert(0, ROOT)

from mmengine.config import ConfigDict
from mmengine.registry import METRICS

from polynl_mm.engine import checks, cli, start
from polynl_mm.engine.cli import StartError
from polynl_mm.engine.hooks import PolyNLHook


def parse_args():
    """Parse the command line."""
    parser = cli.Parser(description=__doc__)
    parser.add_job()
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '--out',
        metavar='PATH',
        help='save the predictions: mmdet: to this .pkl or .pickle file; '
        'mmseg: as label maps into this folder',
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
    return parser.parse_args()


def host_of(cfg, option):
    """Give 'mmdet' or 'mmseg', whose meaning of an option applies."""
    host = cfg.get('default_scope')
    if host not in ('mmdet', 'mmseg'):
        raise StartError(
            f'{option} is known for mmdet and mmseg configs, but config '
            f'{cfg.filename} has default_scope={host!r}'
        )
    return host


def set_show(cfg, args):
    """Switch the visualization hook on."""
    host = host_of(cfg, '--show and --show-dir')
    hook = (cfg.get('default_hooks') or {}).get('visualization')
    if hook is None:
        raise StartError(
            f'--show and --show-dir need default_hooks.visualization, which '
            f'config {cfg.filename} has not'
        )
    if host == 'mmdet':
        from mmdet.engine.hooks.utils import trigger_visualization_hook

        trigger_visualization_hook(cfg, args)
        return
    hook.draw = True
    if args.show:
        hook.show = True
        hook.wait_time = args.wait_time
    if args.show_dir:
        checks.require(cfg, 'visualizer')
        cfg.visualizer.save_dir = args.show_dir


def set_tta(cfg):
    """Put the model and the pipeline of test-time augmentation in place."""
    data = list(checks.leaf_datasets(cfg.test_dataloader))
    if host_of(cfg, '--tta') == 'mmdet':
        # mmdet's own tool flips, too, where the config says nothing.
        cfg.setdefault(
            'tta_model',
            dict(
                type='DetTTAModel',
                tta_cfg=dict(
                    nms=dict(type='nms', iou_threshold=0.5), max_per_img=100
                ),
            ),
        )
        cfg.setdefault('tta_pipeline', flip_pipeline(data[0].pipeline))
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


def flip_pipeline(pipeline):
    """Let a test pipeline of mmdet end in each image and its mirror image."""
    *before, pack = deepcopy(pipeline)
    flips = [dict(type='RandomFlip', prob=prob) for prob in (1.0, 0.0)]
    if 'meta_keys' in pack:
        # The default ones hold both already.
        pack.meta_keys = (*pack.meta_keys, 'flip', 'flip_direction')
    return [*before, dict(type='TestTimeAug', transforms=[flips, [pack]])]


def set_out(cfg, out):
    """Have the predictions saved as the host saves them."""
    if host_of(cfg, '--out') == 'mmdet':
        if not out.endswith(('.pkl', '.pickle')):
            raise StartError(
                f'--out {out}: mmdet saves predictions to one .pkl or .pickle '
                'file'
            )
        return
    if os.path.exists(out) and not os.path.isdir(out):
        raise StartError(
            f'--out {out}: mmseg saves label maps to a folder, and this is a '
            'file'
        )
    metrics = cfg.test_evaluator
    metrics = [metrics] if isinstance(metrics, dict) else metrics
    saving = [metric for metric in metrics if takes_output_dir(metric)]
    if not saving:
        raise StartError(
            f'--out: no metric in test_evaluator of config {cfg.filename} '
            'takes an output_dir, as IoUMetric does'
        )
    for metric in saving:
        metric.output_dir = out
        metric.keep_results = True


def takes_output_dir(metric):
    """Look at the class of a metric of mmseg."""
    with METRICS.switch_scope_and_registry('mmseg') as registry:
        kind = registry.get(metric.type)
    # A type that nobody knows is left for the runner to complain about.
    return kind is not None and 'output_dir' in signature(kind).parameters


def main():
    """Evaluate."""
    args = parse_args()
    cfg = start.load_config(args)
    checks.require(
        cfg, 'model', 'test_dataloader', 'test_cfg', 'test_evaluator'
    )
    runner_class = start.runner_class(cfg)
    if args.show or args.show_dir:
        set_show(cfg, args)
    if args.out:
        set_out(cfg, args.out)
    checks.check_data(cfg, 'test')
    checks.check_checkpoint(cfg, args.checkpoint)
    cfg.load_from = args.checkpoint
    cfg.resume = False
    if args.tta:
        set_tta(cfg)
    runner = start.build_runner(runner_class, cfg, 'test')
    if args.fuse:
        set_fuse(runner)
    if args.out and cfg.default_scope == 'mmdet':
        dump = METRICS.build(
            dict(type='mmdet.DumpDetResults', out_file_path=args.out)
        )
        runner.test_evaluator.metrics.append(dump)
    runner.test()


if __name__ == '__main__':
    cli.run(main)
