"""What the benchmarks of tools and projects are made of.

``timing`` measures calls, whatever they call, ``card`` does on a GPU.
``layer`` has the contenders for one Poly-NL layer, ``attention`` those for one
Poly-SA layer, ``goals`` what a Poly-NL layer should cost, ``core`` the
operation as another commit of this repository has it, and ``model`` has whole
models of mmdet and mmseg. ``gpu`` has what is measured on a GPU where there is
torch alone: one layer, its ``rivals``, and a ``resnet``. ``calibrate`` fits
the rates by which a form is chosen.
"""
