"""The matrix products of a Head, summed in float32 from any operands.

Logits are float32 (float64 for float64 inputs), because logits rounded to 16 bits cost the gradient
of a distillation loss, a difference of near-equal distributions, 4 to 23 percent. Only the
gradients of hidden states, weight and bias are rounded, if their memory has 16 bits.
The classes differ in the routine that multiplies:

* :class:`CompiledProducts`: the package's own product on a CPU. It converts operands while it packs
  them, and its bits do not depend on the number of rows or threads.
* :class:`CudaProducts`: cuBLAS, with 16-bit operands and float32 results (``out_dtype``). Both
  operands must have 16 bits, so the row kernel writes the gradient of the logits in 16 bits,
  rounded once.
* :class:`TorchProducts`: everything else; 16-bit weights are widened tile by tile.

Shapes: hidden (C, H), weight (V, H), bias (V,), logits and their gradient (C, V). `compute` is the
dtype that hidden states and weights are rounded to before they are multiplied (autocast's, or their
own).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .. import extension
from ..options import MIB

#: Bytes of a tile of widened weights: in a CPU's cache, and large enough for a product to be fast.
TILE_BYTES = 4 * MIB


class Projection(NamedTuple):
    """The rows and the head of a model, whose logits are scale · (hidden · weightᵀ + bias)."""

    hidden: Tensor  # (..., H)
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    compute: torch.dtype  # of the operands
    scale: float = 1.0


class Products:
    """The products of a chunk; each subclass implements `_multiply`."""

    #: Bytes of a tile of weights that are converted, or copied, before they are multiplied.
    tile_bytes = TILE_BYTES

    def fixed_bytes(self) -> int:
        """Return the bytes of temporaries that do not depend on the number of rows."""
        return 2 * self.tile_bytes  # a tile in the autocast dtype, and in float32

    def sum_bytes(self, elements: int) -> int:
        """Return the bytes that a product with a 16-bit result of `elements` needs in addition."""
        return 0

    def logits(self, out: Tensor, hidden: Tensor, head: Projection) -> None:
        """Overwrite out (C, V) by scale · (hidden · weightᵀ + bias); `head.hidden` is not read."""
        hidden, scale = hidden.to(head.compute), head.scale
        for tile in self._tiles(head, out.dtype):
            weight = head.weight[tile].t()
            self._multiply(out[:, tile], hidden, weight, head.compute, scale=scale)
        if head.bias is not None:
            out.add_(head.bias, alpha=scale)

    def gradient_dtype(self, accum_dtype: torch.dtype, compute: torch.dtype) -> torch.dtype:
        """Return the dtype of the gradient of the logits, an operand of both products below.

        The row kernel writes the gradient in this dtype. The default is that of the logits,
        `accum_dtype`: the gradient is not rounded. `compute` is the dtype of the other operand.
        """
        return accum_dtype

    def kept_dtype(self, accum_dtype: torch.dtype, compute: torch.dtype) -> torch.dtype:
        """Return the dtype of that gradient where those of all chunks are kept for one product."""
        return self.gradient_dtype(accum_dtype, compute)

    def hidden_gradient(self, out: Tensor, gradient: Tensor, head: Projection) -> None:
        """Overwrite out (C, H) by gradient · weight, rounded to out's dtype."""
        accum_dtype = torch.promote_types(gradient.dtype, torch.float32)
        tiles = list(self._tiles(head, accum_dtype))
        total = out
        sums = len(tiles) > 1 and out.dtype != accum_dtype
        if sums or not self._writes(out.dtype, gradient.dtype, add=False):
            total = out.new_empty(out.shape, dtype=accum_dtype)
        for tile in tiles:
            add = tile.start > 0  # the first tile overwrites what is in the memory
            self._multiply(total, gradient[:, tile], head.weight[tile], head.compute, add=add)
        if total is not out:
            out.copy_(total)

    def weight_gradient(
        self, out: Tensor, gradient: Tensor, hidden: Tensor, compute: torch.dtype, add: bool
    ) -> None:
        """Overwrite out (V, H) by gradientᵀ · hidden, or `add` it; rounded to out's dtype."""
        if self._writes(out.dtype, gradient.dtype, add):
            self._multiply(out, gradient.t(), hidden, compute, add=add)
            return
        for tile in tiles(out, torch.float32, self.tile_bytes):
            part = gradient.new_empty(out[tile].shape, dtype=torch.float32)
            self._multiply(part, gradient[:, tile].t(), hidden, compute)
            out[tile] = part.add_(out[tile]) if add else part  # the sum rounded once
            del part  # before the next is allocated

    def bias_gradient(self, out: Tensor, gradient: Tensor, add: bool) -> None:
        """Overwrite out (V,) by the sum of gradient's rows, or `add` it; rounded to out's dtype."""
        part = self._sum_of_rows(gradient)
        out.copy_(out + part if add else part)

    def _sum_of_rows(self, gradient: Tensor) -> Tensor:
        return gradient.sum(0, dtype=torch.promote_types(gradient.dtype, torch.float32))

    def _tiles(self, head: Projection, accum_dtype: torch.dtype) -> Iterator[slice]:
        """Return the vocabulary as one slice, or as slices whose weights are converted in turn."""
        if self._takes(head, accum_dtype):
            return iter([slice(0, head.weight.shape[0])])
        return tiles(head.weight, accum_dtype, self.tile_bytes)

    def _takes(self, head: Projection, accum_dtype: torch.dtype) -> bool:
        """Return True if the weight is multiplied without a conversion."""
        return head.weight.dtype == head.compute == accum_dtype

    def _writes(self, out: torch.dtype, operand: torch.dtype, add: bool) -> bool:
        """Return True if a gradient of dtype `operand` is multiplied into, or added to, `out`."""
        return out == operand

    def _multiply(
        self,
        out: Tensor,
        a: Tensor,
        b: Tensor,
        compute: torch.dtype,
        add: bool = False,
        scale: float = 1.0,
    ) -> None:
        """Overwrite out by scale · a · b, or `add` that to it; b is first rounded to `compute`."""
        raise NotImplementedError


