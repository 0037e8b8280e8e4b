"""Blocks in one small classifier, each at the learning rate that suits it.

    python tools/make_mini_data.py digits --out data/mini_digits --seed 0
    python tools/make_mini_data.py lfw_patches --out data/mini_lfw --seed 0
    python projects/recognition/study.py data/mini_digits --json digits.json
    python projects/recognition/study.py data/mini_lfw --json lfw.json

The rate of each block is the best of RATES: twice, one half of the training
pictures is learnt and the other half scored. Then the block is trained on
all of them with five other seeds, and scored once on val, which nothing was
chosen by. What is in the file of --json is not run again.
"""

import argparse
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / 'tools')]

import numpy as np
from benchmarks.timing import table
from mmengine.config import Config
from mmengine.runner import Runner
from scipy.stats import t
from tqdm import tqdm

from polynl_mm.classification.dataset import ImageFolder

CONFIG = ROOT / 'configs' / 'mini' / 'resnet18-polynl_mini-digits.py'
# Squeezed to a quarter where a block squeezes: there are 32 channels.
BLOCKS = {
    'none': None,
    'SE': dict(type='polynl_mm.SELayer', ratio=4),
    'ContextBlock': dict(type='ContextBlock', ratio=1 / 4),
    'NonLocal2d': dict(type='NonLocal2d'),
    'Poly-NL': dict(type='polynl_mm.PolyNL2d'),
}
RATES = (0.001, 0.003, 0.01, 0.03, 0.1)
TUNING_SEEDS = (100, 101)
SEEDS = (0, 1, 2, 3, 4)


def settings(data_root: str, block: str, rate: float, seed: int) -> Config:
    """The config, with another block, data set, learning rate and seed."""
    cfg = Config.fromfile(CONFIG)
    cfg.model.backbone.blocks = [
        dict(after=entry.after, cfg=BLOCKS[block])
        for entry in cfg.model.backbone.blocks
        if BLOCKS[block]
    ]
    classes = sorted(each.name for each in Path(data_root, 'train').iterdir())
    cfg.model.num_classes = len(classes)
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.dataset.data_root = data_root
    cfg.val_evaluator.topk = (1,)
    cfg.optim_wrapper.optimizer.lr = rate
    cfg.randomness.seed = seed
    return cfg


def hold_out(cfg: Config, seed: int) -> None:
    """Score one half of the training pictures, drawn by class; learn the rest.

    val is not looked at.
    """
    train = cfg.train_dataloader.dataset
    data = ImageFolder(
        data_root=train.data_root, data_prefix=train.data_prefix
    )
    labels = np.array([each['gt_label'] for each in data])
    rng = np.random.default_rng(seed)
    learnt, scored = [], []
    for label in np.unique(labels):
        ids = rng.permutation(np.flatnonzero(labels == label)).tolist()
        learnt += ids[: len(ids) // 2]
        scored += ids[len(ids) // 2 :]
    train.indices = learnt
    cfg.val_dataloader.dataset.update(
        data_prefix=train.data_prefix, indices=scored
    )


def accuracy(cfg: Config, name: str) -> float:
    """Train, and give the top-1 accuracy at the end, in percent."""
    # Nothing but the number is wanted.
    cfg.default_hooks.checkpoint = None
    cfg.visualizer.vis_backends = None
    cfg.test_dataloader = cfg.test_evaluator = cfg.test_cfg = None
    cfg.log_level, cfg.experiment_name = 'WARNING', name
    cfg.work_dir = 'work_dirs/recognition'
    runner = Runner.from_cfg(cfg)
    runner.train()
    return runner.message_hub.get_scalar('val/accuracy/top1').current()


def best_rate(found: dict, block: str) -> float:
    """The rate of the best mean; of equal ones, the lowest."""

    def score(rate):
        names = [f'tuning {block} {rate} {seed}' for seed in TUNING_SEEDS]
        return np.mean([found[name] for name in names])

    return max(RATES, key=score)


def told(found: dict) -> str:
    """Markdown: rate, mean and 95 % interval (Student's t) over the seeds."""
    rows = []
    for block in BLOCKS:
        rate = best_rate(found, block)
        values = [found[f'final {block} {rate} {seed}'] for seed in SEEDS]
        spread = np.std(values, ddof=1) / len(values) ** 0.5
        spread *= t.ppf(0.975, len(values) - 1)
        each = ', '.join(f'{value:.1f}' for value in values)
        rows.append(
            [block, f'{rate:g}', f'{np.mean(values):.1f} ± {spread:.1f}', each]
        )
    return table(['block', 'rate', 'top-1, %', 'seeds'], rows)


def main() -> None:
    """Tune, train and tell."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('data_root', help='by make_mini_data.py')
    parser.add_argument('--json', required=True, help='figures, by run')
    args = parser.parse_args()
    file = Path(args.json)
    found = json.loads(file.read_text()) if file.exists() else {}

    each = len(RATES) * len(TUNING_SEEDS) + len(SEEDS)
    bar = tqdm(total=len(BLOCKS) * each, unit='training', disable=None)

    def run(phase, block, rate, seed):
        name = f'{phase} {block} {rate} {seed}'
        if name not in found:
            start = time.time()
            cfg = settings(args.data_root, block, rate, seed)
            if phase == 'tuning':
                hold_out(cfg, seed)
            found[name] = accuracy(cfg, name)
            file.write_text(json.dumps(found, indent=1))
            seconds = time.time() - start
            print(name, f'{found[name]:.2f}', f'{seconds:.0f} s', flush=True)
        bar.update()

    for block in BLOCKS:
        for rate in RATES:
            for seed in TUNING_SEEDS:
                run('tuning', block, rate, seed)
        for seed in SEEDS:
            run('final', block, best_rate(found, block), seed)
    print(told(found))


if __name__ == '__main__':
    main()
