"""Semantic segmentation: what is bound to mmseg.

``head`` puts the layer into a decode head, ``windows`` gives those of an image
one context, ``labels`` looks at a data set before the start. Each is imported
from where it is.
"""
