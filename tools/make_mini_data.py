#!/usr/bin/env python
"""Make a small data set of real pixels: see ``projects/mini_data``."""

import sys
from pathlib import Path

# In a wheel the project lies in polynl_mm/projects, beside this folder.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / 'projects'))

from mini_data.build import main

if __name__ == '__main__':
    main()
