#!/usr/bin/env python
"""The command of ``benchmarks.layer``."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
if (HERE.parent / 'polynl_mm').is_dir():
    # A checkout, installed or not; in a wheel the package lies around here.
    sys.path.insert(0, str(HERE.parent))
# Where this file is run as a script, it is there already.
sys.path.append(str(HERE))

from benchmarks.layer import main

if __name__ == '__main__':
    main()
