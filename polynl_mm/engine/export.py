"""Whole models as ONNX files, which onnxruntime has run before they are there.

Input is the picture as the model's data preprocessor gives it; what that does
stands in the file's ``metadata_props``, see :func:`describe`. Batch, height
and width are free.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from pkgutil import resolve_name
from typing import NamedTuple

import numpy as np
import onnx
import onnxruntime
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.runner import load_checkpoint
from mmengine.structures import BaseDataElement
from torch import Tensor, nn
from torch.onnx import _constants

from polynl_mm.limits import MAX_PIXELS, decode_picture

from .checks import build_model, leaf_datasets
from .cli import StartError
from .culprit import Alone, culprit
from .hosts import host_of
from .nms import NMS_OPSET, append_nms

# Of the largest value; of detections see :class:`Difference`.
TOLERANCE = 1e-4
# torch's exporters: by torch.export, and by tracing, as mmdeploy does.
EXPORTERS = ('dynamo', 'older')
# Arguments of Resize that decide about its result.
_RESIZE = ('scale', 'scale_factor', 'keep_ratio', 'max_side', 'interpolation')
_AXES = {0: 'batch', 2: 'height', 3: 'width'}


# --------------------------------------------------------- what is exported


def load_model(cfg: Config, checkpoint: str) -> tuple[nn.Module, dict]:
    """Build the model of a config for inference on the CPU.

    Args:
        cfg (Config): With ``model``.
        checkpoint (str): That :func:`~.checks.check_checkpoint` has let pass.

    Returns:
        tuple: The model, and ``meta`` of the checkpoint.
    """
    model = build_model(cfg)
    loaded = load_checkpoint(model, checkpoint, 'cpu', logger='silent')
    # SyncBN is of GPUs; evaluated it is BN.
    return revert_sync_batchnorm(model).eval(), loaded.get('meta') or {}


def to_export(cfg: Config, model: nn.Module) -> nn.Module:
    """Give what of a model is exported, as its host has it.

    Raises:
        StartError: Something in the config can not be exported.
    """
    try:
        # The older exporter gives all of it back in the mode of the outermost.
        return resolve_name(host_of(cfg).exported)(model).eval()
    except ValueError as error:
        raise StartError(f'config {cfg.filename}: {error}') from error


class Logits(nn.Module):
    """Scores before the softmax, resized to the input.

    Shape: (B, 3, H, W) -> (B, num_classes, H, W).

    Raises:
        ValueError: The segmentor is tested in windows.
    """

    nms = None

    def __init__(self, segmentor: nn.Module) -> None:
        """Take a segmentor of mmseg."""
        super().__init__()
        mode = (segmentor.test_cfg or {}).get('mode', 'whole')
        if mode != 'whole':
            raise ValueError(
                f'model.test_cfg.mode={mode!r} is not exported, as windows '
                'are cut around the network: set model.test_cfg.mode=whole '
                'and call what is exported for each window'
            )
        self.segmentor = segmentor
        head = segmentor.decode_head
        # Of a head in several stages it is the last one that decides.
        head = head[-1] if isinstance(head, nn.ModuleList) else head
        self.threshold = head.threshold if head.out_channels == 1 else None

    @property
    def what(self) -> str:
        """What is exported, for the user."""
        if self.threshold is None:
            return 'logits, resized to the size of the input'
        return (
            'one logit, resized to the size of the input: class 1 is where '
            f'its sigmoid is above {self.threshold}'
        )

    def output_names(self, count: int) -> list[str]:
        """As in mmdeploy."""
        return ['output']

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """Compute them."""
        size = x.shape[2:]
        meta = dict(img_shape=size, pad_shape=size, ori_shape=size)
        return (self.segmentor.encode_decode(x, [meta]),)


class Scores(nn.Module):
    """Scores of a classifier before the softmax, (B, num_classes)."""

    nms = None
    what = 'scores before the softmax'

    def __init__(self, classifier: nn.Module) -> None:
        """Take a classifier."""
        super().__init__()
        self.classifier = classifier

    def output_names(self, count: int) -> list[str]:
        """As in mmdeploy."""
        return ['output']

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """Compute them."""
        return (self.classifier(x),)


# ------------------------------------------------------------------ exports


def export(
    module: nn.Module,
    divisor: int = 32,
    exporter: str = 'dynamo',
    opset: int | None = None,
) -> onnx.ModelProto:
    """Export a module, and see that it is the same at another batch and size.

    Args:
        module (nn.Module): What :func:`to_export` gives.
        divisor (int): Of the heights and widths that are tried.
        exporter (str): Of :data:`EXPORTERS`.
        opset (int, optional): Version of ONNX's operators; by default
            torch's.

    Raises:
        StartError: It can not be exported, or what is exported does not run
            or gives something else; names the module.
    """
    _check_opset(module, exporter, opset)
    inputs = _inputs(divisor)
    why = _why_not(module, [[x] for x in inputs], exporter, opset)
    if isinstance(why, str):
        found = culprit(
            module,
            inputs,
            lambda *args: _reason(_why_not(*args, exporter, opset)),
        )
        path, part, why = found or ('', module, why)
        # Below the name by which the wrapper holds the model.
        path = path.partition('.')[2] or 'the model'
        other = EXPORTERS[EXPORTERS.index(exporter) - 1]
        raise StartError(
            f'{path} ({type(part).__name__}) can not be exported by the '
            f'{exporter} exporter: {why}; try --exporter {other}, or replace '
            'this module in the config'
        )
    model = why
    used = next(each for each in model.opset_import if not each.domain)
    if opset is not None and used.version != opset:
        raise StartError(
            f'--opset {opset}: the {exporter} exporter gives '
            f'{used.version} instead; try --exporter older'
        )
    if module.nms:
        model = append_nms(model, **module.nms)
        _check_detections(module, model, inputs)
    return _with_names(model)


def _check_opset(module: nn.Module, exporter: str, opset: int | None) -> None:
    """See that an exporter knows a version, and so does the NMS."""
    least, most = _constants.ONNX_MIN_OPSET, _constants.ONNX_MAX_OPSET
    if exporter == 'older':
        # In older torch, whose only one it was, it has no number of its own.
        name = 'ONNX_TORCHSCRIPT_EXPORTER_MAX_OPSET'
        most = getattr(_constants, name, most)
    if module.nms:
        least = NMS_OPSET
    if opset is not None and not least <= opset <= most:
        raise StartError(
            f'--opset {opset}: expected is {least} to {most}, which the '
            f'{exporter} exporter of torch {torch.__version__} can give here'
        )


def _check_detections(
    module: nn.Module, model: onnx.ModelProto, inputs: list[Tensor]
) -> None:
    """See that after NMS most pictures have what torch finds.

    In one alone, a box that all but ties may go the other way by rounding.
    """
    program, differences = session(model), []
    for x in inputs:
        pairs = zip(_detections(run(program, [x])), module.detect(x))
        side = max(x.shape[2:])
        differences += [_farthest(*pair, side) for pair in pairs]
    middle = float(np.median(differences))
    if not middle <= TOLERANCE:
        raise StartError(
            f'{type(module.head).__name__} can not be exported: what '
            f'onnxruntime finds after NMS differs from torch by {middle:.1g} '
            'of scores or of the side in most of the trial pictures'
        )


def _inputs(divisor: int) -> list[Tensor]:
    """Pictures of two batches and sizes, as if normalised."""
    generator = torch.Generator().manual_seed(0)
    k = -(-256 // divisor)
    return [
        torch.randn(b, 3, h * divisor, w * divisor, generator=generator)
        for b, h, w in ((2, k, k + 1), (3, k + 2, k))
    ]


def _reason(result: onnx.ModelProto | str) -> str | None:
    return result if isinstance(result, str) else None


def _why_not(
    module: nn.Module,
    given: list[list[Tensor]],
    exporter: str,
    opset: int | None,
) -> onnx.ModelProto | str:
    """Export a module at what it is given first; else say why not."""
    try:
        model = _program(module, given[0], exporter, opset)
    except Exception as error:  # exporters raise all kinds
        return _first_line(error)
    for tensors in given:
        sizes = ', '.join(str(tuple(x.shape)) for x in tensors)
        try:
            gots = run(session(model), tensors)
        except Exception as error:  # so does onnxruntime
            return f'onnxruntime does not run it at {sizes}: ' + _first_line(
                error
            )
        with torch.no_grad():
            wants = module(*tensors)
        for got, want in zip(gots, wants):
            error = relative_difference(got, want.numpy())
            if not error <= TOLERANCE:
                return (
                    f'at {sizes} it differs from torch by {error:.1g} of the '
                    'largest value, as something of the first input was taken '
                    'for a constant'
                )
    return model


def _first_line(error: BaseException) -> str:
    """What went wrong first, of a chain of errors."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines()]
    line = next((line for line in lines if line), '')
    return f'{type(error).__name__}: {line}'[:300]


