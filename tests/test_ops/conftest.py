"""Every test of the operation: on each device, in memory that holds NaN."""

import os

# What cuBLAS wants before it is deterministic.
os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')

import pytest  # noqa: E402
import torch  # noqa: E402
from helpers import DEVICES  # noqa: E402


@pytest.fixture(params=DEVICES, autouse=True)
def device(request):
    """The device that tensors are made on by default."""
    if request.param == 'cpu':
        yield 'cpu'
        return
    with torch.device(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def fresh_memory_is_nan():
    """What is read before it is written shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    assert torch.empty(3).new_empty_strided((2, 2), (1, 2)).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


if os.environ.get('TRITON_INTERPRET') == '1':
    # Kernels run on the CPU. Their interpreter has bfloat16 as bits, which it
    # multiplies as they are, and cuts off where a card rounds; of TF32, which
    # tensor cores cut off of float32, it knows nothing.
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    create_dot = interpreter.InterpreterBuilder.create_dot
    convert_float = interpreter._convert_float

    def widened(a):
        if a.dtype.scalar != tl.bfloat16:
            return a
        bits = a.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def cut_off(a):
        bits = a.data.view(np.uint32) & 0xFFFFE000
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot_of_any(self, a, b, total, precision, *args):
        a, b = widened(a), widened(b)
        if precision == interpreter._ir.INPUT_PRECISION.TF32 and (
            a.dtype.scalar == tl.float32
        ):
            a, b = cut_off(a), cut_off(b)
        return create_dot(self, a, b, total, precision, *args)

    def convert_by_rounding(data, source, target, mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert_float(data, source, target, mode)
        rounded = torch.from_numpy(data.view(np.float32)).bfloat16()
        return rounded.view(torch.int16).numpy().view(np.uint16)

    interpreter.InterpreterBuilder.create_dot = create_dot_of_any
    interpreter._convert_float = convert_by_rounding
