"""The matrix products of the linear level, float32 results from any operands.

Logits that a product rounds to 16 bits cost the gradient of a distillation loss 4 to 23 percent (a
difference of near-equal distributions): every product here writes float32 (float64 for double).
What differs is who multiplies:

* :class:`CompiledProducts`: the package's own product on a CPU. It converts operands while it packs
  them, and its bits do not depend on the number of rows or threads.
* :class:`CudaProducts`: 16-bit operands, float32 results by ``out_dtype``; the gradient is rounded
  to 16 bits once, since both operands must be.
* :class:`TorchProducts`: everything else; 16-bit weights are widened tile by tile.

Shapes: hidden (C, H), weight (V, H), bias (V,), logits and their gradient (C, V). `compute` is the
dtype that hidden states and weights are rounded to before they are multiplied (autocast); where
they have it already, nothing is rounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

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


class Products(Protocol):
    """What the chunk driver needs."""

    def fixed_bytes(self) -> int:
        """Memory of the products themselves, whatever the number of rows."""
        ...

    def logits(self, out: Tensor, hidden: Tensor, side: Side) -> None:
        """out = hidden · weightᵀ + bias."""
        ...

    def operand_bytes(self, compute: torch.dtype) -> int:
        """Of an element of the copy that :meth:`operand` makes without a spare; 0: makes none."""
        ...

    def operand(self, gradient: Tensor, spare: Tensor | None, compute: torch.dtype) -> Tensor:
        """The gradient (C, V) as the two products below take it; `spare` (C, V) may be used."""
        ...

    def hidden_gradient(self, out: Tensor, gradient: Tensor, side: Side) -> None:
        """out (C, H) = gradient · weight."""
        ...

    def weight_gradient(
        self, out: Tensor, gradient: Tensor, hidden: Tensor, compute: torch.dtype, add: bool
    ) -> None:
        """out (V, H) = or += gradientᵀ · hidden; float32, or rounded to out's dtype each time."""
        ...


def products_for(device: torch.device, wide: torch.dtype) -> Products:
    """Who multiplies on this device, with results of dtype `wide`."""
    if wide == torch.float32 and device.type == "cpu" and extension.cpu.why_not() is None:
        return CompiledProducts()
    if wide == torch.float32 and device.type == "cuda":
        return CudaProducts()
    return TorchProducts()


