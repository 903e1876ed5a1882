"""axolotl's columns of a prepared dataset or batch (``axolotl.integrations.kd``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...sides import TopK
from .. import servers


def from_axolotl(sample: Mapping[str, Any], temperature: float, shift: bool = True) -> TopK:
    """Return the teacher of a sample (n, K) or batch (B, n, K), ids int64 and values float32.

    axolotl has renormalised the values on the support, after it changed their temperature.

    Args:
        sample: "target_token_ids", "target_logprobs" and "target_mask", as lists or tensors. Where
            the mask is 0, for prompts and padding, there is no entry.
        temperature: ``kd_temperature`` of the configuration.
        shift: entry i of a dataset that ``axolotl.integrations.kd.chat_template`` has prepared is
            the distribution of token i, which belongs to row i - 1: all move by one, and the last
            row gets no entry. False: for columns that are aligned with the logits, as
            ``OnlineTeacherCollator`` makes them from vLLM.
    """
    columns = (
        torch.as_tensor(sample[f"target_{name}"]) for name in ("token_ids", "logprobs", "mask")
    )
    return servers.from_axolotl(*columns, temperature=temperature, is_late=shift)
