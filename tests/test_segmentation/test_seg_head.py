"""PolyNLHead against its parts put together by hand, in mmseg's models."""

import pytest

pytest.importorskip('mmseg')

import torch
from mmengine.config import ConfigDict
from mmengine.registry import DefaultScope
from mmengine.structures import PixelData
from mmseg.models.decode_heads import FCNHead, GCHead, NLHead
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from oracles import poly_nl_loop
from torch import nn
from torch.nn.functional import batch_norm, conv2d, relu
from torch.testing import assert_close

from polynl_mm.layers import PolyNL2d
from polynl_mm.segmentation.head import PolyNLHead

pytestmark = pytest.mark.usefixtures('quiet_and_quick')

HEAD = dict(
    in_channels=5,
    channels=3,
    num_classes=4,
    in_index=1,
    norm_cfg=dict(type='BN'),
    align_corners=False,
    dropout_ratio=0,
)
# Of a size and a number of positions that are no other's.
FEATURES = [(2, 11, 9, 13), (2, 5, 7, 6)]


@pytest.fixture(autouse=True)
def scope():
    with DefaultScope.overwrite_default_scope('mmseg'):
        yield


def build(kind='polynl_mm.PolyNLHead', **kwargs):
    """A head in float64, as its model would initialise it."""
    torch.manual_seed(0)
    head = MODELS.build(dict(HEAD, type=kind, **kwargs))
    head.init_weights()
    return head.double()


def features():
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in FEATURES
    ]


