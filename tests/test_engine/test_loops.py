"""Training on bands and on crops: the same steps as with the whole image.

Run as a script, this file is the four processes of its own tests.
"""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('mmseg')

import torch.nn.functional as F  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.dataset import pseudo_collate  # noqa: E402
from mmengine.runner import Runner  # noqa: E402
from mmengine.structures import PixelData  # noqa: E402
from mmseg.models import SegDataPreProcessor  # noqa: E402
from mmseg.registry import MODELS  # noqa: E402
from mmseg.structures import SegDataSample  # noqa: E402
from mmseg.utils import register_all_modules  # noqa: E402
from torch import nn  # noqa: E402

from polynl_mm.engine import loops  # noqa: E402
from polynl_mm.engine.runner import GlooRunner  # noqa: E402
from polynl_mm.layers import PolyNL2d  # noqa: E402

ROOT = Path(__file__).parents[2]
WORLD, RATE, CLASSES = 4, 0.3, 3


pytestmark = pytest.mark.usefixtures('quiet_and_quick')


# -------------------------------------------------------------------- models


@MODELS.register_module()
class Doubles(SegDataPreProcessor):
    """Gives float64."""

    def forward(self, data, training=False):
        batch = super().forward(data, training)
        return {**batch, 'inputs': batch['inputs'].double()}


@MODELS.register_module()
class Toy(nn.Module):
    """A convolution and a layer, which is not the identity."""

    def __init__(self, kernel):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, kernel, padding=kernel // 2)
        self.layer = PolyNL2d(5, alpha_init=0.7, beta_init=0.9)

    def forward(self, x):
        return [self.layer(self.conv(x))]


@MODELS.register_module()
class ExactLoss(nn.Module):
    """mmseg's adds 1e-7 to what it divides by."""

    reduction, loss_name = 'mean', 'loss_ce'

    def __init__(self, avg_non_ignore):
        super().__init__()
        self.avg_non_ignore = avg_non_ignore

    def forward(self, scores, labels, weight, ignore_index):
        total = F.cross_entropy(
            scores, labels, ignore_index=ignore_index, reduction='sum'
        )
        counted = labels != ignore_index
        return total / (
            counted.sum() if self.avg_non_ignore else counted.numel()
        )


def toy(kernel=3, avg_non_ignore=True, size=(21, 8), **changes):
    """It sees 4 pixels to either side with the kernel of 3."""
    model = dict(
        type='EncoderDecoder',
        data_preprocessor=dict(
            type='Doubles', mean=[99.0] * 3, std=[50.0] * 3, size=size
        ),
        backbone=dict(type='Toy', kernel=kernel),
        decode_head=dict(
            type='polynl_mm.PolyNLHead',
            beta_init=0.8,
            kernel_size=kernel,
            in_channels=5,
            channels=7,
            num_classes=CLASSES,
            dropout_ratio=0,
            align_corners=False,
            loss_decode=dict(type='ExactLoss', avg_non_ignore=avg_non_ignore),
        ),
    )
    return build(model, **changes)


def resnet(**changes):
    """Of mmseg; it sees 40 pixels to either side."""
    norm = dict(type='SyncBN')
    model = dict(
        type='EncoderDecoder',
        data_preprocessor=dict(
            type='Doubles', mean=[99.0] * 3, std=[50.0] * 3, size_divisor=4
        ),
        backbone=dict(
            type='ResNetV1c',
            depth=18,
            num_stages=1,
            strides=(1,),
            dilations=(1,),
            out_indices=(0,),
            stem_channels=4,
            base_channels=4,
            norm_cfg=norm,
            norm_eval=True,
        ),
        decode_head=dict(
            type='polynl_mm.PolyNLHead',
            beta_init=0.8,
            in_channels=4,
            channels=4,
            num_classes=CLASSES,
            dropout_ratio=0,
            align_corners=False,
            loss_decode=dict(type='CrossEntropyLoss', avg_non_ignore=True),
        ),
    )
    return build(model, **changes)


