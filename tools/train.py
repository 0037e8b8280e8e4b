"""Train any config of mmdet, mmseg or recognition, on GPUs or without."""

import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if os.path.isdir(os.path.join(ROOT, 'polynl_mm')):
    # A checkout, installed or not; in a wheel the package lies around here.
    sys.path.insert(0, ROOT)

from polynl_mm import stack

stack.end_in_a_line()

from mmengine.device import (
    is_cuda_available,
    is_mlu_available,
    is_musa_available,
    is_npu_available,
)

from polynl_mm.engine import checkpoints, checks, cli, start, training_state
from polynl_mm.engine.cli import StartError
from polynl_mm.layers import StateDictMismatch


def parse_args():
    """Parse the command line."""
    parser = cli.Parser(description=__doc__)
    parser.add_job()
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='go on from this checkpoint, or, without a value, from the '
        'latest one in the work directory; if there is none yet, start anew',
    )
    parser.add_argument(
        '--amp', action='store_true', help='mixed precision; needs a GPU'
    )
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate by batch size, as auto_scale_lr of the '
        'config says',
    )
    return parser.parse_args()


def set_precision(cfg, amp):
    """Switch to mixed precision if asked, where the machine has it."""
    wrapper = cfg.optim_wrapper
    kind = wrapper.get('type', 'OptimWrapper')
    if amp:
        if kind not in ('OptimWrapper', 'AmpOptimWrapper'):
            raise StartError(
                f'--amp takes the place of OptimWrapper, but config '
                f'{cfg.filename} has optim_wrapper.type={kind!r}'
            )
        wrapper.type = kind = 'AmpOptimWrapper'
        wrapper.setdefault('loss_scale', 'dynamic')
    accelerators = (
        is_cuda_available,
        is_mlu_available,
        is_musa_available,
        is_npu_available,
    )
    if kind == 'AmpOptimWrapper' and not any(has() for has in accelerators):
        raise StartError(
            'mixed precision (--amp, AmpOptimWrapper) needs a GPU, and this '
            'machine has none: train without it'
        )


def set_resume(cfg, resume):
    """Find the checkpoint to go on from, if one is asked for."""
    if resume is None and cfg.get('resume'):
        resume = cfg.get('load_from') or 'auto'
    cfg.resume = False
    if resume is None:
        if cfg.get('load_from'):
            checks.check_exists(cfg.load_from)
        return
    if resume == 'auto':
        hook = (cfg.get('default_hooks') or {}).get('checkpoint') or {}
        folder = cfg.work_dir
        if hook.get('out_dir'):
            name = os.path.basename(folder.rstrip(os.sep))
            folder = os.path.join(hook.out_dir, name)
        try:
            resume = checkpoints.newest(folder, cli.say)
        except ValueError as error:
            raise StartError(
                f'--resume: {error}: to start anew, move what can not be read '
                'out of there'
            ) from error
        record = os.path.join(cfg.work_dir, 'last_checkpoint')
        if resume is None and os.path.isfile(record):
            with open(record) as file:
                raise StartError(
                    f'--resume: {record} names {file.read()}, but there is no '
                    f'whole checkpoint in {folder}'
                )
        if resume is None:
            cli.say(
                f'--resume: no checkpoint in {folder} yet, training starts '
                'from the beginning'
            )
            return
        cli.say(f'--resume: from {resume}')
    checks.check_checkpoint(cfg, resume, resume=True)
    set_seed(cfg, resume)
    cfg.resume = True
    cfg.load_from = resume


def set_seed(cfg, resume):
    """Take the seed of the checkpoint, before the order of data is drawn."""
    if '://' in resume:
        return
    try:
        state = checkpoints.read_state(os.path.expanduser(resume))
    except Exception as error:  # torch raises all kinds on a damaged file
        raise StartError(f'checkpoint {resume}: {error}') from error
    if state is None:
        raise StartError(f'checkpoint {resume} is not one of a training')
    seed = state['meta'].get('seed')
    if not (seed is None or (type(seed) is int and 0 <= seed < 2**32)):
        raise StartError(
            f'checkpoint {resume} can not be resumed from: its seed is '
            f'{seed!r}, expected a whole number below 2**32'
        )
    randomness = dict(cfg.get('randomness') or {})
    if seed is None or seed == randomness.get('seed'):
        return
    if randomness.get('seed') is not None:
        cli.say(
            f'--resume: randomness.seed={seed} as in {resume}, not '
            f'{randomness["seed"]}'
        )
    cfg.randomness = dict(randomness, seed=seed)


def main():
    """Train."""
    args = parse_args()
    cfg = start.load_config(args)
    checks.require(
        cfg, 'model', 'train_dataloader', 'train_cfg', 'optim_wrapper'
    )
    runner_class = start.runner_class(cfg)
    set_precision(cfg, args.amp)
    if args.auto_scale_lr:
        if 'base_batch_size' not in (cfg.get('auto_scale_lr') or {}):
            raise StartError(
                f'--auto-scale-lr: config {cfg.filename} has no '
                'auto_scale_lr.base_batch_size'
            )
        cfg.auto_scale_lr.enable = True
    checks.check_data(cfg, 'train', 'val')
    set_resume(cfg, args.resume)
    runner = start.build_runner(runner_class, cfg, 'train', 'val')
    try:
        if cfg.resume:
            training_state.resume(runner, cfg.load_from)
        else:
            runner.train()
    except StateDictMismatch as error:
        raise StartError(f'checkpoint {cfg.load_from}: {error}') from error
    except OSError as error:
        if error.errno not in checkpoints.FULL:
            raise
        raise StartError(
            f'{error}: the training stopped after {runner.iter} iterations; '
            f'make room and --resume; {checkpoints.last_good(runner)}'
        ) from error


if __name__ == '__main__':
    cli.run(main)
