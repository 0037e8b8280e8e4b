r"""mmengine's training loops, where parts of an image share their gates.

**Crops.** With ``crops_per_image=n`` a batch holds n crops of each image, and
the Poly-NL layers take their gates over all of them
(:class:`polynl_mm.context.Crops`)::

    train_cfg = dict(type='polynl_mm.IterBasedTrainLoop', crops_per_image=4)

Every index that the sampler gives is loaded n times in a row, each time
through the pipeline, whose crop is random. So a batch has ``batch_size / n``
images. Crops of one image have the same ``img_path`` in their samples.

**Bands.** With ``ranks_per_image=n``, for images that do not fit one device,
n consecutive processes hold a band of rows of every image each, and gates and
their gradients are summed over the n (:class:`polynl_mm.context.Processes`).
Several such groups are parallel in the data::

    train_cfg = dict(type='polynl_mm.IterBasedTrainLoop',
                     ranks_per_image=4, halo=128)

The processes of a group load batches as ever and send them to the others in
turn: ``batch_size`` is that of a group, an epoch has n times the iterations,
and every sample is seen once. A batch is cut behind the data preprocessor,
that is padded and normalised as a whole: for a moment every device has the
three channels of all of it. Validation is not cut.

Averaged as DistributedDataParallel does, the gradients are those of the whole
image, where the halo reaches as far as the model sees without its global
layers (nearly, where it does not), and

- height and width of the padded image are multiples of the model's stride, and
  the heads have ``align_corners=False``;
- the losses are mmseg's ``CrossEntropyLoss`` without ``class_weight`` and
  sampler. They are scaled by what the band counts in the mean over the image;
  of others the mean over the bands is taken, with a warning;
- no norm depends on the features at hand. A BatchNorm in training is refused:
  saved would be the statistics of process 0, that is of upper bands. SyncBN
  has those of all bands, in which rows of a halo count twice.

The log has the losses of process 0, scaled.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial

import torch
import torch.distributed as dist
from mmengine.dist import broadcast_object_list, get_dist_info
from mmengine.model import is_model_wrapper
from mmengine.runner import BaseLoop, Runner, loops
from mmengine.structures import PixelData
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils.data import BatchSampler, DataLoader

from polynl_mm.context import Crops, Processes, bands, shared_context
from polynl_mm.registry import LOOPS

__all__ = ['EpochBasedTrainLoop', 'IterBasedTrainLoop']


class _PartsLoop(BaseLoop):
    """What the loops do beside mmengine's; the arguments are all theirs.

    Args:
        crops_per_image (int): Crops of each image in a batch; 1 changes
            nothing.
        ranks_per_image (int): Processes that hold an image; 1 changes nothing.
        halo (int): Rows of each neighbour, in pixels, that a band has as well.
        multiple (int): Rows where bands begin are a multiple of it: the
            stride of the model.
        **kwargs: Of mmengine's loop.

    Raises:
        ValueError: On arguments that do not fit each other, the number of
            processes, the data loader or the model.
    """

    def __init__(
        self,
        runner: Runner,
        dataloader: DataLoader | dict,
        *args,
        crops_per_image: int = 1,
        ranks_per_image: int = 1,
        halo: int = 128,
        multiple: int = 32,
        **kwargs,
    ) -> None:
        """Check all, make the groups of processes; see the class."""
        for name, value, least in (
            ('crops_per_image', crops_per_image, 1),
            ('ranks_per_image', ranks_per_image, 1),
            ('halo', halo, 0),
            ('multiple', multiple, 1),
        ):
            if not isinstance(value, int) or value < least:
                raise ValueError(
                    f'train_cfg.{name} must be an int, {least} or more, got '
                    f'{value!r}'
                )
        if crops_per_image > 1 and ranks_per_image > 1:
            raise ValueError(
                f'train_cfg has crops_per_image={crops_per_image} and '
                f'ranks_per_image={ranks_per_image}: only one may be above 1'
            )
        self.crops, self.ranks = crops_per_image, ranks_per_image
        self.bands = partial(
            bands, count=ranks_per_image, halo=halo, multiple=multiple
        )
        if self.crops > 1:
            dataloader = _with_crops(dataloader, self.crops)
        if self.ranks > 1:
            self.ignore_index = _check(runner)
            self.group = _group(self.ranks)
            # Builds it, where it is a config.
            BaseLoop.__init__(self, runner, dataloader)
            dataloader = _InTurn(self.dataloader, self.group, self.ranks)
        if self.crops > 1 or self.ranks > 1:
            # What is wrong with the model is to be said now.
            with shared_context(runner.model, Crops()):
                pass
        super().__init__(runner, dataloader, *args, **kwargs)

    def run_iter(self, *args) -> None:
        """Iterate one mini-batch, the last argument, in one context."""
        model = self.runner.model
        with ExitStack() as stack:
            if self.crops > 1:
                crops = Crops(_images(args[-1]))
                stack.enter_context(shared_context(model, crops))
            if self.ranks > 1:
                prepare = _unwrapped(model).data_preprocessor
                cut = partial(self._cut, stack)
                stack.enter_context(prepare.register_forward_hook(cut))
            super().run_iter(*args)

    def _cut(self, stack: ExitStack, prepare: nn.Module, args, batch: dict):
        """Give the band of a batch, and enter what is to be done with it."""
        model, inputs = self.runner.model, batch['inputs']
        for sample in batch['data_samples']:
            if sample.keys() != ['gt_sem_seg']:
                raise ValueError(
                    f'ranks_per_image={self.ranks}: the data samples have '
                    f'{sample.keys()}, and only gt_sem_seg can be cut'
                )
        place = get_dist_info()[0] % self.ranks
        band = self.bands(tuple(inputs.shape[-2:]))[place]
        (_, top, _, bottom), (_, begin, _, end) = band.box, band.core
        labels = torch.stack(
            [sample.gt_sem_seg.data for sample in batch['data_samples']]
        )
        part = labels[..., top:bottom, :].clone()
        part[..., : begin - top, :] = self.ignore_index
        part[..., end - top :, :] = self.ignore_index
        for sample, each in zip(batch['data_samples'], part):
            sample.gt_sem_seg = PixelData(data=each)
            rows, width = each.shape[-2:]
            # What of the picture is in the band; below it there is padding.
            height, own_width = sample.img_shape
            own = min(max(height - top, 0), rows)
            sample.set_metainfo(
                dict(
                    img_shape=(own, own_width),
                    pad_shape=(rows, width),
                    padding_size=(0, width - own_width, 0, rows - own),
                )
            )

        stack.enter_context(shared_context(model, Processes(band, self.group)))
        valid, all_valid = (
            (each != self.ignore_index).sum().item() for each in (part, labels)
        )
        # What a loss divides by, to what it would for the whole image.
        ratio = {
            True: valid / max(all_valid, 1),
            False: part.numel() / labels.numel(),
        }
        for loss in model.modules():
            if _is_mean(loss):
                scale = partial(
                    _scale, by=ratio[loss.avg_non_ignore] * self.ranks
                )
                stack.enter_context(loss.register_forward_hook(scale))
        # A copy: the whole can be freed.
        return dict(batch, inputs=inputs[..., top:bottom, :].clone())


@LOOPS.register_module()
class IterBasedTrainLoop(_PartsLoop, loops.IterBasedTrainLoop):
    """mmengine's of this name; arguments as :class:`_PartsLoop`."""


