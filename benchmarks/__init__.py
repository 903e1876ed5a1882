"""Time, memory and accuracy of the losses, measured side by side in one run.

``python -m benchmarks.cpu_logits`` and ``python -m benchmarks.cpu_linear`` time on a
CPU; ``python -m benchmarks.accuracy`` compares with float64;
``pytest benchmarks --benchmark-only`` guards against regressions by ratios (``benchmarks.guard``).
"""
