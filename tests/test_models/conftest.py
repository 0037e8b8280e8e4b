"""Build the small detectors."""

import logging
from copy import deepcopy
from importlib.util import find_spec

import pytest
import torch

collect_ignore = []
if find_spec('mmdet') is None:
    collect_ignore += ['test_retinaface.py', 'test_tta.py']
    collect_ignore += ['test_visualizer.py']
if find_spec('mmseg') is None:
    collect_ignore += ['test_seg_head.py']


@pytest.fixture(autouse=True)
def quiet_and_quick():
    """No log (a paragraph per parameter), no second thread (too small)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.disable()
    yield
    logging.disable(logging.NOTSET)
    torch.set_num_threads(threads)


@pytest.fixture
def config():
    """Give a copy of a model's config by name, with changes to its head."""
    from detectors import DETECTORS
    from mmengine.config import ConfigDict

    def get(name, train_cfg=None, test_cfg=None, **head):
        cfg = ConfigDict(deepcopy(DETECTORS[name]))
        cfg.bbox_head.update(head)
        cfg.train_cfg.update(train_cfg or {})
        cfg.test_cfg.update(test_cfg or {})
        return cfg

    return get


@pytest.fixture
def build(config):
    """Build a model by name, with changes to its head; start from one seed."""
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules

    def get(name, **changes):
        register_all_modules()
        torch.manual_seed(0)
        model = MODELS.build(config(name, **changes))
        model.init_weights()
        return model

    return get
