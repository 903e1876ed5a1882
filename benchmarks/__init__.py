"""Time, memory and accuracy of the losses, ours and all peers', side by side in one run.

``python -m benchmarks run|plot|compare|list`` is what users need; docs/benchmarks.md explains it.
The way of the data: ``__main__`` (options) → ``suites`` (cases, methods) → ``runner`` (a process
for each case) → ``one_case`` (right? how large? how fast?) → ``records`` (the file of results), and
from there to ``tables``, ``goals``, ``picture``, ``compare`` and ``publish``.

Besides: ``accuracy`` (errors by row, for docs/numerics.md), ``test_guard`` (regressions, by
ratios), ``gpu_check`` (everything on a GPU machine; the other ``gpu_*`` are
its parts), and what kernels compile to (``cuda_resources``, ``triton_resources``).
"""