def _program(
    module: nn.Module,
    tensors: Sequence[Tensor],
    exporter: str,
    opset: int | None,
) -> onnx.ModelProto:
    names = _input_names(len(tensors))
    if isinstance(module, Alone):
        # Of maps and of sequences, all but the channels may be anything.
        axes = [
            {i: f'size{k}_{i}' for i in range(x.dim()) if i != x.dim() % 2 + 1}
            for k, x in enumerate(tensors)
        ]
        outputs = None
    else:
        axes = [_AXES]
        with torch.no_grad():
            outputs = module.output_names(len(module(*tensors)))
    if exporter == 'dynamo':
        auto = torch.export.Dim.AUTO
        free = [dict.fromkeys(each, auto) for each in axes]
        options = dict(
            dynamo=True,
            dynamic_shapes=(tuple(free),)
            if isinstance(module, Alone)
            else tuple(free),
        )
    else:
        options = dict(dynamic_axes=dict(zip(names, axes)))
        if 'dynamo' in torch.onnx.export.__kwdefaults__:
            options['dynamo'] = False
    with tempfile.TemporaryDirectory() as folder, _quiet():
        file = os.path.join(folder, 'model.onnx')
        torch.onnx.export(
            module,
            tuple(tensors),
            file,
            input_names=names,
            output_names=outputs,
            opset_version=opset,
            **options,
        )
        return onnx.load(file)


