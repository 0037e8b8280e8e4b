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


def wider_face_loop(pictures):
    """Official evaluation of WIDER Face, in steps as small as it describes.

    pictures is a list of (boxes, kept, detections): boxes of x y w h, kept
    {setting: indices from 1}, detections of x y w h score, all plain lists.
    Returns {setting: (AP, recalls, precisions)}, recall and precision at the
    thresholds 1 - 1/1000, 1 - 2/1000, ... 0.
    """
    scores = [d[4] for _, _, detections in pictures for d in detections]
    low, high = min(scores, default=0), max(scores, default=0)
    judged = []
    for boxes, kept, detections in pictures:
        # sorted() is stable.
        ordered = sorted(detections, key=lambda d: d[4], reverse=True)
        normed = [(d[4] - low) / (high - low or 1) for d in ordered]
        choices = []
        for detection in ordered:
            overlaps = [wider_face_iou(detection, box) for box in boxes]
            largest = max(overlaps, default=0)
            choices.append(overlaps.index(largest) if largest >= 0.5 else None)
        judged.append((len(boxes), kept, normed, choices))
    settings = pictures[0][1]
    return {s: wider_face_curve(s, judged) for s in settings}


def wider_face_iou(detection, box):
    ax1, ay1, ax2, ay2 = corners(detection)
    bx1, by1, bx2, by2 = corners(box)
    width = min(ax2, bx2) - max(ax1, bx1) + 1
    height = min(ay2, by2) - max(ay1, by1) + 1
    if width <= 0 or height <= 0:
        return 0.0
    area_a = (ax2 - ax1 + 1) * (ay2 - ay1 + 1)
    area_b = (bx2 - bx1 + 1) * (by2 - by1 + 1)
    return width * height / (area_a + area_b - width * height)


def corners(box):
    x, y, w, h = box[:4]
    return x, y, x + w, y + h


def wider_face_curve(setting, judged):
    faces = 0
    proposals, hits = [0] * 1000, [0] * 1000
    for count, kept, normed, choices in judged:
        faces += len(kept[setting])
        if count == 0 or not normed:
            continue
        wanted = {index - 1 for index in kept[setting]}
        recalled = [0] * count
        proposed, recalled_so_far = [], []
        for choice in choices:
            proposed.append(1)
            if choice is not None and choice not in wanted:
                recalled[choice] = -1
                proposed[-1] = -1
            elif choice is not None and recalled[choice] == 0:
                recalled[choice] = 1
            recalled_so_far.append(recalled.count(1))
        last, above = -1, 0
        for t in range(1, 1001):
            while last + 1 < len(normed) and normed[last + 1] >= 1 - t / 1000:
                last += 1
                above += proposed[last] == 1
            if last >= 0:
                proposals[t - 1] += above
                hits[t - 1] += recalled_so_far[last]
    recalls = [hit / faces for hit in hits]
    precisions = [
        hit / proposal if proposal else 0.0
        for hit, proposal in zip(hits, proposals)
    ]
    area, best = 0.0, 0.0
    for t in reversed(range(1000)):
        best = max(best, precisions[t])
        area += (recalls[t] - (recalls[t - 1] if t else 0)) * best
    return area, recalls, precisions
