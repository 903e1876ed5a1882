"""Time, memory and accuracy of the losses, ours and all peers', side by side in one run.

``python -m benchmarks run|plot|compare|list|publish``; docs/benchmarks.md explains it. The way of
the data: ``cases`` (what is measured) → ``runner`` (a process for each case, the file of results)
→ ``one_case`` (right? how large? how fast?) → ``tables`` and ``picture``. Besides: ``test_guard``
(regressions, by ratios), ``gpu_check`` (everything on a GPU machine), and what kernels compile to.
"""
