"""The classifier against its formulas, on any backbone."""

import math

import pytest
import torch

pytest.importorskip('mmcv')

from mmengine.registry import MODELS  # noqa: E402
from mmengine.structures import BaseDataElement  # noqa: E402
from torch import nn  # noqa: E402


class Doubled(nn.Module):
    """A backbone that is easy to compute."""

    def forward(self, x):
        return x * 0, 2 * x


def build(**kwargs):
    torch.manual_seed(0)
    cfg = dict(type='polynl_mm.Classifier', backbone=dict(type=Doubled))
    return MODELS.build(dict(cfg, in_channels=3, num_classes=4, **kwargs))


def batch(size=5, channels=3):
    torch.manual_seed(1)
    samples = [BaseDataElement(gt_label=i % 4) for i in range(size)]
    return torch.randn(size, channels, 6, 4), samples


def logits(model, x):
    """K scores of each picture, by loops."""
    w, b = model.fc.weight, model.fc.bias
    means = [[2 * channel.mean() for channel in picture] for picture in x]
    return [
        [sum(w[k, c] * m[c] for c in range(3)) + b[k] for k in range(4)]
        for m in means
    ]


def cross_entropy(scores, target):
    total = sum(math.exp(s) for s in scores)
    return -sum(t * math.log(math.exp(s) / total)
                for s, t in zip(scores, target))  # fmt: skip


def test_scores_and_predictions():
    model = build()
    nn.init.normal_(model.fc.bias)
    x, samples = batch()
    scores = model(x)
    torch.testing.assert_close(
        scores, torch.tensor([[s.item() for s in r] for r in logits(model, x)])
    )
    for sample, row in zip(model(x, samples, mode='predict'), scores):
        e = row.exp()
        torch.testing.assert_close(sample.pred_scores, e / e.sum())
        # Saved, it takes no more than that.
        assert sample.pred_scores.untyped_storage().nbytes() == 4 * len(e)
    assert [s.gt_label for s in samples] == [0, 1, 2, 3, 0]
    assert len(model(x, mode='predict')) == 5
    with pytest.raises(ValueError, match="mode must be 'tensor', .* 'fit'"):
        model(x, mode='fit')


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_loss_by_hand(smoothing):
    """1 - s of the target is the truth, s is shared out to all 4."""
    model = build(label_smoothing=smoothing)
    nn.init.normal_(model.fc.weight)
    x, samples = batch()
    expected = 0
    for row, sample in zip(logits(model, x), samples):
        target = [smoothing / 4] * 4
        target[sample.gt_label] += 1 - smoothing
        expected += cross_entropy(row, target) / 5
    loss = model(x, samples, mode='loss')['loss']
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    loss.backward()
    assert model.fc.weight.grad.any()


def test_mixup_by_hand(monkeypatch):
    """Pictures and targets with the same share and the same partners."""
    model = build(mixup=0.2)
    nn.init.normal_(model.fc.weight)
    x, samples = batch()
    order, share = [1, 2, 3, 4, 0], 0.3
    beta = torch.distributions.Beta
    asked = []

    def sample(self):
        asked.append((float(self.concentration1), float(self.concentration0)))
        return torch.tensor(share)

    monkeypatch.setattr(beta, 'sample', sample)
    monkeypatch.setattr(
        torch, 'randperm', lambda n, device: torch.tensor(order)
    )
    mixed = torch.stack([0.3 * x[i] + 0.7 * x[order[i]] for i in range(5)])
    expected = 0
    for i, row in enumerate(logits(model, mixed)):
        target = [0.0] * 4
        target[samples[i].gt_label] += 0.3
        target[samples[order[i]].gt_label] += 0.7
        expected += cross_entropy(row, target) / 5
    loss = model(x, samples, mode='loss')['loss']
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert asked == [pytest.approx((0.2, 0.2))]
    # Not in a test.
    torch.testing.assert_close(
        model(x, mode='predict')[0].pred_scores, model(x)[0].softmax(0)
    )


@pytest.mark.parametrize(
    'wrong, message',
    [
        (dict(label_smoothing=1), 'label_smoothing must be from 0 to below 1'),
        (dict(mixup=-0.2), 'mixup must be 0 or above, got -0.2'),
    ],
)
def test_arguments_out_of_range(wrong, message):
    with pytest.raises(ValueError, match=message):
        build(**wrong)


def test_a_map_of_other_channels():
    with pytest.raises(ValueError) as caught:
        build()(batch(channels=5)[0])
    assert str(caught.value) == (
        'in_channels=3 of the classifier, but the last output of Doubled has '
        'shape (5, 5, 6, 4), expected (B, 3, H, W)'
    )


def test_pictures_of_a_batch_have_one_size():
    preprocess = MODELS.build(
        dict(type='polynl_mm.ClsDataPreprocessor', mean=[2.0], std=[4.0])
    )
    images = [torch.full((3, 4, 4), 6, dtype=torch.uint8)] * 2
    found = preprocess(dict(inputs=images))
    assert torch.equal(found['inputs'], torch.ones(2, 3, 4, 4))
    samples = [BaseDataElement(metainfo=dict(img_path=n)) for n in 'ab']
    images = [images[0], images[0][:, :, :3]]
    with pytest.raises(ValueError) as caught:
        preprocess(dict(inputs=images, data_samples=samples))
    assert str(caught.value).startswith(
        'b has shape (3, 4, 3) after the pipeline, the first of its batch '
        '(3, 4, 4): expected one size'
    )


@pytest.mark.parametrize('host', ['mmdet', 'mmseg'])
@pytest.mark.parametrize('block', ['PolyNL2d', 'SELayer'])
def test_backbones_of_both_hosts(host, block):
    """As a plug-in and inserted, and all of it learns."""
    pytest.importorskip(host)
    if block == 'SELayer':
        pytest.importorskip('mmdet')
    layer = dict(type=f'polynl_mm.{block}')
    plugin = dict(
        cfg=layer, stages=(False, False, True, False), position='after_conv3'
    )
    backbone = dict(
        type='polynl_mm.Insert',
        into=f'{host}.ResNet',
        depth=50,
        base_channels=4,
        stem_channels=4,
        out_indices=(3,),
        norm_eval=False,
        zero_init_residual=False,
        plugins=[plugin],
        blocks=[dict(after='layer2', cfg=layer)],
    )
    model = MODELS.build(
        dict(
            type='polynl_mm.Classifier',
            backbone=backbone,
            in_channels=128,
            num_classes=3,
        )
    )
    model.init_weights()
    blocks = {
        name: part
        for name, part in model.named_modules()
        if type(part).__name__ == block
    }
    name = dict(PolyNL2d='poly_nl', SELayer='se_layer')[block]
    assert set(blocks) == {
        f'backbone.layer2.3.{name}',
        *(f'backbone.layer3.{i}.{name}' for i in range(6)),
    }
    samples = [BaseDataElement(gt_label=i) for i in range(2)]
    model(torch.randn(2, 3, 32, 32), samples, mode='loss')['loss'].backward()
    for part in blocks.values():
        first = part.beta if block == 'PolyNL2d' else part.conv2.conv.weight
        assert first.grad.any()


def test_squeeze_and_excitation_is_that_of_mmdet():
    layers = pytest.importorskip('mmdet.models.layers')
    cfg = dict(type='polynl_mm.SELayer', in_channels=16, ratio=4)
    ours, theirs = MODELS.build(cfg), layers.SELayer(16, ratio=4)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 16, 3, 5)
    assert torch.equal(ours(x), theirs(x))
    assert ours.conv1.conv.out_channels == 4
