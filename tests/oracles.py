"""Slow, independent truths. Imports nothing of polynl_mm."""

import torch


def poly_nl_loop(x, w1, w2, w3, alpha, beta, b1=None, b2=None, b3=None):
    """Poly-NL of the paper, one image and one position at a time.

    Rows are positions, as in the paper: Y = aX + b(mean(XW1 * XW2) * X)W3,
    with W = w^T for convolution weights w of shape (out, in). Everything is
    float64; gradients come from autograd through the loops.

    Shape: x (B, C, *spatial), w (C, C), b (C,), alpha and beta (1,).
    """
    zero = torch.zeros(x.shape[1], dtype=torch.float64)
    rows = x.flatten(2).transpose(1, 2)  # (B, N, C)
    weights = [w.t() for w in (w1, w2, w3)]
    b1, b2, b3 = (zero if b is None else b for b in (b1, b2, b3))
    images = []
    for image in rows:
        pooled = zero
        for position in image:
            first = position @ weights[0] + b1
            second = position @ weights[1] + b2
            pooled = pooled + first * second / len(image)
        images.append(
            [
                alpha * position
                + beta * ((pooled * position) @ weights[2] + b3)
                for position in image
            ]
        )
    if x.numel() == 0:
        return x * 1
    y = torch.stack([torch.stack(image) for image in images])
    return y.transpose(1, 2).reshape(x.shape)