def _input_names(count: int) -> list[str]:
    return [f'input{i or ""}' for i in range(count)]


@contextmanager
def _quiet():
    """Without what exporters print, the errors of which say enough."""
    loggers = [
        logging.getLogger(name) for name in ('torch.onnx', 'onnxscript')
    ]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter('ignore')
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def _with_names(model: onnx.ModelProto) -> onnx.ModelProto:
    """Name the free axes of the inputs, and of what keeps them."""
    (given,) = model.graph.input
    for axis, name in _AXES.items():
        given.type.tensor_type.shape.dim[axis].dim_param = name
    for output in model.graph.output:
        dims = output.type.tensor_type.shape.dim
        if len(dims):
            dims[0].dim_param = 'batch'
    return model


def describe(cfg: Config, module: nn.Module, meta: dict, fused: bool) -> dict:
    """What a user of the file must know, as its ``metadata_props``.

    Args:
        cfg (Config): The config.
        module (nn.Module): What was exported.
        meta (dict): Of the checkpoint.
        fused (bool): Whether Poly-NL layers were fused.

    Returns:
        dict[str, str]: ``outputs``, what they are; ``mean`` and ``std`` by
        which the input is normalised, after the channels were turned around
        if ``bgr_to_rgb``; ``pad_size_divisor`` of :func:`divisor_of` and
        ``pad_value``, with which the normalised input is padded; the
        ``classes``, ``config``, ``fused``. Where there are such: ``pad_size``,
        height and width to which smaller inputs are padded;
        ``min_size_of_input`` and ``min_height_of_input``, in pixels, as the
        file drops boxes; ``threshold`` of a segmentor with one logit;
        ``resize``, the arguments of Resize in the test pipeline. But for
        words as JSON.
    """
    owner = preprocessing(cfg)
    classes = (meta.get('dataset_meta') or {}).get('classes') or ()
    facts = dict(
        mean=list(owner.get('mean') or (0, 0, 0)),
        std=list(owner.get('std') or (1, 1, 1)),
        # Both mean that channels are turned around.
        bgr_to_rgb=bool(owner.get('bgr_to_rgb') or owner.get('rgb_to_bgr')),
        pad_size_divisor=divisor_of(cfg),
        pad_value=owner.get('pad_value', owner.get('pad_val', 0)),
        classes=list(classes),
        fused=fused,
    )
    size = (owner.get('test_cfg') or {}).get('size')
    if size:
        facts['pad_size'] = list(size)
    if module.nms:
        for key in ('min_size', 'min_height'):
            # Of no size at all they are at any scale.
            if module.nms[key] > 0:
                facts[f'{key}_of_input'] = module.nms[key]
    if getattr(module, 'threshold', None) is not None:
        facts['threshold'] = module.threshold
    steps = [
        step
        for dataset in leaf_datasets(cfg.get('test_dataloader') or {})
        for step in dataset.get('pipeline') or ()
        if str(step['type']).rpartition('.')[2] == 'Resize'
    ]
    if steps:
        facts['resize'] = {k: v for k, v in steps[0].items() if k in _RESIZE}
    words = dict(outputs=module.what, config=os.path.basename(cfg.filename))
    return {**words, **{k: json.dumps(v) for k, v in facts.items()}}


def preprocessing(cfg: Config) -> dict:
    """Give the config of the data preprocessor."""
    own = cfg.model.get('data_preprocessor')
    return own or cfg.get('data_preprocessor') or {}


def divisor_of(cfg: Config) -> int:
    """Give to multiples of what the data preprocessor pads in tests, or 1."""
    owner = preprocessing(cfg)
    # mmseg's own size_divisor is for training alone.
    in_tests = owner.get('test_cfg') or {}
    return owner.get('pad_size_divisor') or in_tests.get('size_divisor') or 1


