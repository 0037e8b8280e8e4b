"""Slow, independent truths. Imports nothing of polynl_mm."""

import math

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


def contributions_loop(x, n, w1, w2, w3, beta, b1=None, b2=None, weights=None):
    """What each position of an image adds to the branch at position n.

    beta * a_m / sum(a) * (((x_m W1 + b1) * (x_m W2 + b2)) * x_n) W3, row by
    row, in float64; without weights each a_m is 1.

    Shape: x (C, N), w (C, C) as of convolutions, weights (N,) -> (N, C).
    """
    rows = x.t()
    zero = torch.zeros(x.shape[0], dtype=torch.float64)
    b1, b2 = (zero if b is None else b for b in (b1, b2))
    counts = [1.0] * len(rows) if weights is None else weights.tolist()
    added = []
    for position, count in zip(rows, counts):
        product = (position @ w1.t() + b1) * (position @ w2.t() + b2)
        product = product * count / sum(counts)
        added.append(beta * ((product * rows[n]) @ w3.t()))
    return torch.stack(added)


def poly_sa_loop(
    x, wq, wk, wv, wo, bq=None, bk=None, bv=None, bo=None, *, heads,
    norm=None, weights=None, p1=None, p2=None,
):  # fmt: skip
    """Poly-SA, one image, one head and one token at a time, in float64.

    g_h = mean_n K_nh * V_nh, a weighted mean with ``weights``, or, with the
    learnt vectors, sum_n p2_hn K_nh * V_nh; then Y_n = [p1_hn Q_nh * norm(g_h)
    for each h] Wo, norm a (weight, bias, eps) of a LayerNorm over the head.

    Shape: x (B, N, C), w (C, C) as of nn.Linear, b (C,), weights (B, N),
    p1 and p2 (heads, N).
    """
    zero = torch.zeros(x.shape[2], dtype=torch.float64)
    bq, bk, bv, bo = (zero if b is None else b for b in (bq, bk, bv, bo))
    width = x.shape[2] // heads
    images = []
    for i, image in enumerate(x):
        counts = [1.0] * len(image) if weights is None else list(weights[i])
        total = 1.0 if p2 is not None else sum(counts)
        queries, gates = [[] for _ in image], []
        for h in range(heads):
            own = slice(h * width, (h + 1) * width)
            gate = torch.zeros(width, dtype=torch.float64)
            for n, token in enumerate(image):
                queries[n].append(wq[own] @ token + bq[own])
                key, value = wk[own] @ token + bk[own], wv[own] @ token
                count = counts[n] * (1.0 if p2 is None else p2[h, n])
                gate = gate + count * key * (value + bv[own])
            gate = gate / total if total > 0 else torch.zeros(width).double()
            if norm is not None:
                mean = sum(gate) / width
                variance = sum((v - mean) ** 2 for v in gate) / width
                scaled = (gate - mean) / torch.sqrt(variance + norm[2])
                gate = norm[0] * scaled + norm[1]
            gates.append(gate)
        rows = []
        for n in range(len(image)):
            spread = [1.0 if p1 is None else p1[h, n] for h in range(heads)]
            mixed = [s * q * g for s, q, g in zip(spread, queries[n], gates)]
            rows.append(wo @ torch.cat(mixed) + bo)
        images.append(torch.stack(rows))
    return torch.stack(images) if images else x * 1


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


def overlap(a, b, plus=0):
    """IoU of two boxes x1 y1 x2 y2; ``plus`` 1 counts inclusive pixels."""

    def area(x1, y1, x2, y2):
        return max(x2 - x1 + plus, 0) * max(y2 - y1 + plus, 0)

    shared = area(
        max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])
    )
    return shared / (area(*a) + area(*b) - shared)


def vote_loop(boxes, scores, values, threshold, keep_single, max_num):
    """Box voting as RetinaFace's official test code has it, box by box.

    Boxes (n, 4), scores (n,) and values (n, d) are lists; returns lists of
    averages and of scores.
    """
    rest = sorted(range(len(boxes)), key=lambda i: -scores[i])
    means, best = [], []
    while rest and len(means) < max_num:
        top = rest[0]
        joined = [
            i for i in rest if overlap(boxes[top], boxes[i], 1) >= threshold
        ]
        rest = [i for i in rest if i not in joined]
        if len(joined) == 1 and rest and not keep_single:
            continue
        total = sum(scores[i] for i in joined)
        means.append(
            [
                sum(scores[i] * values[i][k] for i in joined) / total
                for k in range(len(values[0]))
            ]
        )
        best.append(scores[top])
    return means, best


def match_loop(anchors, faces, pos, neg, forced=None):
    """Give each anchor its face, -1 (background) or None (neither).

    An anchor is a face's from an IoU of ``pos`` on, background below ``neg``;
    then, face by face, the best anchor of a face becomes its own from an IoU
    of ``forced`` on.
    """
    result = []
    for anchor in anchors:
        ious = [overlap(anchor, face) for face in faces]
        best = max(ious, default=0)
        if best >= pos:
            result.append(ious.index(best))
        else:
            result.append(-1 if best < neg else None)
    if forced is not None:
        for i, face in enumerate(faces):
            ious = [overlap(anchor, face) for anchor in anchors]
            if max(ious) >= forced:
                result[ious.index(max(ious))] = i
    return result


def smooth_l1(x, beta):
    """Smooth L1 loss of a number."""
    x = abs(x)
    return x * x / 2 / beta if x < beta else x - beta / 2


def retinaface_losses_loop(
    anchors, pictures, *, matching, ratio, softmax, box_stds, box_beta, std,
    landmark_beta
):  # fmt: skip
    """RetinaFace's three losses, not weighted, anchor by anchor.

    ``pictures`` holds per picture (faces, points, present, logits, deltas,
    offsets) as nested lists: (n, 4), (n, 5, 2), (n, 5); then per anchor the
    class logits (2 if softmax, background last, else 1), the box code and the
    landmark code.
    """
    classes, boxes, landmarks, positives, marked = 0.0, 0.0, 0.0, 0, 0
    for faces, points, present, logits, deltas, offsets in pictures:
        match = match_loop(anchors, faces, *matching)
        negatives, found = [], 0
        for i, face in enumerate(match):
            if face is None:
                continue
            z = logits[i][0] - logits[i][1] if softmax else logits[i][0]
            loss = math.log1p(math.exp(z if face < 0 else -z))
            if face < 0:
                negatives.append(loss)
                continue
            classes += loss
            found += 1
            x1, y1, x2, y2 = anchors[i]
            centre, size = ((x1 + x2) / 2, (y1 + y2) / 2), (x2 - x1, y2 - y1)
            f = faces[face]
            code = [
                ((f[0] + f[2]) / 2 - centre[0]) / size[0],
                ((f[1] + f[3]) / 2 - centre[1]) / size[1],
                math.log((f[2] - f[0]) / size[0]),
                math.log((f[3] - f[1]) / size[1]),
            ]
            boxes += sum(
                smooth_l1(deltas[i][k] - code[k] / box_stds[k], box_beta)
                for k in range(4)
            )
            marked += any(present[face])
            for k in range(5):
                for axis in range(2) if present[face][k] else ():
                    target = points[face][k][axis] - centre[axis]
                    landmarks += smooth_l1(
                        offsets[i][2 * k + axis] - target / std / size[axis],
                        landmark_beta,
                    )
        negatives.sort(reverse=True)
        classes += sum(negatives[: ratio * found])
        positives += found
    return (
        classes / max(positives, 1),
        boxes / max(positives, 1),
        landmarks / max(marked, 1),
    )
