"""Checks of any tensor, whichever argument it is, and which tensors have values to check."""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn

from ..sides import Head, Side, Teacher, TopK, rows_tensor

LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def sorted_rows(ids: Tensor) -> Tensor:
    """Return ids (..., K) sorted along the last dimension.

    numpy sorts short rows on a CPU 30 times as fast as torch.
    """
    if may_read_values(ids) and ids.device.type == "cpu":
        import numpy  # here, since logits need no numpy

        return torch.from_numpy(numpy.sort(ids.numpy(), -1))
    return ids.sort(-1).values


def may_read_values(tensor: Tensor) -> bool:
    """Return True if values exist, and are on the CPU or FUSED_KD_DEBUG=1 allows to synchronise.

    No values exist in a compiler's trace, in a fake tensor and on the meta device. Those of
    subclasses other than Parameter and Buffer are not read.
    """
    return (
        not torch.compiler.is_compiling()
        and type(tensor) in (Tensor, nn.Parameter, nn.Buffer)
        and tensor.device.type != "meta"
        and (tensor.device.type == "cpu" or os.environ.get("FUSED_KD_DEBUG") == "1")
    )


def check_dense(name: str, tensor: Tensor | None) -> None:
    """Check that an argument is a local, strided tensor.

    Raises:
        TypeError: It is not a tensor, or it is sparse, nested, quantised or a DTensor.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(tensor).__name__}")
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
        got = f"layout {tensor.layout}: pass its to_dense()"
        if tensor.is_nested:
            got = "a nested tensor: pad it"
        elif tensor.is_quantized:
            got = "a quantised tensor: pass its dequantize()"
        raise TypeError(f"{name} must be a dense, unquantised tensor; got {got}")
    if type(tensor) is not Tensor and hasattr(tensor, "device_mesh"):
        raise TypeError(
            f"{name} must be a local tensor; got a DTensor: call the loss inside the forward of "
            "the module that was sharded (docs/howto/distributed.md); full_tensor() of what is "
            "trained gives each shard a wrong gradient"
        )


def check_floating(name: str, tensor: Tensor | None) -> None:
    """Check that an argument is a dense, local tensor of one of LOGIT_DTYPES.

    Raises:
        TypeError: The type, layout or dtype is another, or it is a DTensor.
    """
    check_dense(name, tensor)
    assert tensor is not None
    if tensor.dtype not in LOGIT_DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64; got {tensor.dtype}")


def rows_name(name: str, side: Teacher) -> str:
    """Return the name, for messages, of the tensor that has the rows of a side."""
    if isinstance(side, TopK):
        return f"{name}.logprobs"
    return f"{name}.hidden" if isinstance(side, Head) else name


def check_on_device_of(name: str, tensor: Tensor, student: Side) -> None:
    """Raise ValueError if a tensor is not on the device of the student's rows."""
    other = rows_tensor(student)
    if tensor.device != other.device:  # first: the name is built only for a message
        check_device(name, tensor, rows_name("student", student), other)


def check_device(name: str, tensor: Tensor, like: str, other: Tensor) -> None:
    """Raise ValueError if a tensor is not on the device of another, which messages call `like`."""
    if tensor.device != other.device:
        raise ValueError(
            f"{name} must be on the device of {like}, {other.device}; got {tensor.device}"
        )


def position(index: list[int]) -> str:
    """Return an index as a message shows it: a number, or a tuple of them."""
    return str(index[0]) if len(index) == 1 else str(tuple(index))
