"""Child registries of scope ``polynl_mm``.

mmengine imports this module, and then the ``locations`` below, the first time
a config names a ``polynl_mm.*`` type, whatever the config's own default scope
is. No ``custom_imports`` is needed.
"""

from importlib.util import find_spec

from mmengine import registry as root
from mmengine.registry import Registry

from . import stack
from .attention import PolySA
from .layers import PolyNL1d, PolyNL2d, PolyNL3d

# Every location is imported at the first look-up in any of the registries, so
# a module bound to a host may be listed only where that host is installed.
_HOST_OF = {
    'polynl_mm.insertion': 'mmengine',
    'polynl_mm.replacement': 'mmengine',
    # No type is in these: any look-up has layers know the sizes of pictures,
    # and refuses those that a host would lose.
    'polynl_mm.samples': 'mmengine',
    'polynl_mm.plugins': 'mmengine',
    'polynl_mm.loading': 'mmcv',
    'polynl_mm.engine.runner': 'mmengine',
    # Nor in it: any look-up lets torch read mmengine's checkpoints.
    'polynl_mm.engine.safe_load': 'mmengine',
    'polynl_mm.engine.checkpoints': 'mmengine',
    'polynl_mm.engine.resuming': 'mmengine',
    'polynl_mm.engine.hooks': 'mmengine',
    'polynl_mm.engine.influence': 'mmcv',
    'polynl_mm.engine.loops': 'mmengine',
    'polynl_mm.peers': 'mmdet',
    'polynl_mm.classification.dataset': 'mmengine',
    'polynl_mm.classification.transforms': 'mmcv',
    'polynl_mm.classification.model': 'mmengine',
    'polynl_mm.classification.accuracy': 'mmengine',
    'polynl_mm.detection.tiles': 'mmdet',
    'polynl_mm.faces.dataset': 'mmdet',
    'polynl_mm.faces.transforms': 'mmdet',
    'polynl_mm.faces.head': 'mmdet',
    'polynl_mm.faces.voting': 'mmdet',
    'polynl_mm.faces.visualizer': 'mmdet',
    'polynl_mm.faces.metric': 'mmengine',
    'polynl_mm.segmentation.head': 'mmseg',
    # Nor in it: any look-up lets mmseg's windows share a context.
    'polynl_mm.segmentation.windows': 'mmseg',
}
_LOCATIONS = [name for name, host in _HOST_OF.items() if find_spec(host)]


class _Child(Registry):
    # Where a host fails at its import, for want of packages that fit.
    def import_from_location(self) -> None:
        with stack.explained():
            super().import_from_location()


def _child(parent: Registry) -> Registry:
    return _Child(
        parent.name, parent=parent, scope='polynl_mm', locations=_LOCATIONS
    )


MODELS = _child(root.MODELS)
TASK_UTILS = _child(root.TASK_UTILS)
DATASETS = _child(root.DATASETS)
TRANSFORMS = _child(root.TRANSFORMS)
METRICS = _child(root.METRICS)
VISUALIZERS = _child(root.VISUALIZERS)
HOOKS = _child(root.HOOKS)
LOOPS = _child(root.LOOPS)
RUNNERS = _child(root.RUNNERS)
# No type of ours is in these. As default_scope of a config, a scope is warned
# of wherever it has no child.
for _parent in (
    *(root.DATA_SAMPLERS, root.MODEL_WRAPPERS, root.WEIGHT_INITIALIZERS),
    *(root.OPTIMIZERS, root.OPTIM_WRAPPERS, root.OPTIM_WRAPPER_CONSTRUCTORS),
    *(root.PARAM_SCHEDULERS, root.EVALUATOR, root.VISBACKENDS),
    *(root.LOG_PROCESSORS, root.INFERENCERS, root.FUNCTIONS),
):
    _child(_parent)

# The layers need only torch, and so can not do it themselves.
for _layer in (PolyNL1d, PolyNL2d, PolyNL3d, PolySA):
    MODELS.register_module(module=_layer)