def trial_divisor(cfg: Config) -> int:
    """Give the divisor of the sizes that are tried, by default 32."""
    # Most networks take multiples of it.
    return divisor_of(cfg) if divisor_of(cfg) > 1 else 32


def save(model: onnx.ModelProto, path: str, facts: dict) -> None:
    """Write a file that is there when it is whole."""
    onnx.helper.set_model_props(model, facts)
    onnx.checker.check_model(model)
    aside = f'{path}.{os.getpid()}.part'
    try:
        onnx.save(model, aside)
        os.replace(aside, path)
    finally:
        if os.path.exists(aside):
            os.remove(aside)


# ------------------------------------------------------------------- checks


class Difference(NamedTuple):
    """How far onnxruntime is from torch.

    Attributes:
        shape: Of the input.
        output: Its name.
        values: How many values, or detections.
        difference: The greatest, relative to the largest value. Of
            detections: between one and the nearest in the other's, in
            scores, or in longer sides of the picture.
    """

    shape: tuple[int, ...]
    output: str
    values: int
    difference: float


def verify(
    module: nn.Module, model: onnx.ModelProto, inputs: Sequence[Tensor]
) -> list[Difference]:
    """Compare what is in a file with torch, on inputs of any size."""
    program, found = session(model), []
    for x in inputs:
        shape, gots = tuple(x.shape), run(program, [x])
        if module.nms:
            wants = module.detect(x)
            pairs = list(zip(_detections(gots), wants))
            found.append(
                Difference(
                    shape,
                    'dets',
                    sum(map(len, wants)),
                    max(_farthest(*pair, max(shape[2:])) for pair in pairs),
                )
            )
            continue
        with torch.no_grad():
            wants = [want.numpy() for want in module(x)]
        names = [each.name for each in program.get_outputs()]
        for name, got, want in zip(names, gots, wants):
            error = relative_difference(got, want)
            found.append(Difference(shape, name, want.size, error))
    return found


def _detections(outputs: list[np.ndarray]) -> list[np.ndarray]:
    """Those of each picture, in rows as :meth:`Candidates.detect` gives."""
    dets, labels, *points = outputs
    columns = [dets, labels[..., None]]
    # Not -1, which is no number where nothing was found.
    columns += [each.reshape(*labels.shape, 10) for each in points]
    rows = np.concatenate(columns, 2)
    return [each[label >= 0] for each, label in zip(rows, labels)]


def _farthest(got: np.ndarray, want: np.ndarray, side: int) -> float:
    """From any row of one to the nearest of the other, at most."""
    if not len(got) or not len(want):
        return 0.0 if len(got) == len(want) else np.inf
    # The scores and labels count as they are.
    scale = np.full(got.shape[1], side, float)
    scale[4:6] = 1
    distances = torch.cdist(
        *(torch.from_numpy(each / scale) for each in (got, want)), p=np.inf
    )
    return max(distances.amin(dim).max().item() for dim in (0, 1))


def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """Have onnxruntime ready, on the CPU."""
    options = onnxruntime.SessionOptions()
    # What goes wrong is raised.
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=['CPUExecutionProvider']
    )


def run(
    program: onnxruntime.InferenceSession, tensors: Sequence[Tensor]
) -> list[np.ndarray]:
    """All outputs for these inputs."""
    # What a program does not use is none of its inputs.
    used = {each.name for each in program.get_inputs()}
    feeds = dict(zip(_input_names(len(tensors)), tensors))
    feeds = {name: x.numpy() for name, x in feeds.items() if name in used}
    return program.run(None, feeds)


def relative_difference(got: np.ndarray, want: np.ndarray) -> float:
    """The greatest, in units of the largest value; inf for other shapes."""
    if got.shape != want.shape:
        return np.inf
    if not want.size:
        return 0.0
    error = np.abs(got.astype(float) - want).max()
    return float(error / max(np.abs(want).max(), 1e-30))


def read_picture(path: str, model: nn.Module, scale: float = 1.0) -> Tensor:
    """Give a picture as the model's data preprocessor hands it on.

    Args:
        path (str): A file.
        model (nn.Module): Of a host.
        scale (float): Of height and width.

    Returns:
        Tensor: (1, 3, H, W).

    Raises:
        StartError: It is no picture.
    """
    # Not for those who ask for --help alone.
    from mmcv import imfrombytes, imrescale

    try:
        content = Path(path).read_bytes()
        pixels = decode_picture(content, path, imfrombytes, MAX_PIXELS)
    except (OSError, ValueError) as error:
        raise StartError(str(error)) from error
    pixels = imrescale(pixels, scale)
    picture = torch.from_numpy(pixels).permute(2, 0, 1)
    batch = dict(inputs=[picture], data_samples=[BaseDataElement()])
    return model.data_preprocessor(batch)['inputs']
