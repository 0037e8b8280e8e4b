"""Recognition on mmengine and mmcv alone, on the backbones of either host.

In the order in which data goes through them: ``files``, ``dataset``,
``transforms``, ``model``, ``accuracy``, ``inferencer``. Each is imported from
where it is: ``files`` needs numpy and scipy alone.
"""
