"""The matrix products of the linear level, float32 results from any operands.

Logits that a product rounds to 16 bits cost the gradient of a distillation loss 4 to 23 percent (a
difference of near-equal distributions): every product here writes float32 (float64 for double).
What differs is who multiplies:

* :class:`CompiledProducts`: the package's own product on a CPU. It converts operands while it packs
  them, and its bits do not depend on the number of rows or threads.
* :class:`CudaProducts`: 16-bit operands, float32 results by ``out_dtype``. Both operands must have
  16 bits, the gradient of the logits too: the row kernel writes it so, rounded once.
* :class:`TorchProducts`: everything else; 16-bit weights are widened tile by tile.

Shapes: hidden (C, H), weight (V, H), bias (V,), logits and their gradient (C, V). `compute` is the
dtype that hidden states and weights are rounded to before they are multiplied (autocast); where
they have it already, nothing is rounded.
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


class Side(NamedTuple):
    """One model's rows and head."""

    hidden: Tensor  # (..., H)
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    compute: torch.dtype


class Products:
    """What the chunk driver needs, by one product that each of the classes below brings."""

    #: Bytes of a tile of weights that are converted, or copied, before they are multiplied.
    tile_bytes = TILE_BYTES

    def fixed_bytes(self) -> int:
        """Memory of the products themselves, whatever the number of rows."""
        return 2 * self.tile_bytes  # in the autocast dtype, and widened

    def logits(self, out: Tensor, hidden: Tensor, side: Side) -> None:
        """out = hidden · weightᵀ + bias."""
        hidden = hidden.to(side.compute)
        for tile in self._tiles(side, out.dtype):
            self._multiply(out[:, tile], hidden, side.weight[tile].t(), side.compute)
        if side.bias is not None:
            out.add_(side.bias)

    def gradient_dtype(self, wide: torch.dtype, compute: torch.dtype) -> torch.dtype:
        """Return the dtype in which the two products below take the gradient of the logits.

        The chunk driver makes the gradient in this dtype, so nothing else decides whether a row
        kernel rounds it. The default is the logits' own, `wide`.
        """
        return wide

    def hidden_gradient(self, out: Tensor, gradient: Tensor, side: Side) -> None:
        """out (C, H) = gradient · weight."""
        for tile in self._tiles(side, out.dtype):
            add = tile.start > 0  # the first is written, not added to what happens to lie there
            self._multiply(out, gradient[:, tile], side.weight[tile], side.compute, add=add)

    def weight_gradient(
        self, out: Tensor, gradient: Tensor, hidden: Tensor, compute: torch.dtype, add: bool
    ) -> None:
        """out (V, H) = or += gradientᵀ · hidden; float32, or rounded to out's dtype each time."""
        if self._writes(out.dtype, gradient.dtype):
            self._multiply(out, gradient.t(), hidden, compute, add=add)
            return
        for tile in tiles(out, torch.float32, self.tile_bytes):
            part = gradient.new_empty(out[tile].shape, dtype=torch.float32)
            self._multiply(part, gradient[:, tile].t(), hidden, compute)
            out[tile] = part.add_(out[tile]) if add else part  # the sum rounded once
            del part  # before the next is made

    def _tiles(self, side: Side, wide: torch.dtype) -> Iterator[slice]:
        """The whole vocabulary, or slices whose weights are converted one after the other."""
        if self._takes(side, wide):
            return iter([slice(0, side.weight.shape[0])])
        return tiles(side.weight, wide, self.tile_bytes)

    def _takes(self, side: Side, wide: torch.dtype) -> bool:
        """Whether a weight is multiplied as it is."""
        return side.weight.dtype == side.compute == wide

    def _writes(self, out: torch.dtype, operand: torch.dtype) -> bool:
        """Whether a product of operands of this dtype may be added to `out`."""
        return out == operand

    def _multiply(
        self, out: Tensor, a: Tensor, b: Tensor, compute: torch.dtype, add: bool = False
    ) -> None:
        """out = or += a · b, the values of b rounded to `compute` before."""
        raise NotImplementedError


class TorchProducts(Products):
    """torch.mm on widened operands."""

    def _multiply(
        self, out: Tensor, a: Tensor, b: Tensor, compute: torch.dtype, add: bool = False
    ) -> None:
        wide = out.dtype
        torch.addmm(out, a.to(wide), b.to(compute).to(wide), beta=int(add), out=out)


class CompiledProducts(Products):
    """The product of csrc/cpu: converts while it packs, so nothing is cast beforehand."""

    def fixed_bytes(self) -> int:
        info = extension.cpu.build_info()
        assert info is not None
        per_thread = info["product_bytes_per_thread"]
        assert isinstance(per_thread, int)
        return per_thread * torch.get_num_threads()

    def logits(self, out: Tensor, hidden: Tensor, side: Side) -> None:
        for tile in self._tiles(side, out.dtype):
            bias = None if side.bias is None else side.bias[tile].float().contiguous()
            weight = side.weight[tile].t()
            _product(out[:, tile], hidden, weight, bias, side.compute, round_a=True)

    def _takes(self, side: Side, wide: torch.dtype) -> bool:
        return 1 in side.weight.stride()

    def _multiply(
        self, out: Tensor, a: Tensor, b: Tensor, compute: torch.dtype, add: bool = False
    ) -> None:
        _product(out, a, b, None, compute, add=add)


class CudaProducts(Products):
    """cuBLAS with 16-bit operands and float32 results; float32 operands as they are."""

    tile_bytes = 16 * MIB  # launches cost more than a cache gives

    def gradient_dtype(self, wide: torch.dtype, compute: torch.dtype) -> torch.dtype:
        return compute

    def _takes(self, side: Side, wide: torch.dtype) -> bool:
        return side.weight.dtype == side.compute

    def _writes(self, out: torch.dtype, operand: torch.dtype) -> bool:
        return out in (torch.float32, operand)

    def _multiply(
        self, out: Tensor, a: Tensor, b: Tensor, compute: torch.dtype, add: bool = False
    ) -> None:
        _mm(out, a, b.to(compute), add)


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


def _mm(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    """out = or += a · b, where out may be wider than the operands."""
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, beta=int(add), out=out)
    elif add:  # to float32 since torch 2.10, the oldest that is supported
        torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, out=out)
    else:
        torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)


def products_for(device: torch.device, wide: torch.dtype) -> Products:
    """Who multiplies on this device, with results of dtype `wide`."""
    if wide == torch.float32 and device.type == "cpu" and extension.cpu.why_not() is None:
        return CompiledProducts()
    if wide == torch.float32 and device.type == "cuda":
        return CudaProducts()
    return TorchProducts()


def tiles(weight: Tensor, wide: torch.dtype, size: int) -> Iterator[slice]:
    """Slices of the vocabulary whose weights take `size` bytes once widened."""
    vocabulary, hidden = weight.shape
    height = max(16, size // (max(hidden, 1) * wide.itemsize))
    for begin in range(0, vocabulary, height):
        yield slice(begin, min(begin + height, vocabulary))
