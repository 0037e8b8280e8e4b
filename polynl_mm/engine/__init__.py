"""From a command line to a running job; this file imports nothing.

- ``cli``: the command line, and how a tool ends.
- ``hosts``: what each host means by the options of the tools.
- ``checks``: what is looked at before a start.
- ``start``: from a config to a runner.
- ``runner``: several processes on CPUs.
- ``loops``: training where the parts of an image share their gates.
- ``hooks``: what a training with Poly-NL layers is watched for.
- ``export``: whole models as ONNX files, checked by onnxruntime; it needs
  onnx, and so does ``nms``: NMS in its operators.
- ``candidates``: what of a detector is exported.
- ``culprit``: which module it is that can not be.
- ``safe_load``: lets torch's safe loader read mmengine's checkpoints.
- ``training_state``: what must hold of one for a training to go on from it.
"""
