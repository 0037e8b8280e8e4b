"""Poly-SA beside the hosts' own attention, on the mini sets.

    python tools/make_mini_data.py cityscapes --out data/mini_cityscapes \
        --seed 0
    python tools/make_mini_data.py coco --out data/mini_coco --seed 0
    python projects/attention/study.py --json study.json

Every kind of attention is trained at every learning rate with the first seed,
and at the best of these with the others; all else is that of the configs.
What is in the file already is not trained again.
"""

import argparse
import json
import sys
import time
from copy import deepcopy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / 'tools')]

from benchmarks.timing import table
from mmengine.config import Config
from mmengine.runner import Runner
from tqdm import tqdm


def everywhere(at: str, **cfg) -> list:
    """The same in all places."""
    return [dict(at=at, cfg=dict(type='polynl_mm.PolySA', **cfg))]


def learnt_mit() -> list:
    """The pictures are all 256 x 128: 64 x 32 tokens in the first stage."""
    return [
        dict(
            at=f'layers.{i}.1.*.attn',
            cfg=dict(
                type='polynl_mm.PolySA',
                pooling='learnt',
                num_tokens=2048 // 4**i,
            ),
        )
        for i in range(3)
    ]


MIT, SWIN = 'layers.*.1.*.attn', 'stages.*.blocks.*.attn'
# Task -> config, metric, attention by name.
TASKS = {
    'cityscapes': (
        'segformer-polysa_mit_mini-cityscapes',
        'mIoU',
        {
            "the host's": [],
            'Poly-SA, mean, norm': everywhere(MIT),
            'Poly-SA, mean': everywhere(MIT, norm=False),
            'Poly-SA, learnt, norm': learnt_mit(),
        },
    ),
    'coco': (
        'mask-rcnn_swin-polysa_mini-coco',
        'coco/bbox_mAP',
        {
            "the host's": [],
            'Poly-SA, mean, norm': everywhere(SWIN),
            'Poly-SA, mean': everywhere(SWIN, norm=False),
        },
    ),
}


def train(task: str, attention: list, rate: float, seed: int, args) -> dict:
    """The metric at the end, and the seconds of a process that it took."""
    name, metric, _ = TASKS[task]
    cfg = Config.fromfile(ROOT / f'configs/mini/{name}.py')
    cfg.model.backbone.attention = attention
    cfg.optim_wrapper.optimizer.lr = rate
    cfg.randomness = dict(seed=seed)
    root = f'{args.data}/mini_{task}/'
    for phase in ('train', 'val', 'test'):
        cfg[f'{phase}_dataloader'].dataset.data_root = root
    if task == 'coco':
        file = f'{root}annotations/instances_val2017.json'
        cfg.val_evaluator.ann_file = cfg.test_evaluator.ann_file = file
    if task == 'cityscapes' and args.iterations:
        cfg.train_cfg.max_iters = cfg.train_cfg.val_interval = args.iterations
        cfg.param_scheduler[-1].T_max = args.iterations
        cfg.param_scheduler[-1].end = args.iterations
    cfg.work_dir = f'{args.work_dir}/{task}'
    cfg.log_level = 'WARNING'
    cfg.default_hooks.checkpoint = None
    del cfg.default_hooks.resume
    started = time.process_time()
    runner = Runner.from_cfg(cfg)
    runner.train()
    seconds = time.process_time() - started
    value = runner.message_hub.get_scalar(f'val/{metric}').current()
    parameters = sum(p.numel() for p in runner.model.parameters())
    return dict(value=float(value), seconds=seconds, parameters=parameters)


class Study:
    """What was found, kept in a file."""

    def __init__(self, args):
        """Read what there is."""
        self.args = args
        self.path = Path(args.json)
        self.found = {}
        kinds = sum(len(TASKS[task][2]) for task in args.tasks)
        count = kinds * (len(args.rates) + len(args.seeds) - 1)
        self.bar = tqdm(total=count, unit='training', disable=None)
        if self.path.exists():
            self.found = json.loads(self.path.read_text())

    def of(self, task, name, rate, seed):
        """Of one training, which is made if it was not."""
        key = f'{task} | {name} | {rate} | {seed}'
        if key not in self.found:
            attention = deepcopy(TASKS[task][2][name])
            self.found[key] = train(task, attention, rate, seed, self.args)
            self.path.write_text(json.dumps(self.found, indent=1))
            print(key, self.found[key], file=sys.stderr, flush=True)
        self.bar.update()
        return self.found[key]

    def row(self, task, name):
        """Cells of the table."""
        first, *others = self.args.seeds
        tried = {r: self.of(task, name, r, first) for r in self.args.rates}
        rate = max(tried, key=lambda r: tried[r]['value'])
        runs = [tried[rate], *(self.of(task, name, rate, s) for s in others)]
        values = [run['value'] for run in runs]
        seconds = sum(run['seconds'] for run in runs) / len(runs)
        digits = 3 if task == 'coco' else 1
        return [
            name,
            f'{rate:g}',
            f'{sum(values) / len(values):.{digits}f}',
            f'{min(values):.{digits}f} to {max(values):.{digits}f}',
            f'{runs[0]["parameters"]:,}',
            f'{seconds:.0f}',
        ]


def main() -> None:
    """Train, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--data', default='data', help='where both sets are')
    parser.add_argument('--work-dir', default='work_dirs/attention')
    parser.add_argument('--json', required=True, help='keep the figures there')
    parser.add_argument('--tasks', nargs='+', default=[*TASKS], choices=TASKS)
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2])
    parser.add_argument(
        '--rates', nargs='+', type=float, default=[0.002, 0.006]
    )
    parser.add_argument(
        '--iterations',
        type=int,
        help='of mini Cityscapes, with a file of figures for each; by default '
        'those of the config',
    )
    args = parser.parse_args()
    study = Study(args)
    for task in args.tasks:
        rows = [study.row(task, name) for name in TASKS[task][2]]
        head = ['attention', 'rate', TASKS[task][1], 'range']
        print(f'\n{task}\n\n' + table([*head, 'parameters', 's'], rows))


if __name__ == '__main__':
    main()
