"""Whether a layer looks at what decides: the lights of mini Cityscapes.

See README.md beside this file for the commands that train what it compares.

From points on gravel, brick and grass, whose class traffic lights or signs
decide that stand far away: the share of the absolute influence that lies on
their pixels, beside their share of the area. Of a trained network, of one
whose layer's weights are drawn anew, and of one that has learnt nothing (what
beta is makes no difference to a share), along the branch and of the score of
the class; and the same of what NonLocal2d attends to.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / 'tools')]

import cv2
import numpy as np
import torch
from benchmarks.timing import table
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import load_checkpoint
from PIL import Image
from rich.progress import Progress

from polynl_mm.engine import safe_load  # noqa: F401  (checkpoints are read)
from polynl_mm.engine.influence import Picture, draw, views
from polynl_mm.influence import layer_at

CONFIG = ROOT / 'configs' / 'mini' / 'polynl_r18-d4_mini-cityscapes.py'
# Train ids of what decides, and of the textures that it decides.
CUES, TEXTURES = (6, 7), ((0, 1), (2, 3), (8, 9))


def network(head: str, checkpoint: str | None, seed: int = 0):
    """The config's network with this head, trained or as it starts."""
    cfg = Config.fromfile(CONFIG)
    cfg.model.decode_head.type = head
    torch.manual_seed(seed)
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = MODELS.build(cfg.model)
    if checkpoint is None:
        model.init_weights()
    else:
        load_checkpoint(model, checkpoint, 'cpu', logger='silent')
    return cfg, model.eval()


def drawn_anew(model, seed: int = 0):
    """Its Poly-NL layer as it starts, but switched on."""
    torch.manual_seed(seed)
    layer = layer_at(model)[1]
    layer.init_weights()
    torch.nn.init.ones_(layer.beta)
    return model


def kinds(poly: str, nl: str | None) -> dict:
    """What is compared: name -> config, network, and whether of scores."""
    head = 'polynl_mm.PolyNLHead'
    cfg, model = network(head, poly)
    anew = drawn_anew(network(head, poly)[1])
    nothing = drawn_anew(network(head, None)[1])
    compared = {}
    for of, scores in (('branch', False), ('which of the two', True)):
        compared[f'trained, {of}'] = (cfg, model, scores)
        compared[f'its layer drawn anew, {of}'] = (cfg, anew, scores)
        compared[f'untrained, {of}'] = (cfg, nothing, scores)
    if nl is not None:
        for name, checkpoint in (('trained', nl), ('untrained', None)):
            name = f'NonLocal2d, {name}, attention'
            compared[name] = (*network('NLHead', checkpoint), False)
    return compared


def points_of(labels: np.ndarray, count: int, rng) -> list:
    """Some points x, y on each of the textures that there are."""
    points = []
    for pair in TEXTURES:
        found = np.argwhere(np.isin(labels, pair))
        if len(found):
            points += rng.choice(found, count)[:, ::-1].tolist()
    return points


def pictures(root: Path, split: str):
    """Give the paths of the pictures and their label maps, (H, W)."""
    for path in sorted((root / 'leftImg8bit' / split).rglob('*.png')):
        name = path.name.replace('leftImg8bit', 'gtFine_labelTrainIds')
        labels = root / 'gtFine' / split / path.parent.name / name
        yield path, cv2.imread(str(labels), cv2.IMREAD_GRAYSCALE)


def towards_truth(labels: np.ndarray):
    """The score of the true class less that of the texture's other."""
    other = {a: b for pair in TEXTURES for a, b in (pair, pair[::-1])}

    def score(scores, point):
        truth = int(labels[point[1], point[0]])
        return scores[truth] - scores[other[truth]]

    return score


def measured(compared: dict, root: Path, count: int, near: int) -> list:
    """Rows of the first table; see README.md."""
    found = {name: [] for name in compared}
    areas, rng = [], np.random.default_rng(0)
    todo = [*pictures(root, 'val')]
    with Progress() as progress:
        for path, labels in progress.track(todo, description='Looking'):
            cue = np.isin(labels, CUES)
            around = widened(cue, near)
            areas.append((cue.mean(), around.mean()))
            points = points_of(labels, count, rng)
            for name, (cfg, model, scores) in compared.items():
                picture = Picture(cfg, str(path))
                score = towards_truth(labels) if scores else None
                for values in views(model, picture, points, score=score).maps:
                    size = np.abs(values)
                    whole = size.sum()
                    found[name].append(
                        (
                            size[cue].sum() / whole,
                            size[around].sum() / whole,
                            around.flat[size.argmax()],
                            values[around].sum() / whole,
                            values[~around].sum() / whole,
                        )
                    )
    area, wide = np.mean(areas, 0)
    rows = [['area', f'{area:.1%}', '1.0', f'{wide:.1%}', '', '', '']]
    for name, values in found.items():
        cue, around, peak, here, there = np.mean(values, 0)
        rows.append(
            [name, f'{cue:.1%}', f'{cue / area:.1f}', f'{around:.1%}']
            + [f'{peak:.0%}', f'{here:+.1%}', f'{there:+.1%}']
        )
    print(f'{len(todo)} pictures, {len(next(iter(found.values())))} points')
    return rows


