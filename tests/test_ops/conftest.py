"""Every test of the operation: on each device, in memory that holds NaN."""

import os

# What cuBLAS wants before it is deterministic.
os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')

import pytest  # noqa: E402
import torch  # noqa: E402
from helpers import DEVICES  # noqa: E402


@pytest.fixture(params=DEVICES, autouse=True)
def device(request):
    """The device that tensors are made on by default, its name."""
    if request.param == 'cpu':
        yield 'cpu'
        return
    # float32 as on a CPU; what runs in TF32 has tests of its own.
    convolutions = torch.backends.cudnn
    with torch.device(request.param), convolutions.flags(allow_tf32=False):
        yield request.param


@pytest.fixture(autouse=True)
def fresh_memory_is_nan():
    """What is read before it is written shows, from torch 2.2 on."""
    if not hasattr(torch.utils, 'deterministic'):
        yield
        return
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    assert torch.empty(3).new_empty_strided((2, 2), (1, 2)).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


if os.environ.get('TRITON_INTERPRET') == '1':
    # Kernels run on the CPU. Their interpreter cuts off what is to become
    # bfloat16, where a card rounds.
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    convert_float = interpreter._convert_float

    def convert_by_rounding(data, source, target, mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert_float(data, source, target, mode)
        rounded = torch.from_numpy(data.view(np.float32)).bfloat16()
        return rounded.view(torch.int16).numpy().view(np.uint16)

    interpreter._convert_float = convert_by_rounding
