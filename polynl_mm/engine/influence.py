"""Pictures of where Poly-NL layers look, of one file or during a training.

What is computed is in :mod:`polynl_mm.influence`. Here is which cell of a
layer's map a pixel of a picture belongs to, what mmcv's ``NonLocal2d`` attends
to for comparison, and the colours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from mmcv import imfrombytes
from mmcv.cnn.bricks.non_local import _NonLocalNd
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from torch import Tensor, nn

from polynl_mm.influence import layer_at, looking, only
from polynl_mm.limits import decode_picture
from polynl_mm.registry import HOOKS

from .checks import leaf_datasets
from .cli import StartError

__all__ = ['InfluenceHook', 'Picture', 'View', 'draw', 'name_of', 'views']

# RGB: adds, takes away.
RED, BLUE = (214, 24, 31), (5, 84, 200)

# Steps of pipelines, by the names that they have in these packages: those that
# resize, and those that change colours. All else might move pixels.
PACKAGES = ('mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'polynl_mm')
RESIZES = (
    *('Resize', 'FixScaleResize', 'FixShapeResize', 'ResizeShortestEdge'),
    *('ResizeToMultiple', 'RandomResize', 'RandomChoiceResize', 'ResizeEdge'),
)
COLOURS = (
    *('Normalize', 'Rerange', 'RandomGrayscale', 'RGB2Gray', 'CLAHE'),
    *('AdjustGamma', 'PhotoMetricDistortion', 'YOLOXHSVRandomAug'),
    *('ColorTransform', 'Color', 'Brightness', 'Contrast', 'Sharpness'),
    *('Solarize', 'SolarizeAdd', 'Posterize', 'Equalize', 'AutoContrast'),
    'Invert',
)


class Picture:
    """A picture file, as the test pipeline of a config prepares it.

    Args:
        cfg: With a ``test_dataloader`` or a ``val_dataloader``.
        path: Of the file.

    Attributes:
        pixels: (H, W, 3) uint8, RGB, as in the file.
        data: A batch of it, for the preprocessor of a model.
        scale: (x, y), from its pixels to those of the batch.

    Raises:
        OSError: The file can not be read.
        ValueError: It is no picture, the pipeline can not be run, or it does
            more than to resize, to pad and to change colours, so that it is
            not known where a pixel went.
    """

    def __init__(self, cfg: Config, path: str) -> None:
        """Run the pipeline; see the class."""
        loader = cfg.get('test_dataloader') or cfg.get('val_dataloader')
        if loader is None:
            raise ValueError('the config has no test_dataloader')
        steps = [
            step
            for step in next(leaf_datasets(loader)).get('pipeline') or ()
            if 'Annotation' not in str(step.get('type'))
        ]
        if len(steps) < 2:
            raise ValueError(
                f'{_PIPELINE} has {len(steps)} steps, expected one that loads '
                'a picture, and one that packs it'
            )
        with DefaultScope.overwrite_default_scope(cfg.get('default_scope')):
            try:
                *steps, pack = Compose(steps).transforms
            except Exception as error:  # as of steps below
                raise ValueError(
                    f'{_PIPELINE} can not be built: {error!r}'
                ) from error
        # The hosts' loaders have errors that name no file, or none.
        decode_picture(Path(path).read_bytes(), path, imfrombytes)
        # What mmdet's samples must have.
        results = dict(img_path=path, img_id=0)
        self.pixels, self.scale = None, (1.0, 1.0)
        for step in steps:
            # Steps may write into the picture that they are given.
            before = deepcopy(results.get('img'))
            results = _do(step, results, 'img')
            if self.pixels is None:
                self.pixels = _rgb(results['img'])
            elif not np.array_equal(before, results['img']):
                self._follow(step, before.shape, results)
        image = np.atleast_3d(results['img']).transpose(2, 0, 1).copy()
        packed = _do(pack, results, 'inputs')
        if not np.array_equal(image, packed['inputs']):
            raise _not_known(pack)
        if 'data_samples' in packed:
            # Detectors ask for these, also where nothing has resized.
            meta = dict(scale_factor=self.scale, img_shape=image.shape[1:])
            meta['ori_shape'] = self.pixels.shape[:2]
            meta.update((k, results[k]) for k in meta if k in results)
            packed['data_samples'].set_metainfo(meta)
        self.data = pseudo_collate([packed])

    def _follow(self, step, old_shape, results: dict) -> None:
        """Scale by what a step did; ValueError if that is not known."""
        # Some have a step of any type to resize by.
        names = {_name(step), _name(getattr(step, 'resize', step))}
        # Hosts pad at the right and at the bottom.
        if names <= {'Pad', *COLOURS}:
            return
        if not names <= {*RESIZES}:
            raise _not_known(step)
        size, new_size = old_shape[:2], results['img'].shape[:2]
        factor = results.get('scale_factor')
        if 'ResizeToMultiple' in names:
            # mmseg's tells no factor.
            factor = [new / old for old, new in zip(size, new_size)][::-1]
        self.scale = tuple(a * b for a, b in zip(self.scale, factor))
        # What is larger was padded. Rounded as it may be.
        if any(
            old * scale > new + 1
            for old, scale, new in zip(size, factor[::-1], new_size)
        ):
            raise _not_known(step)

    def check(self, points: Sequence[tuple[int, int]]) -> None:
        """Raise ValueError for a point x, y that is not in the picture."""
        height, width = self.pixels.shape[:2]
        for x, y in points:
            if not (0 <= x < width and 0 <= y < height):
                raise ValueError(
                    f'point {x} {y} is not in the picture, which has x '
                    f'0..{width - 1} and y 0..{height - 1}'
                )

    def rows(self, height: int, cells: int) -> np.ndarray:
        """Which of the rows of a map each row of the picture belongs to.

        Args:
            height: Of what the model is given, padding included.
            cells: Rows of the map, which spans all of that.
        """
        return self._cells(0, height, cells)

    def columns(self, width: int, cells: int) -> np.ndarray:
        """The same of columns."""
        return self._cells(1, width, cells)

    def _cells(self, axis, given, cells):
        centres = np.arange(self.pixels.shape[axis]) + 0.5
        found = centres * self.scale[1 - axis] * cells / given
        return found.astype(int).clip(max=cells - 1)


_PIPELINE = 'test_dataloader.dataset.pipeline'


def _do(step, results, key):
    """Give what a step of the pipeline makes of it, which has a key."""
    name = type(step).__name__
    try:
        results = step(results)
    except Exception as error:  # steps are anybody's, and raise all kinds
        raise ValueError(
            f'{_PIPELINE}: {name} can not be run: {error!r}'
        ) from error
    if not results or key not in results:
        raise ValueError(f'{_PIPELINE}: {name} gives no {key!r}, expected one')
    return results


def _name(step):
    """That of its type, None if that is none of the packages that we know."""
    package = type(step).__module__.partition('.')[0]
    return type(step).__name__ if package in PACKAGES else None


def _not_known(step):
    return ValueError(
        f'{_PIPELINE}: {type(step).__name__} is not known only to resize a '
        'picture, to pad it or to change its colours: where its pixels went '
        'is not known'
    )


@dataclass
class View:
    """What a layer of a model sees from some points of a picture.

    Attributes:
        layer: Its path.
        maps: (points, H, W), over the pixels of the picture: of each the
            value of its cell.
        sums: (points,), over the cells, those of the padding included. By
            default the length of the branch there.
    """

    layer: str
    maps: np.ndarray
    sums: np.ndarray


def views(
    model: nn.Module,
    picture: Picture,
    points: Sequence[tuple[int, int]],
    layer: str | None = None,
    call: int | None = None,
    score: Callable[[Tensor, tuple[int, int]], Tensor] | None = None,
) -> View:
    """See what a layer sees from some points.

    That is what each position adds to the branch at the point, along that
    branch; of a ``NonLocal2d``, what it attends to.

    Args:
        model: Of mmengine, in evaluation. Its Poly-NL layers are looked for;
            where it has none, those of ``NonLocal2d``.
        picture: What it is given.
        points: x, y in pixels of the picture.
        layer: Path; by default that of the last.
        call: Which call of the layer, see :func:`polynl_mm.influence.only`.
        score: See what each position adds to a number instead (to first
            order): given the scores of the classes at a point, (K,), and the
            point, gives it. For models whose ``mode='tensor'`` gives a map of
            scores, or one score a class.

    Raises:
        ValueError: A point is not in the picture, there is no such layer, it
            is not called once, or not with a map of the picture.
    """
    picture.check(points)
    batch = model.data_preprocessor(picture.data, False)
    given = tuple(batch['inputs'].shape[-2:])

    def cell(x, y, shape):
        return (
            int(picture.rows(given[0], shape[0])[y]),
            int(picture.columns(given[1], shape[1])[x]),
        )

    mode = 'predict' if score is None else 'tensor'
    blocks = _non_local_blocks(model)
    if layer in blocks or not (layer or _has_layers(model)) and blocks:
        path = [*blocks][-1] if layer is None else layer
        if score is not None:
            raise ValueError(
                f'{path} is a NonLocal2d, of which only attention can be seen'
            )
        maps = _attention(blocks[path], model, batch, points, cell)
    else:
        with (
            torch.set_grad_enabled(mode == 'tensor'),
            looking(model, layer) as looks,
        ):
            output = model(**batch, mode=mode)
        look = only(looks, call)
        path = look.path
        if len(look.spatial) != 2 or look.images != 1:
            raise ValueError(
                f'{path} is given features of shape ({look.images}, C, '
                f'{", ".join(map(str, look.spatial))}), expected one map of '
                'the picture'
            )
        if score is None:
            maps = look.maps([cell(*point, look.spatial) for point in points])
        else:
            scores = [_scores(output, *point, cell) for point in points]
            numbers = map(score, scores, points)
            maps = torch.stack([look.map_of(each) for each in numbers])
    maps = maps.cpu().numpy()
    rows = picture.rows(given[0], maps.shape[1])
    columns = picture.columns(given[1], maps.shape[2])
    return View(path, maps[:, rows[:, None], columns], maps.sum((1, 2)))


def _has_layers(model):
    try:
        return bool(layer_at(model))
    except ValueError:
        return False


def _scores(output, x, y, cell):
    """Those of the classes at a point, (K,)."""
    if not isinstance(output, Tensor) or output.dim() not in (2, 4):
        raise ValueError(
            "mode='tensor' of the model gives no scores of classes: expected "
            'a map of them (mmseg), or one a class'
        )
    if output.dim() == 2:
        return output[0]
    row, column = cell(x, y, output.shape[2:])
    return output[0, :, row, column]


def _non_local_blocks(model):
    # Others, as that of DNLNet, have that of mmcv for a base.
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, _NonLocalNd)
        and type(module).forward is _NonLocalNd.forward
    }


@torch.no_grad()
def _attention(block, model, batch, points, cell) -> Tensor:
    """Rows of its pairwise weights, as its forward has them."""
    given = []
    handle = block.register_forward_pre_hook(
        lambda _, args: given.append(args)
    )
    try:
        model(**batch, mode='predict')
    finally:
        handle.remove()
    if len(given) != 1 or len(given[0][0]) != 1 or given[0][0].dim() != 4:
        raise ValueError(
            f'the NonLocal2d was called {len(given)} times, expected once, '
            'with one map of the picture'
        )
    ((x,),) = given
    plain = block.mode == 'gaussian'
    theta = x if plain else block.theta(x)
    phi = x if plain and not block.sub_sample else block.phi(x)
    rows = []
    for point in points:
        row, column = cell(*point, x.shape[2:])
        query = theta[:, :, row, column]
        if block.mode == 'concatenation':
            weights = block.concatenation(
                query[:, :, None, None], phi.flatten(2).unsqueeze(2)
            )
        else:
            pairwise = getattr(block, block.mode)
            weights = pairwise(query[:, None], phi.flatten(2))
        rows.append(weights.reshape(phi.shape[2:]))
    return torch.stack(rows)


# ------------------------------------------------------------------- colours


def draw(
    pixels: np.ndarray,
    values: np.ndarray | None = None,
    point: tuple[int, int] | None = None,
) -> np.ndarray:
    """Draw a map over a picture.

    Red is what adds, blue what takes away; nothing is drawn at 0, and the
    colours are full at the largest absolute value.

    Args:
        pixels: (H, W, 3) uint8, RGB.
        values: (H, W); None leaves the picture as it is.
        point: x, y, to be marked.

    Returns:
        (H, W, 3) uint8, RGB.
    """
    drawn = pixels.copy()
    if values is not None:
        strength = np.abs(values) / max(np.abs(values).max(), 1e-30)
        colour = np.where(values[..., None] > 0, RED, BLUE)
        grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)[..., None]
        # Light, so that colours are seen over what is dark.
        grey = 128 + grey / 2.0
        drawn = grey + strength[..., None] * (colour - grey)
        drawn = np.ascontiguousarray(drawn.round().astype(np.uint8))
    if point is not None:
        size = max(min(pixels.shape[:2]) // 16, 5)
        for colour, width in (((255, 255, 255), 3), ((0, 0, 0), 1)):
            cv2.drawMarker(
                drawn, tuple(point), colour, cv2.MARKER_CROSS, size, width
            )
    return drawn


def name_of(
    first: str,
    point: tuple[int, int],
    layer: str | None = None,
    call: int | None = None,
    of: str | None = None,
) -> str:
    """Name a picture by all that was asked for, None for what was not.

    Args:
        first: What the name begins with.
        point: x, y.
        layer: See :func:`views`, as ``call``.
        call: From 0.
        of: What is added to, if not the branch.

    Returns:
        ``<first>_<x>_<y>[_<layer>][_call<call>][_<of>]``.
    """
    asked = (layer, None if call is None else f'call{call}', of)
    return '_'.join([first, *map(str, point), *filter(None, asked)])


def _rgb(image: np.ndarray) -> np.ndarray:
    """That of a loader, BGR or grey, of uint8 or float32."""
    image = np.clip(image, 0, 255).astype(np.uint8)
    if image.ndim == 2:
        return cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)
    return np.ascontiguousarray(image[..., ::-1])


# ---------------------------------------------------------------------- hook


@HOOKS.register_module()
class InfluenceHook(Hook):
    """Draw, during a training, where a layer looks.

    The pictures go to the visualizer (``vis_data/vis_image``, TensorBoard, and
    so on) as ``influence_<x>_<y>``, see :func:`name_of` for what a layer or a
    call adds, :func:`draw` and :func:`views`. While beta is 0 there is nothing
    to be seen::

        custom_hooks = [dict(type='polynl_mm.InfluenceHook',
                             image='some.png', at=[(120, 64)])]

    The model runs in evaluation for it, in the first of several processes,
    on one picture that the pipeline of the tests has prepared.

    Args:
        image (str): The picture.
        at (list[tuple[int, int]]): Points x, y, in its pixels.
        layer (str, optional): Path of the layer; by default the last.
        call (int, optional): Which of its calls, where there are several.
        interval (int): Training iterations between two drawings.

    Raises:
        StartError: Before the training: the picture can not be read, a point
            is not in it, or no map of it is there to be seen.
    """

    priority = 'LOW'

    def __init__(
        self,
        image: str,
        at: Sequence[tuple[int, int]],
        layer: str | None = None,
        call: int | None = None,
        interval: int = 500,
    ) -> None:
        """Take the arguments; see the class."""
        self.image, self.interval = image, interval
        self.at = [tuple(map(int, point)) for point in at]
        self.arguments = dict(layer=layer, call=call)

    def before_train(self, runner: Runner) -> None:
        """Read the picture, and look once."""
        if not is_main_process():
            return
        try:
            self._picture = Picture(runner.cfg, self.image)
            self._views(runner)
        except (OSError, ValueError) as error:
            raise StartError(
                f'polynl_mm.InfluenceHook of {self.image}: {error}'
            ) from error

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch=None, outputs=None
    ) -> None:
        """Draw every ``interval`` iterations."""
        if is_main_process() and (
            self.every_n_train_iters(runner, self.interval)
        ):
            seen = self._views(runner).maps
            for (x, y), values in zip(self.at, seen):
                runner.visualizer.add_image(
                    name_of('influence', (x, y), **self.arguments),
                    draw(self._picture.pixels, values, (x, y)),
                    runner.iter + 1,
                )

    def _views(self, runner: Runner) -> View:
        model = runner.model
        model = model.module if is_model_wrapper(model) else model
        training = model.training
        model.eval()
        try:
            return views(model, self._picture, self.at, **self.arguments)
        finally:
            model.train(training)
