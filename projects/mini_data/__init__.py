"""Small data sets of real pixels in the layouts of real data sets."""
