"""Lets every test import ``oracles`` and what this checkout holds."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / 'projects')]
# Behind all others: its ``test`` would hide Python's.
sys.path.append(str(HERE.parent / 'tools'))