def conv_bn_relu(module, x, training):
    """Convolution with 'same' padding, batch norm and ReLU, by hand."""
    bn = module.bn
    statistics = (bn.running_mean.clone(), bn.running_var.clone())
    y = conv2d(x, module.conv.weight, padding=module.conv.kernel_size[0] // 2)
    return relu(
        batch_norm(y, *statistics, bn.weight, bn.bias, training=training)
    )


def by_hand(head, inputs, num_convs=2, concat_input=True):
    """What the head is to compute, from its parameters alone."""
    x = inputs[head.in_index]
    y = conv_bn_relu(head.convs[0], x, head.training)
    layer = head.poly_nl
    weights = [w.weight.flatten(1) for w in (layer.w1, layer.w2, layer.w3)]
    y = poly_nl_loop(y, *weights, layer.alpha, layer.beta)
    for module in list(head.convs)[1:num_convs]:
        y = conv_bn_relu(module, y, head.training)
    if concat_input:
        y = conv_bn_relu(head.conv_cat, torch.cat([x, y], 1), head.training)
    return conv2d(y, head.conv_seg.weight, head.conv_seg.bias)


@pytest.mark.parametrize('form', ['direct', 'gram'])
@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize(
    'shape',
    [
        {},
        dict(num_convs=1, concat_input=False),
        dict(num_convs=3, concat_input=True),
    ],
    ids=str,
)
def test_values_and_gradients(shape, training, form):
    head = build(alpha_init=0.7, beta_init=0.9, form=form, **shape)
    head.train(training)
    inputs = features()
    inputs[1].requires_grad_()
    got, expected = head(inputs), by_hand(head, inputs, **shape)
    assert got.shape == (2, 4, 7, 6)
    assert_close(got, expected)
    # What no gradient may be taken of, and what none may be nil of.
    names, parameters = zip(*head.named_parameters())
    assert {'poly_nl.alpha', 'poly_nl.beta', 'convs.0.conv.weight'} < {*names}
    weight = torch.randn_like(got)
    for name, a, b in zip(
        (*names, 'input'),
        *(
            torch.autograd.grad((y * weight).sum(), (*parameters, inputs[1]))
            for y in (got, expected)
        ),
    ):
        assert_close(a, b, msg=lambda text, name=name: f'{name}: {text}')
        assert a.abs().max() > 1e-9, name


def test_the_layer_makes_a_difference():
    head = build(beta_init=0.9).eval()
    with_layer = head(features())
    nn.init.zeros_(head.poly_nl.beta)
    assert (head(features()) - with_layer).abs().max() > 1e-4


def test_a_position_far_away_matters():
    """Beyond the reach of three 3x3 convolutions, and only by the layer."""
    head = build(beta_init=0.9).eval()
    inputs = features()
    inputs[1].requires_grad_()
    for beta, reached in ((0.9, True), (0.0, False)):
        nn.init.constant_(head.poly_nl.beta, beta)
        corner = head(inputs)[0, :, 0, 0].sum()
        (grad,) = torch.autograd.grad(corner, inputs[1])
        assert (grad[0, :, 6, 5].abs().max() > 1e-9) == reached
        assert (grad[1] == 0).all()


def test_as_the_rivals_are_built():
    """The rest of the parameters, names included, is that of each rival."""

    def rest(head, block):
        return {
            name: p.shape
            for name, p in head.named_parameters()
            if not name.startswith(block)
        }

    ours = rest(build(), 'poly_nl.')
    assert ours == rest(build('NLHead'), 'nl_block.')
    assert ours == rest(build('GCHead'), 'gc_block.')
    assert ours == rest(build('FCNHead'), '-')
    for rival in (NLHead, GCHead):
        assert issubclass(rival, FCNHead)
    assert PolyNLHead.__mro__[1] is FCNHead


def test_at_the_start_it_is_the_fcn_head():
    fcn, head = build('FCNHead').eval(), build().eval()
    missing, unexpected = head.load_state_dict(fcn.state_dict(), strict=False)
    assert not unexpected
    assert {name.split('.')[0] for name in missing} == {'poly_nl'}
    assert_close(head(features()), fcn(features()))


def test_arguments_of_the_layer():
    head = build(
        alpha_init=0.5,
        beta_init=0.25,
        bias=True,
        branch_norm_cfg=dict(type='GN', num_groups=3),
        form='gram',
    )
    layer = head.poly_nl
    assert type(layer) is PolyNL2d and layer.in_channels == 3
    assert (layer.alpha.item(), layer.beta.item()) == (0.5, 0.25)
    assert layer.w1.bias is not None and layer.form == 'gram'
    assert type(layer.norm) is nn.GroupNorm
    assert type(head.convs[0].norm) is nn.BatchNorm2d
    layer = build(beta_init=1.0, zero_init_w3=True).poly_nl
    assert not layer.w3.weight.any() and layer.w2.weight.all()
    assert layer.w1.bias is None and layer.norm is None


@pytest.mark.parametrize(
    'kwargs, said',
    [
        (dict(num_convs=0), 'num_convs=0'),
        (dict(form='fast'), "form must be one of .* got 'fast'"),
        (dict(zero_init_w3=True), 'can never learn'),
    ],
)
def test_bad_arguments(kwargs, said):
    with pytest.raises(ValueError, match=said):
        build(**kwargs)


def segmentor(**head):
    backbone = dict(
        type='ResNetV1c',
        depth=50,
        base_channels=4,
        stem_channels=4,
        dilations=(1, 1, 2, 4),
        strides=(1, 2, 1, 1),
        contract_dilation=True,
        norm_cfg=dict(type='BN'),
    )
    head = dict(HEAD, type='polynl_mm.PolyNLHead', **head)
    head.update(in_channels=128, in_index=3, channels=8)
    return ConfigDict(
        type='EncoderDecoder',
        data_preprocessor=dict(type='SegDataPreProcessor', size=(64, 64)),
        backbone=backbone,
        decode_head=head,
        auxiliary_head=dict(
            head, in_channels=64, in_index=2, num_convs=1, concat_input=False
        ),
        test_cfg=dict(mode='whole'),
    )


def batch(size=(64, 64)):
    generator = torch.Generator().manual_seed(2)
    samples = [
        SegDataSample(
            metainfo=dict(img_shape=size, ori_shape=size),
            gt_sem_seg=PixelData(
                data=torch.randint(0, 4, (1, *size), generator=generator)
            ),
        )
        for _ in range(2)
    ]
    return torch.randn(2, 3, *size, generator=generator), samples


def test_trains_in_a_model_also_as_auxiliary_head():
    torch.manual_seed(0)
    model = MODELS.build(segmentor(beta_init=0.5))
    model.init_weights()
    inputs, samples = batch()
    losses = model.train()(inputs, samples, mode='loss')
    loss, _ = model.parse_losses(losses)
    assert {'decode.loss_ce', 'aux.loss_ce'} < losses.keys()
    loss.backward()
    blocks = ('decode_head.poly_nl.', 'auxiliary_head.poly_nl.')
    grads = {
        name: p.grad
        for name, p in model.named_parameters()
        if name.startswith(blocks)
    }
    assert len(grads) == 10
    for name, grad in grads.items():
        assert grad.isfinite().all() and grad.abs().max() > 0, name


def test_whole_and_sliding_window_differ_by_the_mean():
    """In windows the mean is over the window, as in the training crops."""
    torch.manual_seed(0)
    model = MODELS.build(segmentor(beta_init=0.5)).eval()
    inputs, samples = batch((64, 96))
    images = [inputs[0]]

    def logits(**test_cfg):
        model.test_cfg = ConfigDict(test_cfg)
        data = dict(inputs=images, data_samples=samples[:1])
        (result,) = model.test_step(data)
        return result.seg_logits.data

    whole = logits(mode='whole')
    assert whole.shape == (4, 64, 96)
    one_window = logits(mode='slide', crop_size=(64, 96), stride=(40, 40))
    assert_close(one_window, whole)
    windows = logits(mode='slide', crop_size=(64, 64), stride=(32, 32))
    assert (windows - whole).abs().max() > 1e-4