def tiles(weight: Tensor, wide: torch.dtype) -> Iterator[slice]:
    """Slices of the vocabulary whose weights take TILE_BYTES once widened."""
    vocabulary, hidden = weight.shape
    height = max(16, TILE_BYTES // (max(hidden, 1) * wide.itemsize))
    for begin in range(0, vocabulary, height):
        yield slice(begin, min(begin + height, vocabulary))


class TorchProducts:
    """torch.mm on widened operands."""

    def fixed_bytes(self) -> int:
        return 2 * TILE_BYTES  # in the autocast dtype, and widened

    def logits(self, out: Tensor, hidden: Tensor, side: Side) -> None:
        rows = _wide(hidden, side.compute, out.dtype)
        for tile in self._tiles(side, out.dtype):
            torch.mm(rows, _wide(side.weight[tile], side.compute, out.dtype).t(), out=out[:, tile])
        if side.bias is not None:
            out.add_(side.bias)

    def operand_bytes(self, compute: torch.dtype) -> int:
        return 0

    def operand(self, gradient: Tensor, spare: Tensor | None, compute: torch.dtype) -> Tensor:
        return gradient

    def hidden_gradient(self, out: Tensor, gradient: Tensor, side: Side) -> None:
        for tile in self._tiles(side, out.dtype):
            # the first product is written, not added to what happens to lie there; no name holds
            # a tile while the next is made
            torch.addmm(
                out,
                gradient[:, tile],
                _wide(side.weight[tile], side.compute, out.dtype),
                beta=int(tile.start > 0),
                out=out,
            )

    def weight_gradient(
        self, out: Tensor, gradient: Tensor, hidden: Tensor, compute: torch.dtype, add: bool
    ) -> None:
        rows = _wide(hidden, compute, gradient.dtype)
        if out.dtype == gradient.dtype:
            torch.addmm(out, gradient.t(), rows, beta=int(add), out=out)
            return
        for tile in tiles(out, gradient.dtype):
            _put(out[tile], gradient[:, tile].t() @ rows, add)

    def _tiles(self, side: Side, wide: torch.dtype) -> Iterator[slice]:
        if side.weight.dtype == side.compute == wide:
            return iter([slice(0, side.weight.shape[0])])
        return tiles(side.weight, wide)


class CompiledProducts:
    """The product of csrc/cpu: converts while it packs, so nothing is cast beforehand."""

    def fixed_bytes(self) -> int:
        info = extension.cpu.build_info()
        assert info is not None
        per_thread = info["product_bytes_per_thread"]
        assert isinstance(per_thread, int)
        return per_thread * torch.get_num_threads()

    def logits(self, out: Tensor, hidden: Tensor, side: Side) -> None:
        bias = None if side.bias is None else side.bias.float()
        _product(out, hidden, side.weight.t(), bias, side.compute, round_a=True)

    def operand_bytes(self, compute: torch.dtype) -> int:
        return 0

    def operand(self, gradient: Tensor, spare: Tensor | None, compute: torch.dtype) -> Tensor:
        return gradient

    def hidden_gradient(self, out: Tensor, gradient: Tensor, side: Side) -> None:
        _product(out, gradient, side.weight, None, side.compute)

    def weight_gradient(
        self, out: Tensor, gradient: Tensor, hidden: Tensor, compute: torch.dtype, add: bool
    ) -> None:
        if out.dtype == torch.float32:
            _product(out, gradient.t(), hidden, None, compute, accumulate=add)
            return
        for tile in tiles(out, torch.float32):
            part = gradient.new_empty(out[tile].shape)
            _product(part, gradient[:, tile].t(), hidden, None, compute)
            _put(out[tile], part, add)
            del part  # before the next is made


class CudaProducts:
    """cuBLAS with 16-bit operands and float32 results; float32 operands as they are."""

    def fixed_bytes(self) -> int:
        return 2 * TILE_BYTES

    def logits(self, out: Tensor, hidden: Tensor, side: Side) -> None:
        rows = hidden.to(side.compute)
        for tile in self._tiles(side):
            _mm(out[:, tile], rows, side.weight[tile].to(side.compute).t())
        if side.bias is not None:
            out.add_(side.bias)

    def operand_bytes(self, compute: torch.dtype) -> int:
        return 0 if compute == torch.float32 else compute.itemsize

    def operand(self, gradient: Tensor, spare: Tensor | None, compute: torch.dtype) -> Tensor:
        if compute == gradient.dtype:
            return gradient
        if spare is None:
            return gradient.to(compute)
        rows, vocabulary = gradient.shape
        return spare.view(-1).view(compute)[: rows * vocabulary].view(rows, -1).copy_(gradient)

    def hidden_gradient(self, out: Tensor, gradient: Tensor, side: Side) -> None:
        for tile in self._tiles(side):
            _mm(out, gradient[:, tile], side.weight[tile].to(side.compute), add=tile.start > 0)

    def weight_gradient(
        self, out: Tensor, gradient: Tensor, hidden: Tensor, compute: torch.dtype, add: bool
    ) -> None:
        rows = hidden.to(compute)
        if out.dtype in (torch.float32, compute):
            _mm(out, gradient.t(), rows, add)
            return
        for tile in tiles(out, torch.float32):
            part = gradient.new_empty(out[tile].shape, dtype=torch.float32)
            _mm(part, gradient[:, tile].t(), rows)
            _put(out[tile], part, add)
            del part  # before the next is made

    def _tiles(self, side: Side) -> Iterator[slice]:
        if side.weight.dtype == side.compute:
            return iter([slice(0, side.weight.shape[0])])
        return tiles(side.weight, torch.float32)


def _wide(x: Tensor, compute: torch.dtype, wide: torch.dtype) -> Tensor:
    return x.to(compute).to(wide)


def _put(out: Tensor, part: Tensor, add: bool) -> None:
    out.copy_(part.add_(out) if add else part)  # the sum in float32, rounded once


def _product(
    out: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    compute: torch.dtype,
    round_a: bool = False,
    accumulate: bool = False,
) -> None:
    torch.ops.fused_kd.product_(out, a, b, bias, compute, round_a, accumulate)


def _mm(out: Tensor, a: Tensor, b: Tensor, add: bool = False) -> None:
    """out = or += a · b, where out may be wider than the operands."""
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, beta=int(add), out=out)
    elif add:
        torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, out=out)
    else:
        torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)