class TorchProducts(Products):
    """torch.addmm on operands converted to the dtype of the result."""

    def _multiply(
        self,
        out: Tensor,
        a: Tensor,
        b: Tensor,
        compute: torch.dtype,
        add: bool = False,
        scale: float = 1.0,
    ) -> None:
        dtype = out.dtype
        torch.addmm(out, a.to(dtype), b.to(compute).to(dtype), beta=int(add), alpha=scale, out=out)


class CompiledProducts(Products):
    """The product of csrc/cpu: converts while it packs, so nothing is cast beforehand."""

    def fixed_bytes(self) -> int:
        """Return the bytes of the packed operands of torch.get_num_threads() threads.

        Raises:
            RuntimeError: FUSED_KD_CPU is wrong, see :meth:`fused_kd.extension.Compiled.build_info`.
        """
        return self._of_threads("product_bytes_per_thread")

    def sum_bytes(self, elements: int) -> int:
        """Return the most bytes of sums that the threads hold before they round them."""
        return min(self._of_threads("product_sum_bytes_per_thread"), 4 * elements)

    def _of_threads(self, key: str) -> int:
        info = extension.cpu.build_info()
        assert info is not None
        per_thread = info[key]
        assert isinstance(per_thread, int)
        return per_thread * torch.get_num_threads()

    def logits(self, out: Tensor, hidden: Tensor, head: Projection) -> None:
        """Overwrite out as in :class:`Products`; the bias is added while a tile is in cache."""
        for tile in self._tiles(head, out.dtype):
            bias = None if head.bias is None else head.bias[tile].float().contiguous()
            weight = head.weight[tile].t()
            _product(out[:, tile], hidden, weight, bias, head.compute, round_a=True)
        if head.scale != 1.0:
            out.mul_(head.scale)

    def kept_dtype(self, accum_dtype: torch.dtype, compute: torch.dtype) -> torch.dtype:
        """Return bfloat16 if the product rounds the gradient to it anyway."""
        info = extension.cpu.build_info()
        assert info is not None
        pairs = info["product_multiplies_pairs"] and compute == torch.bfloat16
        return compute if pairs else accum_dtype

    def _takes(self, head: Projection, accum_dtype: torch.dtype) -> bool:
        return 1 in head.weight.stride()

    def _writes(self, out: torch.dtype, operand: torch.dtype, add: bool) -> bool:
        return out == torch.float32 or not add

    def _multiply(
        self,
        out: Tensor,
        a: Tensor,
        b: Tensor,
        compute: torch.dtype,
        add: bool = False,
        scale: float = 1.0,
    ) -> None:
        _product(out, a, b, None, compute, add=add)

    def _sum_of_rows(self, gradient: Tensor) -> Tensor:
        # torch's sum would first copy 16-bit rows to float32
        ones = gradient.new_ones((1, gradient.shape[0]), dtype=torch.float32)
        total = gradient.new_empty((1, gradient.shape[1]), dtype=torch.float32)
        _product(total, ones, gradient, None, torch.float32)
        return total[0]


