"""What each host means by what a tool is asked: one table.

A host is imported only where a config of its own is at hand.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from inspect import signature

from mmengine.config import Config
from mmengine.registry import METRICS, MODELS, DefaultScope

from .cli import StartError


@dataclass(frozen=True)
class Host:
    """A host, as our tools see it.

    What is given as 'module:name' is for :func:`pkgutil.resolve_name`.

    Attributes:
        out: Has the predictions saved to the path of ``--out``, given the
            config and the path; gives the config of a metric to add to the
            evaluator, or None where those of the config do it. Raises
            StartError if the host could not save them there.
        show_dir: The setting of a config that is the folder of
            ``--show-dir``; None where the tool draws nothing.
        inferencer: 'module:name' of the class that draws what a model finds.
        score_thr: Its argument for the least score of what is drawn, if any.
        sample: 'module:name' of what a pipeline packs a picture into.
        meta_keys: What such a sample has to know for a prediction.
        exported: 'module:name' of what gives, for a model, what of it is
            exported. Raises ValueError where its config can not be exported.
        tta_defaults: Gives what ``--tta`` takes for the keys ``tta_model``
            and ``tta_pipeline`` where a config lacks them, given the config
            and that of a data set. Raises StartError where that can not be.
        set_up: 'module:name' of what the host's own tools call first, without
            arguments.
        check_datasets: 'module:name' of what looks at every sample before a
            start, given the configs of the data sets of a loader, what tells
            the user a line, the slice of the samples that is this process's
            to read, and whether these are all that a model is to learn from.
            Raises ValueError or OSError at the first that is wrong.
        check_job: 'module:name' of what looks at the config of a job, given
            it and the phases of the job. Raises ValueError or OSError if it
            would learn or measure something wrong.
        check_test_cfg: 'module:name' of what looks at ``model.test_cfg``.
            Raises ValueError if anything of ours in it is wrong.
        tile: Has pictures taken tile by tile, given the config, the configs
            of its test data sets, and the pixels of ``--tile`` and
            ``--overlap``. Raises StartError where that can not be.
    """

    tile: Callable[[Config, list[dict], int, int], None]
    out: Callable[[Config, str], dict | None]
    show_dir: str | None
    inferencer: str
    sample: str
    meta_keys: tuple[str, ...]
    exported: str
    score_thr: str | None = None
    tta_defaults: Callable[[Config, dict], dict] = lambda cfg, dataset: {}
    set_up: str | None = None
    check_datasets: str | None = None
    check_job: str | None = None
    check_test_cfg: str | None = None


def host_of(cfg: Config, option: str | None = None) -> Host:
    """Give the host of a config.

    Args:
        cfg: Its ``default_scope`` names the host.
        option: That whose meaning depends on it, for the message.

    Raises:
        StartError: It is none of :data:`HOSTS`.
    """
    name = cfg.get('default_scope')
    if name in HOSTS:
        return HOSTS[name]
    names = list(HOSTS)
    if option is None:
        raise StartError(
            f'config {cfg.filename} has default_scope={name!r}, expected '
            + f'one of {", ".join(names)}'
        )
    raise StartError(
        f'{option} is known for configs of {", ".join(names)}, but config '
        f'{cfg.filename} has default_scope={name!r}'
    )


def plain_loader(cfg: Config) -> None:
    """Name the loader of the test pipeline as the inferencers know it.

    They put their own in its place, but only in that of mmcv's, and give it
    the same arguments: those of ours alone are left out.
    """
    from mmcv.transforms import TRANSFORMS, LoadImageFromFile

    for transform in cfg.test_dataloader.dataset.pipeline:
        kind = TRANSFORMS.get(transform.type)
        if kind is not None and issubclass(kind, LoadImageFromFile):
            transform.type = 'LoadImageFromFile'
            plain = signature(LoadImageFromFile).parameters
            for key in transform.keys() - {'type', *plain}:
                del transform[key]


def _check_pickle(out: str, saved: str) -> None:
    if not out.endswith(('.pkl', '.pickle')):
        raise StartError(
            f'--out {out}: {saved} to one .pkl or .pickle file, expected such '
            'a name'
        )


def _save_pickle(cfg: Config, out: str) -> dict:
    _check_pickle(out, 'mmdet saves predictions')
    return dict(type='mmdet.DumpDetResults', out_file_path=out)


def _save_label_maps(cfg: Config, out: str) -> None:
    if os.path.exists(out) and not os.path.isdir(out):
        raise StartError(
            f'--out {out}: mmseg saves label maps to a folder, but this is a '
            'file'
        )
    if out.endswith(('.pkl', '.pickle', '.json')):
        raise StartError(
            f'--out {out}: mmseg saves label maps, expected the name of a '
            'folder'
        )
    metrics = cfg.test_evaluator
    metrics = [metrics] if isinstance(metrics, dict) else metrics
    saving = [metric for metric in metrics if _takes_output_dir(metric)]
    if not saving:
        raise StartError(
            f'--out: no metric in test_evaluator of config {cfg.filename} '
            'takes an output_dir, as IoUMetric does'
        )
    for metric in saving:
        metric.output_dir = out
        metric.keep_results = True


def _takes_output_dir(metric: dict) -> bool:
    with METRICS.switch_scope_and_registry('mmseg') as registry:
        kind = registry.get(metric.type)
    # A type that nobody knows is left for the runner to complain about.
    return kind is not None and 'output_dir' in signature(kind).parameters


def _flip(cfg: Config, dataset: dict) -> dict:
    """Take each image and its mirror image, as mmdet's own tool does."""
    masks = _finds_masks('model', cfg.model)
    kind = (cfg.get('tta_model') or {}).get('type', 'DetTTAModel')
    if masks and str(kind).endswith('DetTTAModel'):
        raise StartError(
            f'--tta: mmdet merges boxes alone, and {masks} of config '
            f'{cfg.filename} finds masks: test it without'
        )
    *before, pack = deepcopy(dataset.pipeline)
    flips = [dict(type='RandomFlip', prob=prob) for prob in (1.0, 0.0)]
    if 'meta_keys' in pack:
        # The default ones hold both already.
        pack.meta_keys = (*pack.meta_keys, 'flip', 'flip_direction')
    augment = dict(type='TestTimeAug', transforms=[flips, [pack]])
    nms = dict(type='nms', iou_threshold=0.5)
    return dict(
        tta_model=dict(
            type='DetTTAModel', tta_cfg=dict(nms=nms, max_per_img=100)
        ),
        tta_pipeline=[*before, augment],
    )


