"""AP of mini-WIDER in batches of several sizes, padding in the mean or not.

    python tools/make_mini_data.py wider_face --out data/mini_wider --seed 0
    python projects/padding/study.py --seeds 0 1 2 --json padding.json

Trains the network of ``configs/mini/retinaface_r50-polynl_mini-wider.py`` on
pictures of three sizes, once as it is shipped (the mean is over a picture's
own positions), once with padding in the mean, and once without the blocks;
tests each in batches of one and of several pictures, with blocks both ways.
Ends with a table of means over the seeds, ± their standard deviation.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / 'tools')]

import numpy as np
from benchmarks.timing import table
from mmcv.transforms import BaseTransform
from mmengine.config import Config
from mmengine.registry import TRANSFORMS
from mmengine.runner import Runner
from tqdm import tqdm

from polynl_mm import layers

CONFIG = ROOT / 'configs' / 'mini' / 'retinaface_r50-polynl_mini-wider.py'
FACTORS = (0.7, 1.0, 1.4)
WAYS = {True: "a picture's own positions", False: 'padding in the mean'}
KINDS = {**WAYS, None: 'no blocks'}
# Pictures in a batch; whether they stand in another order.
BATCHES = [(1, False), (8, False), (8, True), (24, False)]


@TRANSFORMS.register_module(force=True)
class ResizeByTurns(BaseTransform):
    """Neighbours in the data set come in different sizes."""

    def __init__(self) -> None:
        """One step for each size."""
        self.steps = [TRANSFORMS.build(_resize(f)) for f in FACTORS]

    def transform(self, results: dict) -> dict:
        """Take the step of the picture."""
        return self.steps[results['sample_idx'] % len(FACTORS)](results)


def _resize(factor: float) -> dict:
    return dict(type='polynl_mm.Resize', scale_factor=factor)


def settings(seed: int, data_root: str, work_dir: str) -> Config:
    """The mini config, with pictures of several sizes."""
    cfg = Config.fromfile(CONFIG)
    load, annotate, *rest = cfg.train_dataloader.dataset.pipeline
    sizes = [[_resize(factor)] for factor in FACTORS]
    choice = dict(type='RandomChoice', transforms=sizes)
    train = cfg.train_dataloader.dataset
    train.pipeline = [load, annotate, choice, *rest]
    load, _, *rest = cfg.test_dataloader.dataset.pipeline
    test = cfg.test_dataloader.dataset
    test.pipeline = [load, dict(type='ResizeByTurns'), *rest]
    for dataset in (train, test):
        dataset.data_root = data_root
    cfg.test_evaluator.gt_dir = f'{data_root}/ground_truth'
    # It is tested at the end, in several ways.
    cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
    cfg.train_cfg.pop('val_interval')
    cfg.train_cfg.pop('dynamic_intervals')
    cfg.default_hooks.checkpoint = dict(type='polynl_mm.CheckpointHook')
    # The rate of the config is for a batch of 8, and this is one process.
    cfg.train_dataloader.batch_size = 8
    cfg.randomness.seed, cfg.work_dir = seed, work_dir
    cfg.log_level = 'WARNING'
    return cfg


@contextmanager
def padding(masked: bool):
    """Leave it out of the mean, as is shipped, or have it counted."""
    pictures_of = layers.pictures_of
    if not masked:
        layers.pictures_of = lambda layer=None: None
    try:
        yield
    finally:
        layers.pictures_of = pictures_of


def trained(masked: bool | None, cfg: Config) -> Runner:
    """What has been trained one way, of KINDS."""
    if masked is None:
        cfg.model.backbone.plugins = None
    cfg.experiment_name = f'{Path(cfg.work_dir).name}-{masked}'
    cfg.work_dir = f'{cfg.work_dir}/{masked}-{cfg.randomness.seed}'
    runner = Runner.from_cfg(cfg)
    with padding(masked is not False):
        runner.train()
    return runner


def tested(runner: Runner, ways: Iterable[bool]) -> dict:
    """AP of all faces; by the way of testing and the batch."""
    found = {}
    for batch_size, shuffle in BATCHES:
        loader = dict(runner.cfg.test_dataloader, batch_size=batch_size)
        loader['sampler'] = dict(loader['sampler'], shuffle=shuffle)
        loader = runner.build_dataloader(loader, seed=0)
        for masked in ways:
            loop = dict(type='TestLoop', evaluator=runner.cfg.test_evaluator)
            loop = runner.build_test_loop(dict(loop, dataloader=loader))
            with padding(masked):
                metrics = loop.run()
            found[masked, batch_size, shuffle] = metrics['wider_face/hard']
    return found


def told(found: list[dict]) -> str:
    """Markdown; of each seed, (trained masked, *case) -> AP."""

    def cell(case):
        values = [each[case] for each in found]
        mean = f'{np.mean(values):.4f}'
        if len(values) == 1:
            return mean
        return f'{mean} ± {np.std(values, ddof=1):.4f}'

    head = ['trained with', 'tested with']
    for batch_size, shuffle in BATCHES:
        head.append(f'batch {batch_size}' + ', other order' * shuffle)
    pairs = dict.fromkeys(case[:2] for case in found[0])
    rows = [
        [KINDS[trained_so], '' if trained_so is None else WAYS[tested_so]]
        + [cell((trained_so, tested_so, *batch)) for batch in BATCHES]
        for trained_so, tested_so in pairs
    ]
    return table(head, rows)


def main() -> None:
    """Train, test, tell."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument(
        '--kinds', nargs='+', default=[*KINDS.values()], choices=KINDS.values()
    )
    parser.add_argument('--data-root', default='data/mini_wider')
    parser.add_argument('--work-dir', default='work_dirs/padding')
    parser.add_argument('--json', help='write the figures there')
    args = parser.parse_args()
    kinds = [kind for kind, name in KINDS.items() if name in args.kinds]
    found = []
    count = len(args.seeds) * len(kinds)
    bar = tqdm(total=count, unit='training', disable=None)
    for seed in args.seeds:
        found.append({})
        for kind in kinds:
            cfg = settings(seed, args.data_root, args.work_dir)
            ways = [True] if kind is None else WAYS
            cases = tested(trained(kind, cfg), ways)
            found[-1].update({(kind, *k): v for k, v in cases.items()})
            print(f'seed {seed}, {KINDS[kind]}:', cases, flush=True)
            bar.update()
        if args.json:
            rows = [{str(k): v for k, v in each.items()} for each in found]
            Path(args.json).write_text(json.dumps(rows, indent=1))
    print(told(found))


if __name__ == '__main__':
    main()