def build(model, **changes):
    from mmengine.model import revert_sync_batchnorm

    register_all_modules()
    cfg = Config(dict(model=model))
    cfg.merge_from_dict({f'model.{k}': v for k, v in changes.items()})
    torch.manual_seed(0)
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    # The runner then does not.
    model.init_weights()
    return model.double()


# ---------------------------------------------------------------------- data


def sample(index, shape, generator, **meta):
    """A picture, whose upper third has few labels."""
    labels = torch.randint(CLASSES, (1, *shape), generator=generator)
    few = torch.rand((1, *shape), generator=generator) < 0.8
    few[:, shape[0] // 3 :] = False
    labels[few] = 255
    return dict(
        inputs=torch.randint(
            256, (3, *shape), generator=generator, dtype=torch.uint8
        ),
        data_samples=SegDataSample(
            gt_sem_seg=PixelData(data=labels), metainfo=meta
        ),
    )


def pictures(count, shape):
    generator = torch.Generator().manual_seed(1)
    return [sample(k, shape, generator) for k in range(count)]


class RandomCrops:
    """Every access of an index is another crop."""

    def __init__(self, count, shape):
        self.count, self.shape, self.calls = count, shape, 0

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.calls += 1
        generator = torch.Generator().manual_seed(self.calls)
        path = f'{index}.png'
        return sample(index, self.shape, generator, img_path=path)


# --------------------------------------------------------------------- steps


def train(
    folder,
    model,
    data,
    runner=Runner,
    batch_size=1,
    by=None,
    collate=pseudo_collate,
    **cfg,
):
    """Train by the loops; gives the runner."""
    wrapper = cfg.pop('optim_wrapper', {})
    hooks = cfg.pop('custom_hooks', None)
    loader = cfg.pop('train_dataloader', {})
    default = dict(type='polynl_mm.IterBasedTrainLoop', max_iters=2)
    runner = runner(
        model,
        str(folder),
        train_dataloader=dict(
            batch_size=batch_size,
            num_workers=0,
            sampler=dict(type='DefaultSampler', shuffle=False),
            dataset=data,
            collate_fn=dict(type=collate),
            **loader,
        ),
        train_cfg={**(by or default), **cfg.pop('train_cfg', {})},
        optim_wrapper=dict(
            type='OptimWrapper',
            optimizer=dict(type='SGD', lr=RATE),
            **wrapper,
        ),
        custom_hooks=hooks,
        default_hooks=dict(checkpoint=None, logger=None),
        experiment_name=folder.name,
        launcher='pytorch' if runner is not Runner else 'none',
        **cfg,
    )
    runner.train()
    return runner


def stepped(model, steps):
    """The same by hand, each step on some batches of whole images."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    for batches in steps:
        optimizer.zero_grad()
        for batch in batches:
            # The preprocessor writes into the samples.
            batch = dict(
                inputs=[each['inputs'] for each in batch],
                data_samples=[each['data_samples'].clone() for each in batch],
            )
            batch = model.data_preprocessor(batch, True)
            losses = model(**batch, mode='loss')
            loss = sum(v for k, v in losses.items() if 'loss' in k)
            (loss / len(batches)).backward()
        optimizer.step()
    return model


def moved(model, start):
    """What training has changed: gradients, summed."""
    return {
        name: (each - old).detach()
        for (name, each), old in zip(
            model.named_parameters(), start.parameters()
        )
    }


def assert_same_steps(got, model, start, tolerance):
    want = moved(model, start)
    size = max(each.abs().max() for each in want.values())
    assert size > 1e-3
    for name, each in want.items():
        error = (got[name] - each).abs().max() / size
        assert error <= tolerance, f'{name}: {error:.3g}'


# ------------------------------------------------------- bands, by processes

PARTS = {
    # Name: model, rows and columns, arguments, tolerance.
    'two groups': (toy, (21, 8), dict(ranks_per_image=2, halo=4), 1e-10),
    'one group': (
        partial(toy, avg_non_ignore=False),
        (21, 8),
        dict(ranks_per_image=4, halo=4),
        1e-10,
    ),
    'padded': (
        partial(toy, size=(33, 9)),
        (21, 8),
        dict(ranks_per_image=4, halo=5, multiple=3),
        1e-10,
    ),
    'short halo': (toy, (21, 8), dict(ranks_per_image=2, halo=3), None),
    # mmseg's loss itself.
    'resnet': (
        resnet,
        (62, 12),
        dict(ranks_per_image=2, halo=40, multiple=4),
        1e-7,
    ),
}


def steps(data, ranks, by_epoch=False):
    """Images of each step, by group: processes load data in turn."""
    groups = WORLD // ranks
    return [
        [[data[group * ranks + k]] for group in range(groups)]
        for k in range(ranks)
    ]


def interrupt(*args):
    raise KeyboardInterrupt('by the user')


def assert_left(model):
    """The model is as it was before the iteration."""
    for each in model.modules():
        assert getattr(each, 'around', None) is None
    assert not model.data_preprocessor._forward_hooks
    assert len(model.decode_head.loss_decode._forward_hooks) <= 1


def process(rank, folder):
    """What each does; saved are the results of the first."""
    torch.distributed.init_process_group(
        'gloo',
        init_method=f'file://{folder}/group',
        rank=rank,
        world_size=WORLD,
    )
    results, sent = {}, []
    all_reduce = torch.distributed.all_reduce

    def counted(tensor, *args, **kwargs):
        sent.append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    torch.distributed.all_reduce = counted
    for name, (make, shape, given, _) in PARTS.items():
        ranks, start = given['ranks_per_image'], make()
        model = make()
        sent.clear()
        by = dict(type='polynl_mm.EpochBasedTrainLoop', max_epochs=1)
        if name == 'two groups':
            by = dict(type='polynl_mm.IterBasedTrainLoop', max_iters=ranks)
        done = train(
            folder / name.replace(' ', '_'),
            model,
            pictures(WORLD, shape),
            GlooRunner,
            by=by,
            train_cfg={'multiple': 1, **given},
            custom_hooks=[dict(type='EMAHook')],
            cfg=Config(
                dict(activation_checkpointing=['decode_head.poly_nl'])
                if name == 'padded'
                else {}
            ),
        )
        assert done.iter == ranks
        assert_left(model)
        results[name] = moved(model, start), list(sent)

    # Two images before a step.
    model = toy()
    done = train(
        folder / 'accumulated',
        model,
        pictures(WORLD, (21, 8)),
        GlooRunner,
        optim_wrapper=dict(accumulative_counts=2),
        train_cfg=dict(ranks_per_image=2, halo=4, multiple=1),
    )
    results['accumulated'] = moved(model, toy()), []

    # Both fail between forward and the end of the iteration.
    depth, model = pictures(WORLD, (21, 8)), toy()
    for each in depth:
        each['data_samples'].gt_depth_map = PixelData(
            data=torch.ones(1, 21, 8)
        )
    model.decode_head.loss_decode.register_forward_hook(interrupt)
    for name, data in (
        ('depth', depth),
        ('interrupted', pictures(4, (21, 8))),
    ):
        try:
            train(
                folder / name,
                model,
                data,
                GlooRunner,
                train_cfg=dict(ranks_per_image=2, halo=4, multiple=1),
            )
        except (ValueError, KeyboardInterrupt) as error:
            results[name] = f'{type(error).__name__}: {error}'
        assert_left(model)
    if rank == 0:
        torch.save(results, folder / 'results.pth')
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    # Python's own end may meet a thread of gloo, see polynl_mm.engine.
    os._exit(0)


@pytest.fixture(scope='module')
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp('bands')
    done = subprocess.run(
        [sys.executable, __file__, str(folder)],
        env={**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return torch.load(folder / 'results.pth')


@pytest.mark.parametrize('name', PARTS)
def test_bands_are_trained_as_the_whole(results, name):
    make, shape, given, tolerance = PARTS[name]
    whole = stepped(
        make(), steps(pictures(WORLD, shape), given['ranks_per_image'])
    )
    if tolerance is None:
        # A pixel of context less than needed is seen.
        with pytest.raises(AssertionError):
            assert_same_steps(results[name][0], whole, make(), 1e-6)
        tolerance = 0.1
    assert_same_steps(results[name][0], whole, make(), tolerance)


def test_gradients_are_accumulated(results):
    data = pictures(WORLD, (21, 8))
    whole = stepped(toy(), [[[each] for each in data]])
    assert_same_steps(results['accumulated'][0], whole, toy(), 1e-10)


def test_only_the_channels_are_sent(results):
    # The area, then each layer's gate and how much of it is no padding, then
    # their gradients.
    assert results['one group'][1] == [1, 6, 8, 8, 6] * 4


def test_failed_iteration_leaves_the_model(results):
    assert results['interrupted'] == 'KeyboardInterrupt: by the user'
    assert results['depth'].startswith(
        "ValueError: ranks_per_image=2: the data samples have ['gt_"
    )


# ---------------------------------------------------------------------- crops


def alternate(batch):
    """The first crop of each image, then the second of each."""
    return pseudo_collate(batch[::2] + batch[1::2])


@pytest.mark.parametrize('collate', [pseudo_collate, alternate])
def test_crops_are_trained_as_one_image(tmp_path, collate):
    """To convolutions of 1 x 1 they are, side by side."""
    model = toy(1, size=(9, 8))
    train(
        tmp_path,
        model,
        RandomCrops(4, (9, 8)),
        batch_size=4,
        train_dataloader=dict(drop_last=True),
        collate=collate,
        train_cfg=dict(crops_per_image=2),
    )
    assert_left(model)
    crops = RandomCrops(4, (9, 8))
    images = []
    for index in range(4):
        pair = [crops[index] for _ in range(2)]
        labels = [each['data_samples'].gt_sem_seg.data for each in pair]
        images.append(
            dict(
                inputs=torch.cat([each['inputs'] for each in pair], -1),
                data_samples=SegDataSample(
                    gt_sem_seg=PixelData(data=torch.cat(labels, -1))
                ),
            )
        )
    whole = stepped(toy(1, size=(9, 16)), [[images[:2]], [images[2:]]])
    assert_same_steps(moved(model, toy(1)), whole, toy(1), 1e-10)


def test_without_either_it_is_the_loop_of_mmengine(tmp_path):
    data = pictures(4, (21, 8))
    ours, theirs = toy(), toy()
    train(tmp_path / 'ours', ours, data, batch_size=2)
    train(
        *(tmp_path / 'theirs', theirs, data),
        batch_size=2,
        by=dict(type='IterBasedTrainLoop', max_iters=2),
    )
    assert_same_steps(moved(ours, toy()), theirs, toy(), 0)


def test_interrupted_with_crops(tmp_path):
    model = toy(1, size=(9, 8))
    model.decode_head.loss_decode.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(
            *(tmp_path, model, RandomCrops(2, (9, 8))),
            batch_size=2,
            train_cfg=dict(crops_per_image=2),
        )
    assert_left(model)


# --------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    'given, loader, said',
    [
        (
            dict(crops_per_image=0),
            {},
            r'crops_per_image must .* 1 or more, got 0',
        ),
        (dict(ranks_per_image=2.0), {}, 'ranks_per_image must .* got 2.0'),
        (dict(halo=-1), {}, 'halo must be an int, 0 or more, got -1'),
        (dict(multiple=0), {}, 'multiple must be an int, 1 or more, got 0'),
        (
            dict(crops_per_image=2, ranks_per_image=3),
            {},
            'crops_per_image=2 and ranks_per_image=3: only one',
        ),
        (
            dict(crops_per_image=3),
            {},
            'batch_size=4 is not a multiple of train_cfg.crops_per_image=3',
        ),
        (
            dict(crops_per_image=2),
            dict(batch_sampler=dict(type='AspectRatioBatchSampler')),
            'batch_sampler=None, got .*AspectRatio',
        ),
        (dict(crops_per_image=2), {}, 'no img_path; add it to meta_keys'),
        (dict(ranks_per_image=2), {}, 'processes must be a multiple .* got 1'),
    ],
)
def test_wrong_arguments(tmp_path, given, loader, said):
    with pytest.raises(ValueError, match=said):
        train(
            *(tmp_path, toy(), pictures(4, (21, 8))),
            batch_size=4,
            train_dataloader=loader,
            train_cfg=given,
        )


def check(model, auto_scale_lr=None):
    """Make a loop for bands of a model; gives the error and the warnings."""
    warnings = []
    runner = SimpleNamespace(
        model=model,
        auto_scale_lr=auto_scale_lr,
        logger=SimpleNamespace(warning=warnings.append),
    )
    with pytest.raises(ValueError) as info:
        loops.IterBasedTrainLoop(runner, {}, max_iters=1, ranks_per_image=2)
    return str(info.value), warnings


def test_loader_that_is_made_has_its_own_batches(tmp_path):
    loader = torch.utils.data.DataLoader(pictures(2, (21, 8)))
    with pytest.raises(ValueError, match='as a config, got a DataLoader'):
        loops.IterBasedTrainLoop(None, loader, 1, crops_per_image=2)


def test_batch_norm_in_training_is_refused():
    model = resnet(**{'backbone.norm_eval': False})
    error, _ = check(model)
    assert 'backbone.stem.1 is a ' in error and 'SyncBN (on GPUs)' in error
    model = resnet(**{'decode_head.norm_cfg': dict(type='BN')})
    assert 'decode_head.convs.0.bn is a BatchNorm2d' in check(model)[0]


def test_norm_of_a_band_and_loss_that_is_no_mean_are_warned_of():
    model = resnet(
        **{
            'decode_head.norm_cfg': dict(type='GN', num_groups=2),
            'decode_head.loss_decode': [
                dict(type='CrossEntropyLoss'),
                dict(type='CrossEntropyLoss', class_weight=[1.0, 2.0, 3.0]),
                dict(type='DiceLoss'),
            ],
        }
    )
    warnings = check(model)[1]
    assert len(warnings) == 3
    assert 'decode_head.convs.0.gn (of 3) normalises' in warnings[0]
    assert 'CrossEntropyLoss of PolyNLHead is not a plain' in warnings[1]
    assert 'DiceLoss of PolyNLHead is not a plain' in warnings[2]
    assert check(resnet())[1] == []


def test_models_that_can_not_be_cut():
    lr = dict(enable=True, base_batch_size=4)
    assert 'auto_scale_lr would' in check(toy(), lr)[0]
    model = toy()
    model.data_preprocessor.batch_augments = print
    assert 'batch_augments are random' in check(model)[0]
    model = toy()
    del model.decode_head.loss_decode
    assert 'there is no such head' in check(model)[0]


def test_model_without_a_layer_fails_before_the_start():
    model = nn.Conv2d(1, 1, 1)
    with pytest.raises(ValueError, match='Conv2d has no Poly-NL layer'):
        loops.IterBasedTrainLoop(
            *(SimpleNamespace(model=model), dict(batch_size=2), 1),
            crops_per_image=2,
        )


if __name__ == '__main__':
    # Forked, as it takes seconds to import all this.
    torch.multiprocessing.start_processes(
        process, (Path(sys.argv[1]),), nprocs=WORLD, start_method='fork'
    )
