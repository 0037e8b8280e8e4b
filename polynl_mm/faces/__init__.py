"""Faces with five landmarks, from the files of WIDER Face to its metric.

In the order in which data goes through them: ``landmarks``, ``files``,
``boxes``, ``dataset``, ``transforms``, ``head``, ``voting``, ``visualizer``,
``ap``, ``metric``. Each is imported from where it is: ``landmarks``,
``files`` and ``ap`` need numpy alone, ``metric`` mmengine, the others mmdet.
"""
