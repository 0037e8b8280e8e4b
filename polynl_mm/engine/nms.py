"""NMS in operators of ONNX, which every runtime knows, from opset 11 on.

It follows mmdet: of each level the ``nms_pre`` best scores, of those the ones
above ``score_thr`` whose boxes are large enough, times the factor of their
place if the head has such, NMS within each class, and of each picture the
``max_per_img`` best.
"""

from __future__ import annotations

from onnx import ModelProto, compose, parser

# The least version of ONNX's operators that has them all.
NMS_OPSET = 11
_NO_LIMIT = 2**31 - 1

# In ONNX's own language, without what differs between opsets. Pictures B,
# boxes N, classes K, selected S; a name is that of a tensor.

# A level with scores (B, K, n): all but the best become 0.
_BEST = """
  level_{i} = Shape(scores{i})
  classes_{i} = Gather<axis=0>(level_{i}, one)
  places_{i} = Gather<axis=0>(level_{i}, two)
  all_{i} = Mul(classes_{i}, places_{i})
  fewer_{i} = Less(all_{i}, nms_pre)
  k_{i} = Where(fewer_{i}, all_{i}, nms_pre)
  flat_{i} = Reshape(scores{i}, row)
  top_{i}, _{i} = TopK<axis=1>(flat_{i}, k_{i})
  last_{i} = Sub(k_{i}, one)
  least_{i} = Gather<axis=1>(top_{i}, last_{i})
  bound_{i} = Reshape(least_{i}, deep)
  below_{i} = Less(scores{i}, bound_{i})
  best_{i} = Where(below_{i}, nothing, scores{i})"""

_NMS = """
<ir_version: {ir_version}, opset_import: ["": {opset}]>
nms (float[B, N, 4] boxes, {scores}{factors}{points})
=> (float[B, D, 5] dets, int64[B, D] labels{keypoints})
{{
  zero = Constant<value = int64[1] {{0}}>()
  one = Constant<value = int64[1] {{1}}>()
  two = Constant<value = int64[1] {{2}}>()
  three = Constant<value = int64[1] {{3}}>()
  none = Constant<value = int64[1] {{-1}}>()
  start = Constant<value = int64 {{0}}>()
  step = Constant<value = int64 {{1}}>()
  nothing = Constant<value = float {{0}}>()
  absent = Constant<value = float {{-1}}>()
  row = Constant<value = int64[2] {{0, -1}}>()
  column = Constant<value = int64[2] {{-1, 1}}>()
  line = Constant<value = int64[2] {{1, -1}}>()
  deep = Constant<value = int64[3] {{-1, 1, 1}}>()
  each = Constant<value = int64[3] {{0, -1, 1}}>()
  each_point = Constant<value = int64[4] {{0, -1, 1, 1}}>()
  nms_pre = Constant<value = int64[1] {{{nms_pre}}}>()
  max_per_img = Constant<value = int64[1] {{{max_per_img}}}>()
  iou_threshold = Constant<value = float[1] {{{iou_threshold}}}>()
  score_thr = Constant<value = float[1] {{{score_thr}}}>()
  no_score = Constant<value = float[1] {{0}}>()
  min_size = Constant<value = float {{{min_size}}}>()
  min_height = Constant<value = float {{{min_height}}}>()
{best}
  before = Concat<axis=2>({names})
  x1 = Gather<axis=2>(boxes, zero)
  y1 = Gather<axis=2>(boxes, one)
  x2 = Gather<axis=2>(boxes, two)
  y2 = Gather<axis=2>(boxes, three)
  width = Sub(x2, x1)
  height = Sub(y2, y1)
  is_wide = Greater(width, min_size)
  is_high = Greater(height, min_size)
  is_low = Less(height, min_height)
  is_not_low = Not(is_low)
  has_area = And(is_wide, is_high)
  is_large = And(has_area, is_not_low)
  is_large_row = Transpose<perm=[0, 2, 1]>(is_large)
  large = Where(is_large_row, before, nothing)
  is_above = Greater(large, score_thr)
  above = Where(is_above, large, nothing)
  scores = {times_factors}

  selected = NonMaxSuppression(
    boxes, scores, max_per_img, iou_threshold, no_score)
  picture = Gather<axis=1>(selected, zero)
  label = Gather<axis=1>(selected, one)
  place = Gather<axis=1>(selected, two)
  index = Concat<axis=1>(picture, place)
  score = GatherND(scores, selected)
  score_column = Reshape(score, column)
  box = GatherND(boxes, index)
  found = Concat<axis=1>(box, score_column)

  shape = Shape(boxes)
  batch = Gather<axis=0>(shape, start)
  pictures = Range(start, batch, step)
  pictures_column = Reshape(pictures, column)
  picture_line = Reshape(picture, line)
  is_own = Equal(pictures_column, picture_line)
  score_line = Reshape(score, line)
  own = Where(is_own, score_line, absent)
  count_shape = Shape(score)
  is_few = Less(count_shape, max_per_img)
  most = Where(is_few, count_shape, max_per_img)
  sorted, order = TopK<axis=1>(own, most)

  is_empty = Less(sorted, nothing)
  most_scalar = Gather<axis=0>(most, start)
  ranks = Range(start, most_scalar, step)
  numbers = Add(ranks, one)
  numbers_line = Reshape(numbers, line)
  filled = Where(is_empty, zero, numbers_line)
  filled_flat = Reshape(filled, none)
  counts = Concat<axis=0>(filled_flat, zero)
  longest = ReduceMax<keepdims=0>(counts)
  end = Reshape(longest, one)

  is_empty_row = Reshape(is_empty, each)
  found_sorted = Gather<axis=0>(found, order)
  found_own = Where(is_empty_row, nothing, found_sorted)
  dets = Slice(found_own, zero, end, one)
  label_flat = Reshape(label, none)
  label_sorted = Gather<axis=0>(label_flat, order)
  label_own = Where(is_empty, none, label_sorted)
  labels = Slice(label_own, zero, end, one)
{of_points}
}}
"""

