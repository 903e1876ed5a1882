"""Measure time, memory and errors of our losses and all peers', side by side in one run.

docs/benchmarks.md explains it. The data pass through ``cases`` (what is measured) → ``runner`` (a
process for each case, the file of results) → ``one_case`` (right? how large? how fast?) →
``tables``, ``picture`` and ``publish``. Separate are ``accuracy`` (errors on difficult inputs),
``gpu_check`` (everything on a GPU machine), and the scripts on what kernels compile to.
"""