class CudaProducts(Products):
    """cuBLAS with 16-bit operands and float32 results; float32 operands are not rounded."""

    tile_bytes = 16 * MIB  # large tiles: launches cost more than tiles that fit a cache save

    def gradient_dtype(self, accum_dtype: torch.dtype, compute: torch.dtype) -> torch.dtype:
        """Return `compute`: cuBLAS takes two operands of one dtype."""
        return compute

    def _takes(self, head: Projection, accum_dtype: torch.dtype) -> bool:
        return head.weight.dtype == head.compute

    def _writes(self, out: torch.dtype, operand: torch.dtype, add: bool) -> bool:
        return out in (torch.float32, operand)

    def _multiply(
        self,
        out: Tensor,
        a: Tensor,
        b: Tensor,
        compute: torch.dtype,
        add: bool = False,
        scale: float = 1.0,
    ) -> None:
        _mm(out, a, b.to(compute), add, scale)


def _product(
    out: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    compute: torch.dtype,
    *,
    round_a: bool = False,
    add: bool = False,
) -> None:
    a, b = (x if 1 in x.stride() else x.contiguous() for x in (a, b))
    torch.ops.fused_kd.product_(out, a, b, bias, compute, round_a, add)


def _mm(out: Tensor, a: Tensor, b: Tensor, add: bool, scale: float) -> None:
    """Overwrite out by scale · a · b, or `add` that; out may have a wider dtype than a and b."""
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, beta=int(add), alpha=scale, out=out)
    elif add or scale != 1.0:  # to float32 since torch 2.10, the oldest that is supported
        torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, beta=int(add), alpha=scale, out=out)
    else:
        torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)


def products_for(backend: str, device: torch.device, dtype: torch.dtype) -> Products:
    """Return the matrix-product routines for a backend, device and result dtype.

    Torch's are used by the reference backend, for results that are not float32, and if the package
    has none for the device. `backend` may be "auto".
    """
    if backend == "reference" or dtype != torch.float32:
        return TorchProducts()
    if device.type == "cpu" and extension.cpu.why_not() is None:
        return CompiledProducts()
    return CudaProducts() if device.type == "cuda" else TorchProducts()


def tiles(weight: Tensor, accum_dtype: torch.dtype, size: int) -> Iterator[slice]:
    """Yield slices of the vocabulary whose weights take about `size` bytes in accum_dtype.

    They have at least 16 rows, except the last, even if these take more.
    """
    vocabulary, hidden = weight.shape
    height = max(16, size // (max(hidden, 1) * accum_dtype.itemsize))
    for begin in range(0, vocabulary, height):
        yield slice(begin, min(begin + height, vocabulary))
