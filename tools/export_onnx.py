"""Export a model of mmdet, mmseg or recognition to ONNX, and check it."""

import os
import sys
from importlib.util import find_spec

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if os.path.isdir(os.path.join(ROOT, 'polynl_mm')):
    # A checkout, installed or not; in a wheel the package lies around here.
    sys.path.insert(0, ROOT)

from polynl_mm import stack

stack.end_in_a_line()

from rich.progress import Progress

from polynl_mm.engine import checks, cli, start
from polynl_mm.engine.cli import StartError
from polynl_mm.fusion import fuse_poly_nl

NEEDED = ('onnx', 'onnxruntime', 'onnxscript')


def parse_args():
    """Parse the command line."""
    parser = cli.Parser(description=__doc__)
    parser.add_argument(
        'config', help='config file, or the name of one of polynl_mm'
    )
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('out', help='the file to write, such as model.onnx')
    parser.add_argument(
        '--fuse',
        action='store_true',
        help='compute Poly-NL layers behind a 1x1 convolution from its input',
    )
    parser.add_argument(
        '--verify',
        metavar='IMAGE',
        help='compare onnxruntime with torch on this picture, too, at its own '
        'size and at three quarters of it; the exit code is 1 where they '
        'differ',
    )
    parser.add_argument(
        '--exporter',
        choices=['dynamo', 'older'],
        default='dynamo',
        help='that of torch.export (default), or the one by tracing, which '
        'mmdeploy uses',
    )
    parser.add_argument(
        '--opset',
        type=int,
        help="version of the operators of ONNX; by default the exporter's own",
    )
    parser.add_config_options()
    return parser.parse_args()


def main():
    """Export; the exit code is 1 if a picture shows a difference."""
    args = parse_args()
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise StartError(
            f'not installed: {", ".join(missing)}; pip install '
            + ' '.join(missing)
        )
    from polynl_mm.engine import export

    cfg = start.read_config(args.config, args.cfg_options)
    checks.require(cfg, 'model')
    checks.check_checkpoint(cfg, args.checkpoint)
    checks.check_output('OUT', args.out)
    fused = False
    with Progress() as progress:
        # Shares of the time, by which the rest of it is estimated.
        bar = progress.add_task('Building', total=100)
        model, meta = export.load_model(cfg, args.checkpoint)
        pictures = []
        if args.verify:
            pictures = [
                export.read_picture(args.verify, model, scale)
                for scale in (1, 0.75)
            ]
        if args.fuse:
            model, report = fuse_poly_nl(model)
            fused = bool(report.fused)
            progress.print(str(report))
        module = export.to_export(cfg, model)
        progress.update(bar, advance=10, description='Exporting')
        program = export.export(
            module, export.trial_divisor(cfg), args.exporter, args.opset
        )
        progress.update(bar, advance=80, description='Writing')
        facts = export.describe(cfg, module, meta, fused)
        export.save(program, args.out, facts)
        progress.update(bar, advance=5, description='Verifying')
        found = export.verify(module, program, pictures)
        progress.update(bar, advance=5, description='Done')
    print(f'{args.out}: {module.what}')
    for each in found:
        print(
            f'{" x ".join(map(str, each.shape))}: {each.output}, '
            f'{each.values} values: onnxruntime differs from torch by '
            f'{each.difference:.1e}'
        )
    bad = [each for each in found if not each.difference <= export.TOLERANCE]
    if bad:
        cli.say(
            f'{args.out}: {len(bad)} of {len(found)} outputs differ by more '
            f'than {export.TOLERANCE}'
        )
    return min(len(bad), 1)


if __name__ == '__main__':
    cli.run(main)
