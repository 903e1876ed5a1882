"""Write past the end of 64 floats of GPU memory: compute-sanitizer must find it (gpu_check.py)."""

from __future__ import annotations

from types import SimpleNamespace

import torch

start = torch.zeros(64, device="cuda").data_ptr()
claim = {"shape": (4096,), "typestr": "<f4", "version": 3, "data": (start, False)}
torch.as_tensor(SimpleNamespace(__cuda_array_interface__=claim), device="cuda").add_(1)
torch.cuda.synchronize()