_POINTS = """
  point = GatherND(points, index)
  point_sorted = Gather<axis=0>(point, order)
  is_empty_point = Reshape(is_empty, each_point)
  point_own = Where(is_empty_point, nothing, point_sorted)
  keypoints = Slice(point_own, zero, end, one)"""


def append_nms(
    model: ModelProto,
    levels: int,
    keypoints: bool,
    iou_threshold: float,
    score_thr: float = 0.0,
    nms_pre: int = -1,
    max_per_img: int = -1,
    min_size: float = -1,
    min_height: float = -1,
) -> ModelProto:
    """Let NMS follow a model that gives boxes and scores.

    A picture's rows are in the order of their scores; where another picture
    has more, they are filled with zeros, and labels with -1.

    Args:
        model (ModelProto): Its outputs are ``boxes`` (B, N, 4), ``scores0``
            and so on, of each level (B, K, n), and ``points`` (B, N, 5, 2);
            ``factors`` (B, 1, N), if it has them.
        levels (int): How many.
        keypoints (bool): Whether there are ``points``.
        iou_threshold (float): Boxes that overlap a better one by more go.
        score_thr (float): Scores must be above it, and above 0.
        nms_pre (int): Of each level; -1 is no limit.
        max_per_img (int): Of each picture; -1 is no limit.
        min_size (float): Sides must be above it, in pixels; none if below 0.
        min_height (float): Boxes must be as high, in pixels; none if below 0.

    Returns:
        ModelProto: With the outputs ``dets`` (B, D, 5), x1, y1, x2, y2 and
        score, ``labels`` (B, D) and, with landmarks, ``keypoints``
        (B, D, 5, 2).
    """
    numbers = range(levels)
    limited = nms_pre > 0
    factors = 'factors' in [each.name for each in model.graph.output]
    opset = next(each for each in model.opset_import if not each.domain)
    text = _NMS.format(
        ir_version=model.ir_version,
        opset=opset.version,
        scores=', '.join(f'float[B, K, N{i}] scores{i}' for i in numbers),
        factors=', float[B, 1, N] factors' if factors else '',
        times_factors='Mul(above, factors)' if factors else 'Identity(above)',
        points=', float[B, N, P, 2] points' if keypoints else '',
        keypoints=', float[B, D, P, 2] keypoints' if keypoints else '',
        best=''.join(_BEST.format(i=i) for i in numbers) if limited else '',
        names=', '.join(
            f'{"best_" if limited else "scores"}{i}' for i in numbers
        ),
        of_points=_POINTS if keypoints else '',
        nms_pre=nms_pre,
        max_per_img=max_per_img if max_per_img > 0 else _NO_LIMIT,
        iou_threshold=float(iou_threshold),
        score_thr=float(score_thr),
        min_size=float(min_size) if min_size >= 0 else -1e30,
        min_height=float(min_height) if min_height >= 0 else -1e30,
    )
    nms = parser.parse_model(text)
    # As they are in the model, custom domains included.
    del nms.opset_import[:]
    nms.opset_import.extend(model.opset_import)
    for node in nms.graph.node:
        node.name = node.output[0]
    nms = compose.add_prefix(
        nms, 'nms/', rename_inputs=False, rename_outputs=False
    )
    names = [each.name for each in nms.graph.input]
    merged = compose.merge_models(model, nms, [(name, name) for name in names])
    # It lists those of both, and quantisation refuses a domain that is twice
    # there.
    del merged.opset_import[:]
    merged.opset_import.extend(model.opset_import)
    return merged
