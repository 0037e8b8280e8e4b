"""What the benchmarks of tools and projects are made of.

``timing`` measures calls, whatever they call. ``layer`` has the contenders
for one Poly-NL layer, ``goals`` what such a layer should cost, ``core`` the
operation as another commit of this repository has it, and ``model`` has whole
models of mmdet and mmseg.
"""
