"""Detection of any class on mmdet's detectors: large pictures, in tiles."""
