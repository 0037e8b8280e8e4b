"""Lets every test import the helpers and what this checkout holds."""

import logging
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / 'projects')]
# Behind all others: its ``test`` would hide Python's.
sys.path.append(str(HERE.parent / 'tools'))

from polynl_mm.shipped import know_forks  # noqa: E402

# Many a test reads a config without a tool.
know_forks()


@pytest.fixture
def quiet_and_quick():
    """No log (a paragraph per parameter), no second thread (too small)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.disable()
    torch.manual_seed(0)
    yield
    logging.disable(logging.NOTSET)
    torch.set_num_threads(threads)


@pytest.fixture
def launches_cost_nothing(monkeypatch):
    """Forms are chosen by their arithmetic, also where a model is tiny."""
    from polynl_mm.ops import choice

    monkeypatch.setattr(choice, '_CPU', choice._CPU._replace(launch=0))
