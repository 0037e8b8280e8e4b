"""Build what a card would run, without one; prints a line of JSON for each.

The operation is called on tensors without memory, forward and backward, and
every kernel that it would launch is compiled, once for the types, the blocks
and the alignment it is given, for sm_80 and sm_90. Not under Triton's
interpreter: a process that has begun with it can not compile.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parents[2])]

from polynl_mm.ops import operators  # noqa: E402
from polynl_mm.ops import triton as kernels  # noqa: E402
from polynl_mm.ops.gate import Params  # noqa: E402
from polynl_mm.ops.precision import policy  # noqa: E402

PTXAS = Path(triton.__file__).parent / 'backends/nvidia/bin/ptxas'
POINTER = {
    torch.bfloat16: '*bf16',
    torch.float32: '*fp32',
}


def described(kernel, args, meta):
    """Signature, constants and attributes as Triton derives them."""
    args = dict(zip(kernel.arg_names, args))
    args.update((k, v) for k, v in meta.items() if k in kernel.arg_names)
    signature, constants, attributes = {}, {}, {}
    for at, (name, value) in enumerate(args.items()):
        if name in meta or value is None or value is True or value is False:
            signature[name], constants[name] = 'constexpr', value
        elif isinstance(value, torch.Tensor):
            signature[name] = POINTER[value.dtype]
            attributes[(at,)] = [['tt.divisibility', 16]]
        elif isinstance(value, float):
            signature[name] = 'fp32'
        elif value == 1:
            signature[name], constants[name] = 'constexpr', 1
        else:
            signature[name] = 'i64' if abs(value) >= 2**31 else 'i32'
            if value % 16 == 0:
                attributes[(at,)] = [['tt.divisibility', 16]]
    options = {k: v for k, v in meta.items() if k.startswith('num_')}
    return signature, constants, attributes, options


def run(dtype, b, c, n, out, bias, direct, train):
    """Everything that is launched for one layer of this kind."""

    def tensor(*size, dtype=torch.float32):
        return torch.empty(size, dtype=dtype, device='meta')

    wide = c if out is None else out
    x = tensor(b, c, n, dtype=dtype).requires_grad_(train)
    biases = [tensor(wide) if bias else None for _ in range(3)]
    p = Params(
        *(tensor(wide, wide).requires_grad_(train) for _ in range(3)),
        *(tensor(1).requires_grad_(train) for _ in range(2)),
        *biases,
    )
    conv = None
    if out is not None:
        moments = (tensor(out) for _ in range(4))
        mean, variance, weight, offset = moments
        w = tensor(out, c).requires_grad_(train)
        conv = operators.evaluated(
            w, None, mean, variance, 1e-5, weight, offset
        )
        p = operators.project(conv, p)
    g, x = operators.gate_of(x, p, None, n, direct, conv is not None)
    y = operators.apply_gate(g, p, conv, x, direct)
    if train:
        y.backward(torch.empty_like(y))


def launches():
    """Every kernel with what it is given, each kind once."""
    found = {}

    def record(kernel, grid, *args, **meta):
        what = described(kernel, args, meta)
        found.setdefault((kernel.__name__, str(what)), (kernel, what))

    def precision_for(x):
        return policy(x.dtype, (9, 0), convolutions=True)

    # Of tensors without memory, an operator would run its fake kernel.
    whole = {f'_{k}': getattr(kernels, k) for k in kernels.__all__}
    with (
        mock.patch.multiple(operators, **whole),
        mock.patch.object(kernels, 'launch', record),
        mock.patch.object(kernels, 'precision_for', precision_for),
        mock.patch.object(kernels, 'multiply', lambda y, *args, **options: y),
    ):
        for dtype in POINTER:
            for direct in (False, True):
                for train in (False, True):
                    run(dtype, 2, 512, 16800, None, True, direct, train)
                    run(dtype, 2, 512, 16800, 2048, True, direct, train)
            run(dtype, 2, 2048, 1050, None, False, True, True)
            run(dtype, 1, 67, 131, 203, True, False, True)
    return list(found.values())


def main():
    """Compile for both architectures."""
    capabilities = [int(a) for a in sys.argv[1:]] or [80, 90]
    for kernel, (signature, constants, attributes, options) in launches():
        for capability in capabilities:
            built = triton.compile(
                ASTSource(kernel, signature, constants, attributes),
                target=GPUTarget('cuda', capability, 32),
                options=options,
            )
            with tempfile.TemporaryDirectory() as folder:
                ptx = Path(folder) / 'kernel.ptx'
                ptx.write_text(built.asm['ptx'])
                target = re.search(r'\.target (\w+)', built.asm['ptx'])[1]
                told = subprocess.run(
                    [
                        PTXAS,
                        '-v',
                        '--gpu-name',
                        target,
                        ptx,
                        '-o',
                        '/dev/null',
                    ],
                    capture_output=True,
                    text=True,
                    check=True,
                ).stderr
            spills = re.search(r'(\d+) bytes spill stores', told)
            row = dict(
                kernel=kernel.__name__,
                capability=capability,
                types=[v for v in signature.values() if v != 'constexpr'],
                constants={k: str(v) for k, v in constants.items()},
                registers=int(re.search(r'Used (\d+) registers', told)[1]),
                spilled=int(spills[1]),
                shared=built.metadata.shared,
                atomics=bool(re.search(r'\b(atom|red)\.', built.asm['ptx'])),
            )
            print(json.dumps(row), flush=True)


if __name__ == '__main__':
    main()
