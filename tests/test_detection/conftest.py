"""Without mmdet there is nothing to test here."""

from importlib.util import find_spec

collect_ignore = [] if find_spec('mmdet') else ['test_tiles.py']
