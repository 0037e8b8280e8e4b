"""Start-up on any machine and safe checkpoint loading."""

from . import safe_load
from .runner import GlooRunner

__all__ = ['GlooRunner', 'safe_load']
