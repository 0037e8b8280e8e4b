#!/usr/bin/env python
"""The command of ``benchmarks.model``."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
if (HERE.parent / 'polynl_mm').is_dir():
    # A checkout, installed or not; in a wheel the package lies around here.
    sys.path.insert(0, str(HERE.parent))
# Where this file is run as a script, it is there already.
sys.path.append(str(HERE))

from benchmarks.model import main

from polynl_mm.engine import launch

if __name__ == '__main__':
    launch.run(main)