def _finds_masks(path: str, part: dict) -> str | None:
    """Give the path of a head that finds masks, if there is one."""
    for key, each in part.items():
        if not isinstance(each, dict):
            continue
        kind = str(each.get('into', each.get('type')))
        if key == 'mask_head' or re.search(r'Ins\w*Head$', kind):
            return f'{path}.{key}'
        found = _finds_masks(f'{path}.{key}', each)
        if found:
            return found
    return None


def _tile_detector(
    cfg: Config, datasets: list[dict], tile: int, overlap: int
) -> None:
    """Make the model one of tiles, and keep pictures at their own size."""
    model = cfg.model
    if model.type != 'polynl_mm.Tiled':
        model.detector, model.type = model.type, 'polynl_mm.Tiled'
    model.tile, model.overlap = tile, overlap
    try:
        with DefaultScope.overwrite_default_scope('mmdet'):
            MODELS.build(deepcopy(model))
    except ValueError as error:
        options = f'--tile {tile} --overlap {overlap}'
        raise StartError(f'{options}: {error}') from error
    for dataset in datasets:
        dataset.pipeline = [_at_own_size(each) for each in dataset.pipeline]


def _at_own_size(transform: dict) -> dict:
    """Give what a step of a pipeline becomes where no size is wanted."""
    kind = str(transform.type)
    if 'Resize' in kind:
        # It notes the scale that the heads ask for.
        return dict(type='polynl_mm.Resize', scale_factor=1.0)
    if kind.endswith('Pad') and transform.get('size'):
        rest = {k: v for k, v in transform.items() if k != 'size'}
        # What the sizes are multiples of.
        return dict(rest, size_divisor=32)
    return transform


def _refuse_tile(
    cfg: Config, datasets: list[dict], tile: int, overlap: int
) -> None:
    raise StartError(
        '--tile is for mmdet: mmseg takes windows by model.test_cfg=dict('
        "mode='slide', crop_size=..., stride=..., context='image')"
    )


def _save_scores(cfg: Config, out: str) -> dict:
    _check_pickle(out, 'the scores of a classifier are saved')
    return dict(type='DumpResults', out_file_path=out)


def _refuse_tiles_of_classes(
    cfg: Config, datasets: list[dict], tile: int, overlap: int
) -> None:
    raise StartError('--tile is for mmdet: a classifier sees whole pictures')


def _refuse_tta(cfg: Config, dataset: dict) -> dict:
    raise StartError('--tta is for mmdet and mmseg, not for classification')


HOSTS = {
    'mmdet': Host(
        tile=_tile_detector,
        out=_save_pickle,
        show_dir='default_hooks.visualization.test_out_dir',
        inferencer='mmdet.apis:DetInferencer',
        score_thr='pred_score_thr',
        sample='mmdet.structures:DetDataSample',
        meta_keys=('img_shape', 'ori_shape', 'scale_factor'),
        exported='polynl_mm.engine.candidates:exported',
        tta_defaults=_flip,
        set_up='mmdet.utils:setup_cache_size_limit_of_dynamo',
        check_job='polynl_mm.faces.head:check_batch_augments',
    ),
    'mmseg': Host(
        tile=_refuse_tile,
        out=_save_label_maps,
        show_dir='visualizer.save_dir',
        inferencer='mmseg.apis:MMSegInferencer',
        sample='mmseg.structures:SegDataSample',
        meta_keys=('ori_shape',),
        exported='polynl_mm.engine.export:Logits',
        check_datasets='polynl_mm.segmentation.labels:check_seg_data',
        check_test_cfg='polynl_mm.segmentation.windows:check_test_cfg',
    ),
    # Recognition, on mmengine alone.
    'polynl_mm': Host(
        tile=_refuse_tiles_of_classes,
        out=_save_scores,
        show_dir=None,
        inferencer='polynl_mm.classification.inferencer:ClsInferencer',
        sample='mmengine.structures:BaseDataElement',
        meta_keys=(),
        exported='polynl_mm.engine.export:Scores',
        tta_defaults=_refuse_tta,
        check_datasets='polynl_mm.classification.dataset:check_image_folders',
        check_job='polynl_mm.classification.dataset:check_classes',
    ),
}
