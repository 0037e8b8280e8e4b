"""Speed of a backbone with Poly-NL by AOTInductor on a CPU, fused or not.

    python projects/deployment/compiled.py
    python projects/deployment/compiled.py --config CONFIG --size 640 640

``torch.export`` makes a program of it, for any batch, height and width; the
program is compiled ahead of time into a library (this takes a C++ compiler),
and takes turns with the model as it is. Weights are random.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from copy import deepcopy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / 'tools')]

import torch
from benchmarks.timing import machine, ratio, seconds, table, take_turns
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope
from rich.progress import track
from torch import nn

from polynl_mm.engine.start import read_config
from polynl_mm.fusion import fuse_poly_nl
from polynl_mm.layers import PolyNL

CONFIG = ROOT / 'configs/coco/mask-rcnn_r50-polynl-c4_fpn_1x_coco.py'


def build(config: str, fuse: bool) -> nn.Module:
    """The backbone of a config, evaluated, with branches that matter."""
    cfg = read_config(str(config))
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope')):
        backbone = MODELS.build(deepcopy(cfg.model.backbone))
    backbone = revert_sync_batchnorm(backbone)
    backbone.eval()
    for layer in backbone.modules():
        if isinstance(layer, PolyNL):
            nn.init.constant_(layer.beta, 1e-3)
    if fuse:
        fuse_poly_nl(backbone)
    return backbone


def compile_ahead(model: nn.Module, x: torch.Tensor, folder: str):
    """Export and compile a model for every batch, height and width."""
    auto = torch.export.Dim.AUTO
    with torch.no_grad():
        # Not a batch of one, which would be taken for a constant.
        program = torch.export.export(
            model,
            (x.repeat(2, 1, 1, 1),),
            dynamic_shapes=({0: auto, 2: auto, 3: auto},),
        )
        file = torch._inductor.aoti_compile_and_package(
            program, package_path=f'{folder}/model.pt2'
        )
    return torch._inductor.aoti_load_package(file)


def main() -> None:
    """Compile, compare the values, and take turns."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--config', default=CONFIG)
    parser.add_argument('--size', type=int, nargs=2, default=(640, 640))
    parser.add_argument('--turns', type=int, default=30)
    args = parser.parse_args()
    x = torch.randn(1, 3, *args.size)
    calls, want = {}, None
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        for fuse in track((False, True), 'Compiling'):
            name = 'fused' if fuse else 'unfused'
            model = build(args.config, fuse)
            path = Path(folder, name)
            path.mkdir()
            compiled = compile_ahead(model, x, str(path))
            calls[f'{name}, eager'] = lambda model=model: model(x)
            calls[f'{name}, AOTInductor'] = lambda run=compiled: run(x)
        differences = {}
        for name, call in calls.items():
            got = call()[-1]
            want = got if want is None else want
            error = (got - want).abs().max() / want.abs().max()
            differences[name] = f'{error:.1e}'
        unit = next(iter(calls))
        times = take_turns(lambda i: calls, 'cpu', unit, args.turns)
    rows = []
    for name, each in times.items():
        middle, spread = seconds(each)
        share, share_spread = ratio(each, times[unit])
        rows.append(
            [
                name,
                f'{1000 * middle:.0f} ± {1000 * spread:.0f}',
                f'{share:.3f} ± {share_spread:.3f}',
                differences[name],
            ]
        )
    print(machine('cpu'), f', batch 1, {args.size}', sep='')
    head = ['backbone', 'ms', f'time / {unit}', 'differs by (of the largest)']
    print(table(head, rows))


if __name__ == '__main__':
    main()
