"""Whether onnxruntime computes what torch does, for many configs: a table.

    python projects/deployment/parity.py
    python projects/deployment/parity.py --configs configs/coco/NAME.py ...

Each model has random weights as if trained: BatchNorm knows its inputs, and
what every Poly-NL layer adds is 0.4 of what it is given. Each is exported
by both exporters, fused and not, at one batch and size, and compared at two
others. No data and no checkpoint are needed.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / 'tools')]

import torch
from benchmarks.timing import machine, table
from mmengine.model import revert_sync_batchnorm
from rich.progress import track
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from polynl_mm.engine import export
from polynl_mm.engine.checks import build_model
from polynl_mm.engine.cli import StartError
from polynl_mm.engine.start import read_config
from polynl_mm.fusion import fuse_poly_nl
from polynl_mm.layers import PolyNL

CONFIGS = [
    'wider_face/retinaface_r50-polynl-c4_p2-p6-polynl_8xb4-100e_wider-face.py',
    'coco/mask-rcnn_r50-polynl-c4_fpn_1x_coco.py',
    'coco/retinanet_pvtv2-b0-polysa_fpn_1x_coco.py',
    'coco/rtmdet-ins_s-polynl-stage3_8xb32-300e_coco.py',
    'coco/mask-rcnn_swin-t-p4-w7-polynl-stage3_fpn_1x_coco.py',
    'cityscapes/polynl_r50-d8_4xb2-40k_cityscapes-512x1024.py',
    'cityscapes/segformer-polysa_mit-b0_8xb1-160k_cityscapes-1024x1024.py',
]
# Of what a layer is given.
SHARE = 0.4


def build(cfg) -> nn.Module:
    """The model of a config as if it were trained."""
    torch.manual_seed(0)
    model = revert_sync_batchnorm(build_model(cfg)).eval()
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    layers = [m for m in model.modules() if isinstance(m, PolyNL)]
    for norm in norms:
        # It takes over the statistics of the one batch that it sees.
        norm.train()
        norm.momentum = 1.0
        nn.init.normal_(norm.bias, std=0.3)
    handles = [layer.register_forward_pre_hook(set_beta) for layer in layers]
    with torch.no_grad():
        export.to_export(cfg, model)(torch.randn(2, 3, 256, 320))
    for handle in handles:
        handle.remove()
    return model.eval()


def set_beta(layer: PolyNL, args: tuple) -> None:
    """Make what a layer adds a share of what it is given."""
    x = args[0]
    layer.beta.fill_(1)
    # Not as a call, which would come here again.
    branch = layer.forward(x) - layer.alpha * x
    layer.beta.fill_(SHARE * x.std() / branch.std())


def compare(cfg, fuse: bool, exporter: str) -> tuple[str, str]:
    """The greatest difference, or why there is none; and what is exported."""
    model = build(cfg)
    if fuse and not fuse_poly_nl(model)[1].fused:
        return 'nothing to fuse', ''
    module = export.to_export(cfg, model)
    divisor = export.trial_divisor(cfg)
    try:
        program = export.export(module, divisor, exporter)
    except StartError as error:
        return str(error), module.what
    generator = torch.Generator().manual_seed(1)
    k = -(-256 // divisor)
    pictures = [
        torch.randn(b, 3, h * divisor, w * divisor, generator=generator)
        for b, h, w in ((1, k + 1, k + 2), (3, k, k))
    ]
    found = export.verify(module, program, pictures)
    values = sum(each.values for each in found)
    worst = max(each.difference for each in found)
    return f'{worst:.1e} of {values:,}', module.what


def main() -> None:
    """Compare all, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    configs = [ROOT / 'configs' / name for name in CONFIGS]
    parser.add_argument('--configs', nargs='+', default=configs)
    parser.add_argument('--exporters', nargs='+', default=export.EXPORTERS)
    args = parser.parse_args()
    begun = time.perf_counter()
    cases = [
        (config, fuse, exporter)
        for config in args.configs
        for exporter in args.exporters
        for fuse in (False, True)
    ]
    rows, notes = {}, []
    for config, fuse, exporter in track(cases, 'Exporting'):
        cfg = read_config(str(config))
        if (cfg.model.get('test_cfg') or {}).get('mode') == 'slide':
            cfg.model.test_cfg = dict(mode='whole')
        result, what = compare(cfg, fuse, exporter)
        row = rows.setdefault(Path(config).stem, [what])
        if 'can not' in result:
            notes.append(f'{Path(config).stem}: {result}')
            result = 'refused, see below'
        row.append(result)
        case = f'{Path(config).stem}, {exporter}' + ', fused' * fuse
        print(f'{case}: {row[-1]}', file=sys.stderr, flush=True)
    head = ['config', 'what is exported']
    head += [f'{e}{f}' for e in args.exporters for f in ('', ', fused')]
    print(machine('cpu'), f', {time.perf_counter() - begun:.0f} s', sep='')
    print(table(head, [[name, *row] for name, row in rows.items()]))
    print(*notes, sep='\n')


if __name__ == '__main__':
    main()
