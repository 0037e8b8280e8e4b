"""Start-up on any machine and safe checkpoint loading."""

from . import checkpoint
from .runner import GlooRunner

__all__ = ['GlooRunner', 'checkpoint']
