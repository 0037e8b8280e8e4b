"""Parts of models, each module bound to its host.

``retinaface``, ``tta`` and ``visualizer`` need mmdet, ``seg_head`` mmseg: they
are imported from where they are, so that either host is enough.
"""
