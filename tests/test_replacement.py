"""Poly-SA in the place of the hosts' attention, by path."""

import copy
import logging
import pickle

import pytest
import torch
import torch.nn.functional as F
from hosts import build
from mmengine.config import ConfigDict
from mmengine.runner.checkpoint import load_state_dict
from torch import nn
from torch.testing import assert_close

from polynl_mm import replace_attention
from polynl_mm.attention import PolySA

pytestmark = pytest.mark.usefixtures('quiet_and_quick')

SA = dict(type='polynl_mm.PolySA')
DEPTHS = dict(num_layers=[1, 1, 1, 1], num_heads=[1, 2, 2, 2])
SWIN = dict(
    type='SwinTransformer',
    embed_dims=8,
    depths=(2, 1, 1, 1),
    num_heads=(1, 2, 2, 2),
    window_size=4,
    drop_path_rate=0.0,
)
VIT = dict(
    type='VisionTransformer',
    embed_dims=8,
    num_layers=2,
    num_heads=2,
    img_size=64,
    patch_size=16,
)
# Host -> scope, config, where its attention is, projections there, keys that
# go, tokens that are none of the map.
HOSTS = {
    'Swin': ('mmdet', SWIN, 'stages.*.blocks.*.attn', 'w_msa.{}', 'w_msa.re'),
    'Swin of mmseg': (
        *('mmseg', SWIN, 'stages.*.blocks.*.attn', 'w_msa.{}', 'w_msa.re'),
    ),
    'Swin, windows': (
        *('mmdet', SWIN, 'stages.*.blocks.0.attn.w_msa', '{}', 'relative_'),
    ),
    'MiT': (
        'mmseg',
        dict(type='MixVisionTransformer', embed_dims=8, **DEPTHS),
        *('layers.*.1.*.attn', 'attn.{}', ('sr.', 'norm.')),
    ),
    'PVTv2': (
        'mmdet',
        dict(type='PyramidVisionTransformerV2', embed_dims=8, **DEPTHS),
        *('layers.*.1.*.attn', 'attn.{}', ('sr.', 'norm.')),
    ),
    'Twins': (
        'mmseg',
        dict(
            type='SVT',
            embed_dims=[8, 16, 16, 16],
            num_heads=[1, 2, 2, 2],
            depths=[2, 2, 2, 2],
            mlp_ratios=[2, 2, 2, 2],
            sr_ratios=[8, 4, 2, 1],
            windiow_sizes=[4, 4, 4, 4],
            norm_after_stage=[True] * 4,
        ),
        *('layers.*.*.attn', '{}', ('sr.', 'norm.')),
    ),
    'ViT': ('mmseg', VIT, 'layers.*.attn', 'attn.{}', ()),
    'BEiT': (
        'mmseg',
        dict(VIT, type='BEiT', qv_bias=True),
        *('layers.*.attn', '{}', 'relative_'),
    ),
    'MAE': (
        'mmseg',
        dict(VIT, type='MAE'),
        *('layers.*.attn', '{}', 'relative_'),
    ),
}
