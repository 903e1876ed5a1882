"""Time, memory and errors of the losses, ours and all peers', side by side in one run.

docs/benchmarks.md explains it. The way of the data: ``cases`` (what is measured) → ``runner`` (a
process for each case, the file of results) → ``one_case`` (right? how large? how fast?) →
``tables``, ``picture`` and ``publish``. Besides: ``accuracy`` (errors on difficult inputs),
``gpu_check`` (everything on a GPU machine), and what kernels compile to.
"""
