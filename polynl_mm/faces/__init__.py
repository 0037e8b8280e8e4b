"""Faces with five landmarks: from the files of WIDER Face to its metric.

The modules stand in the order in which data goes through them: ``dataset``,
``transforms``, ``head``, ``voting``, ``visualizer``, ``ap``, ``metric``. Each
is imported from where it is, as not all of them need a host.
"""
