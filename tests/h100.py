"""Layers measured on an NVIDIA H100 80GB, torch 2.11+cu130, at 8074cc2.

Forward and backward with all gradients, GPU time of a captured graph that is
replayed, 2026-11-24. TIMES: for each regime, microseconds of a 1x1 convolution
C -> C; then in units of it ``direct`` and ``gram`` as ordinary operations,
``gram`` with matrix products in TF32, and ``gram`` and ``direct`` of a
prototype with kernels of few launches.
"""

from polynl_mm.ops.choice import Form

# How the prototype went over the features, and its launches, as choice.py has
# those of the kernels: for direct it wrote the gradients of u and v, too.
PROTOTYPE = {
    Form('direct'): ((0, 7, 4), (0, 22, 12)),
    Form('gram'): ((0, 3, 5), (0, 10, 14)),
}

# Images, C, N.
SHAPES = (
    (2, 256, 200 * 336),
    (2, 512, 100 * 168),
    (2, 1024, 50 * 84),
    (2, 2048, 25 * 42),
    (8, 1024, 40 * 40),
    (2, 512, 64 * 128),
    (1, 512, 128 * 256),
    (1, 256, 512 * 512),
)

COLUMNS = ('conv', 'direct', 'gram', 'gram TF32', 'lean gram', 'lean direct')
TIMES = {
    'bfloat16': (
        (223, 18.0, 2.2, 2.1, 2.2, 3.4),
        (129, 16.5, 2.9, 2.6, 2.6, 3.6),
        (111, 11.2, 5.4, 3.5, 3.5, 3.3),
        (227, 4.9, 13.4, 6.2, 6.4, 5.1),
        (160, 11.4, 10.6, 5.4, 6.2, 3.6),
        (72, 15.0, 3.6, 2.9, 2.8, 3.3),
        (133, 15.5, 2.2, 2.1, 2.1, 3.2),
        (337, 22.1, 2.0, 1.9, 2.1, 4.0),
    ),
    # Convolutions in TF32.
    'float32': (
        (464, 8.0, 10.9, 1.9, 2.1, 5.2),
        (298, 7.0, 8.8, 2.0, 2.1, 5.0),
        (258, 5.4, 8.6, 2.3, 2.4, 3.7),
        (394, 3.8, 11.5, 4.7, 4.9, 4.8),
        (361, 5.5, 12.1, 3.1, 3.7, 4.2),
        (152, 6.8, 8.9, 2.4, 2.4, 4.8),
        (257, 7.5, 7.4, 2.0, 2.1, 4.9),
        (693, 9.5, 5.5, 1.8, 2.0, 6.5),
    ),
}