def widened(mask: np.ndarray, near: int) -> np.ndarray:
    """What is at most so many rows and columns away."""
    kernel = np.ones((2 * near + 1,) * 2, np.uint8)
    return cv2.dilate(mask.astype(np.uint8), kernel) > 0


def without(cfg, model, root: Path, near: int) -> list:
    """Rows of the second table: parts left out of the layer's mean."""
    ways = ('nothing', 'lights and signs', 'as much elsewhere')
    right, layer = {way: [] for way in ways}, layer_at(model)[1]
    rng = np.random.default_rng(0)
    with Progress() as progress:
        todo = [*pictures(root, 'val')]
        for path, labels in progress.track(todo, description='Leaving out'):
            picture = Picture(cfg, str(path))
            batch = model.data_preprocessor(picture.data, False)
            textures = np.isin(labels, TEXTURES)
            around = widened(np.isin(labels, CUES), near)
            # The same shape somewhere else: it goes around the picture.
            while True:
                shift = int(rng.integers(labels.shape[1]))
                other = np.roll(around, shift, 1)
                if not (other & around).any():
                    break
            for way, part in zip(ways, (None, around, other)):
                layer.around = leaving_out(part)
                with torch.no_grad():
                    (sample,) = model(**batch, mode='predict')
                layer.around = None
                answer = sample.pred_sem_seg.data[0].numpy()
                right[way].append((answer == labels)[textures].mean())
    return [[way, f'{np.mean(values):.1%}'] for way, values in right.items()]


def leaving_out(part: np.ndarray | None):
    """What a layer is to have around it: no weight on this part."""

    def around(layer, x):
        if part is None:
            return None, None
        kept = torch.from_numpy(1.0 - part)[None, None]
        cells = torch.nn.functional.interpolate(kept, x.shape[2:], mode='area')
        return None, cells[0]

    return around


def figure(compared: dict, root: Path, names: list, index: int, out: str):
    """Draw both frames of a street, from a point on the first's gravel."""
    rows = []
    for path, labels in [*pictures(root, 'val')][2 * index : 2 * index + 2]:
        if not rows:
            rng = np.random.default_rng(index)
            (point,) = points_of(np.where(labels < 2, labels, 255), 1, rng)
        panels = []
        for name in names:
            cfg, model, scores = compared[name]
            score = towards_truth(labels) if scores else None
            picture = Picture(cfg, str(path))
            seen = views(model, picture, [point], score=score)
            if not panels:
                panels.append(draw(picture.pixels, None, point))
            panels.append(draw(picture.pixels, seen.maps[0], point))
        gap = np.full((len(panels[0]), 4, 3), 255, np.uint8)
        rows += [np.hstack([e for p in panels for e in (p, gap)][:-1])]
        rows += [np.full((4, *rows[0].shape[1:]), 255, np.uint8)]
    # In few colours: the page is small.
    Image.fromarray(np.vstack(rows[:-1])).quantize(96).save(out, optimize=True)


def main() -> None:
    """Measure, draw, tell."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('poly', help='checkpoint with the config as it is')
    parser.add_argument('--nl', help='checkpoint with an NLHead')
    parser.add_argument('--data-root', default='data/mini_cityscapes')
    parser.add_argument('--points', type=int, default=2, help='a texture')
    parser.add_argument('--near', type=int, default=8, help='in pixels')
    parser.add_argument('--street', type=int, default=0, help='of the figure')
    parser.add_argument('--figure', help='draw a street there, .png')
    args = parser.parse_args()
    compared, root = kinds(args.poly, args.nl), Path(args.data_root)
    rows = measured(compared, root, args.points, args.near)
    head = ['', 'on lights and signs', 'times their area']
    head += [f'within {args.near} pixels', 'peak there']
    head += ['sum there', 'sum elsewhere']
    print(table(head, rows))
    cfg, model, _ = compared['trained, branch']
    rows = without(cfg, model, root, args.near)
    print(table(['left out of the mean', 'pixels of textures right'], rows))
    if args.figure:
        names = [name for name in compared if ' trained' in f' {name}']
        figure(compared, root, names, args.street, args.figure)


if __name__ == '__main__':
    main()
