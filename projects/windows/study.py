"""mIoU of mini Cityscapes by windows, each with its own context or one.

    python tools/make_mini_data.py cityscapes --out data/mini_cityscapes \
        --seed 0
    for head in polynl_mm.PolyNLHead GCHead NLHead; do
    for seed in 0 1 2; do
        python tools/train.py configs/mini/polynl_r18-d4_mini-cityscapes.py \
            --work-dir work_dirs/$head-$seed --cfg-options \
            randomness.seed=$seed model.decode_head.type=$head
    done; done
    python projects/windows/study.py polynl_mm.PolyNLHead \
        work_dirs/polynl_mm.PolyNLHead-*/iter_800.pth

A head, and what it was trained to with several seeds: a table of means over
these, ± their standard deviation.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / 'tools')]

import cv2
import numpy as np
import torch
from benchmarks.timing import table
from mmengine.config import Config, ConfigDict
from mmengine.runner import Runner, load_checkpoint
from tqdm import tqdm

CONFIG = ROOT / 'configs' / 'mini' / 'polynl_r18-d4_mini-cityscapes.py'
# Pictures are 128 high and 256 wide. Height and width; steps.
WINDOWS = [
    ((128, 192), (64, 64)),
    ((128, 128), (128, 128)),
    ((64, 64), (64, 64)),
    ((64, 64), (32, 32)),
]


def settings(one_context: bool) -> dict:
    """Cells of a row of the table -> test_cfg of the model."""
    found = {('whole image', 'whole'): dict(mode='whole')}
    for crop_size, stride in WINDOWS:
        slide = dict(mode='slide', crop_size=crop_size, stride=stride)
        row = f'{crop_size[1]}×{crop_size[0]}, stride {stride[1]}'
        found[row, 'own'] = slide
        if one_context:
            found[row, 'one'] = dict(slide, context='image')
    return found


def build(head: str, data_root: str) -> Runner:
    """What evaluates the config, with another head."""
    cfg = Config.fromfile(CONFIG)
    cfg.model.decode_head.type = head
    cfg.test_dataloader.dataset.data_root = data_root
    cfg.work_dir, cfg.log_level = 'work_dirs/windows', 'WARNING'
    return Runner.from_cfg(cfg)


def evaluate(runner: Runner, checkpoint: str, cases: dict) -> dict:
    """mIoU of each case."""
    load_checkpoint(runner.model, checkpoint, map_location='cpu')
    model = runner.model.eval()
    loader = runner.build_dataloader(runner.cfg.test_dataloader)
    evaluator = runner.build_evaluator(runner.cfg.test_evaluator)
    evaluator.dataset_meta = loader.dataset.metainfo
    found = {}
    for case, test_cfg in cases.items():
        model.test_cfg = ConfigDict(test_cfg)
        for batch in loader:
            with torch.no_grad():
                evaluator.process(model.test_step(batch), batch)
        metrics = evaluator.evaluate(len(loader.dataset))
        found[case] = float(metrics['mIoU'])
        print(
            checkpoint,
            *case,
            f'{found[case]:.2f}',
            file=sys.stderr,
            flush=True,
        )
    return found


def told(found: list[dict]) -> str:
    """Markdown, of what each checkpoint was found to have."""

    def cell(*case):
        values = [each[case] for each in found if case in each]
        if not values:
            return 'has none'
        mean = f'{np.mean(values):.1f}'
        if len(values) == 1:
            return mean
        return f'{mean} ± {np.std(values, ddof=1):.1f}'

    rows = [['whole image', cell('whole image', 'whole'), '']]
    for name in dict.fromkeys(row for row, _ in found[0]):
        if name != 'whole image':
            rows.append([name, cell(name, 'own'), cell(name, 'one')])
    return table(['', "each window's own", 'one for all windows'], rows)


def draw(runner: Runner, checkpoint: str, out: str, index: int) -> None:
    """One picture: itself, its labels, whole, windows, one context."""
    load_checkpoint(runner.model, checkpoint, map_location='cpu')
    model = runner.model.eval()
    dataset = runner.build_dataloader(runner.cfg.test_dataloader).dataset
    palette = np.zeros((256, 3))
    palette[:19] = dataset.metainfo['palette']
    data = dataset[index]
    sample = data['data_samples']
    image = data['inputs'].permute(1, 2, 0).numpy()
    maps = [sample.gt_sem_seg.data[0].numpy()]
    slide = dict(mode='slide', crop_size=(128, 128), stride=(128, 128))
    for test_cfg in (
        dict(mode='whole'),
        slide,
        dict(slide, context='image'),
    ):
        model.test_cfg = ConfigDict(test_cfg)
        batch = dict(inputs=[data['inputs']], data_samples=[sample.clone()])
        with torch.no_grad():
            (result,) = model.test_step(batch)
        maps.append(result.pred_sem_seg.data[0].numpy())
    panels = [image, *(palette[each][..., ::-1] for each in maps)]
    gap = np.full((6, image.shape[1], 3), 255)
    panels = [each for panel in panels for each in (panel, gap)][:-1]
    picture = np.concatenate(panels).astype(np.uint8)
    if not cv2.imwrite(out, cv2.resize(picture, None, fx=2, fy=2)):
        raise SystemExit(f'{out} can not be written')


def main() -> None:
    """Evaluate."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('head', help='type of the head, such as GCHead')
    parser.add_argument('checkpoints', nargs='+', help='of several seeds')
    parser.add_argument('--data-root', default='data/mini_cityscapes/')
    parser.add_argument('--json', help='write the figures there')
    parser.add_argument('--picture', help='draw one picture there')
    parser.add_argument('--index', type=int, default=0, help='which picture')
    args = parser.parse_args()
    runner = build(args.head, args.data_root)
    # Attention compares all pairs: there is nothing small to be shared.
    cases = settings(one_context=args.head != 'NLHead')
    if args.picture:
        draw(runner, args.checkpoints[0], args.picture, args.index)
        return
    paths = tqdm(args.checkpoints, unit='checkpoint', disable=None)
    found = [evaluate(runner, path, cases) for path in paths]
    if args.json:
        rows = [{' | '.join(k): v for k, v in each.items()} for each in found]
        Path(args.json).write_text(json.dumps(rows, indent=1))
    print(told(found))


if __name__ == '__main__':
    main()