@LOOPS.register_module()
class EpochBasedTrainLoop(_PartsLoop, loops.EpochBasedTrainLoop):
    """mmengine's of this name; arguments as :class:`_PartsLoop`."""


# ---------------------------------------------------------------------- crops


class _EachAgain(BatchSampler):
    """Batches in which every index comes several times in a row."""

    def __init__(self, sampler, batch_size, crops, drop_last) -> None:
        super().__init__(sampler, batch_size // crops, drop_last)
        self.crops = crops

    def __iter__(self) -> Iterator[list[int]]:
        for batch in super().__iter__():
            yield [index for index in batch for _ in range(self.crops)]


def _with_crops(dataloader: dict, crops: int) -> dict:
    if not isinstance(dataloader, dict):
        raise ValueError(
            f'train_cfg.crops_per_image={crops} needs train_dataloader as a '
            f'config, got a {type(dataloader).__name__}'
        )
    dataloader = dict(dataloader)
    if dataloader.get('batch_sampler') is not None:
        raise ValueError(
            f'train_cfg.crops_per_image={crops} makes the batches: set '
            'train_dataloader.batch_sampler=None, got '
            f'{dataloader["batch_sampler"]}'
        )
    if dataloader['batch_size'] % crops:
        raise ValueError(
            f'train_dataloader.batch_size={dataloader["batch_size"]} is not a '
            f'multiple of train_cfg.crops_per_image={crops}'
        )
    drop_last = dataloader.pop('drop_last', False)
    dataloader['batch_sampler'] = dict(
        type=_EachAgain, crops=crops, drop_last=drop_last
    )
    return dataloader


def _images(batch: dict) -> list[str]:
    try:
        return [sample.img_path for sample in batch['data_samples']]
    except AttributeError as error:
        raise ValueError(
            'crops_per_image: the data samples have no img_path; add it to '
            'meta_keys where the pipeline packs them'
        ) from error


# ---------------------------------------------------------------------- bands


def _group(ranks: int) -> dist.ProcessGroup:
    rank, world = get_dist_info()
    if world % ranks:
        raise ValueError(
            f'train_cfg.ranks_per_image={ranks}: the number of processes must '
            f'be a multiple of it, got {world}'
        )
    # All processes take part in making every group.
    groups = [
        dist.new_group(list(range(first, first + ranks)))
        for first in range(0, world, ranks)
    ]
    return groups[rank // ranks]


class _InTurn:
    """The data loaders of a group: each gives a batch to all, in turn."""

    def __init__(self, loader, group, ranks) -> None:
        self.loader, self.group, self.ranks = loader, group, ranks

    def __getattr__(self, name: str):
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return len(self.loader) * self.ranks

    def __iter__(self) -> Iterator:
        first = get_dist_info()[0] // self.ranks * self.ranks
        for batch in self.loader:
            for source in range(first, first + self.ranks):
                sent = [batch]
                broadcast_object_list(sent, source, self.group)
                yield sent[0]


def _check(runner: Runner) -> int:
    """Give the ignored label of a model that can be trained on bands."""
    model = _unwrapped(runner.model)
    what = f'train_cfg.ranks_per_image with {type(model).__name__}'
    if (runner.auto_scale_lr or {}).get('enable'):
        raise ValueError(
            f'{what}: auto_scale_lr would count the batch of a group as often '
            'as the group has processes; set the learning rate'
        )
    if getattr(model.data_preprocessor, 'batch_augments', None) is not None:
        raise ValueError(
            f'{what}: data_preprocessor.batch_augments are random, and so '
            'differ from process to process of an image: leave them out'
        )
    heads = [each for each in model.modules() if hasattr(each, 'loss_decode')]
    ignored = {head.ignore_index for head in heads}
    if len(ignored) != 1:
        raise ValueError(
            f'{what}: rows beyond a band get the one ignore_index of all '
            f'decode heads of mmseg, and there is {ignored or "no such head"}'
        )

    # As the loop is about to: hosts freeze in it what they freeze.
    model.train()
    norms = [
        (path, each)
        for path, each in model.named_modules()
        if isinstance(each, (_BatchNorm, _InstanceNorm, nn.GroupNorm))
        and not isinstance(each, nn.SyncBatchNorm)
        and (each.training or not isinstance(each, _BatchNorm))
    ]
    for path, each in norms:
        if isinstance(each, _BatchNorm):
            raise ValueError(
                f'{what}: {path} is a {type(each).__name__} in training, of '
                'which the statistics of process 0 are saved, and that has '
                'the upper band of every image: take SyncBN (on GPUs), or '
                'norm_eval=True where the host has it'
            )
    if norms:
        runner.logger.warning(
            f'{what}: {norms[0][0]} (of {len(norms)}) normalises by '
            'statistics of a band, not of the whole image'
        )
    for head in heads:
        losses = head.loss_decode
        losses = losses if isinstance(losses, nn.ModuleList) else [losses]
        for loss in losses:
            if (
                not _is_mean(loss)
                or getattr(loss, 'class_weight', None) is not None
                or getattr(head, 'sampler', None) is not None
            ):
                runner.logger.warning(
                    f'{what}: {type(loss).__name__} of {type(head).__name__} '
                    'is not a plain mean over pixels; its mean over bands is '
                    'near that of the whole image, not equal'
                )
    return ignored.pop()


def _is_mean(loss: nn.Module) -> bool:
    """Whether it is a CrossEntropyLoss of a host, a mean over pixels."""
    return hasattr(loss, 'avg_non_ignore') and loss.reduction == 'mean'


def _scale(loss: nn.Module, args, value: Tensor, by: float) -> Tensor:
    return value * by


def _unwrapped(model: nn.Module) -> nn.Module:
    return model.module if is_model_wrapper(model) else model
