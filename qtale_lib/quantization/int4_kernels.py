"""torch's matrix products on 4-bit weights: what they need, their layouts, and the way back.

Both take bfloat16 activations and, per group, (step, (8 − zero) · step) in bfloat16; the layout of the
weights differs by processor. It is not written down here but read off the kernel once: numbers whose place is
known are packed, and a random weight must come back. Where it does not, or the kernel is missing, there is no
kernel and weights are dequantised instead.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

GROUPS = (32, 64, 128, 256)  # weights per step that both kernels know
# Above so many tokens dequantising pays off: `python -m qtale_lib.quantization.kernel_timing`.
CPU_TOKENS = 64
CUDA_TOKENS = 64  # not measured


def kernel_class(device: torch.device, group: int, width: int) -> type[Int4Kernel] | None:
    """The kernel for `width` input columns in groups of `group` on `device`; None if there is none."""
    kernel = {"cpu": CpuKernel, "cuda": CudaKernel}.get(device.type)
    usable = kernel is not None and group in GROUPS and kernel.available(width, device)
    return kernel if usable else None


class Int4Kernel:
    """4-bit weights in the layout of one kernel; call it with bfloat16 [tokens, in] for [tokens, out]."""

    tokens: int  # up to so many it is faster than dequantising
    row_multiple: int

    def __init__(self, codes: Callable[[slice], Tensor], width: int, steps: Tensor, zeros: Tensor):
        """`codes` gives uint8 [rows, width] of a slice of the rows; steps and zeros [out, width/group]."""
        self.rows, self.width = len(steps), width
        self.group = width // steps.shape[1]
        steps = steps.float()
        pairs = torch.stack((steps, (8 - zeros.float()) * steps), -1).bfloat16()  # [out, in/group, 2]
        self.pairs = self._padded(pairs).transpose(0, 1).contiguous()  # -> [in/group, out, 2]
        self.packed = self._pack(codes)

    def _padded(self, rows: Tensor) -> Tensor:
        """Rows of zeros up to the multiple of rows that the kernel packs together."""
        missing = -len(rows) % self.row_multiple
        return nn.functional.pad(rows, (0, 0) * (rows.ndim - 1) + (0, missing))


class CpuKernel(Int4Kernel):
    """`_weight_int4pack_mm_for_cpu`: blocks of rows (64 with AVX-512), stored column by column."""

    tokens = CPU_TOKENS
    chunk = 2**18  # weights converted at once, through int32: small enough to leave no holes in the heap

    @property
    def row_multiple(self) -> int:
        return len(_cpu_row_order())

    @staticmethod
    def available(width: int, device: torch.device) -> bool:
        return width % 32 == 0 and _cpu_row_order() is not None

    def _pack(self, codes: Callable[[slice], Tensor]) -> Tensor:
        """-> uint8 [out/block, in, block/2]."""
        block = self.row_multiple
        packed = self.pairs.new_empty(-(-self.rows // block), self.width, block // 2, dtype=torch.uint8)
        blocks = max(1, self.chunk // (self.width * block))
        for start in range(0, len(packed), blocks):
            part = packed[start : start + blocks]
            rows = codes(slice(start * block, min((start + len(part)) * block, self.rows)))
            part.copy_(_convert_on_cpu(self._padded(rows)).view_as(part))
        return packed

    def codes(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows `start` (a multiple of the block) to `stop` as uint8 [rows, in]."""
        stop = self.rows if stop is None else stop
        block = self.row_multiple
        packed = self.packed[start // block : -(-stop // block)]
        columns = packed.transpose(1, 2).contiguous()  # [blocks, in, block/2] -> [blocks, block/2, in]
        rows = torch.stack((columns & 15, columns >> 4), 2)  # [blocks, block/2, 2, in]
        ordered = rows.flatten(1, 2).index_select(1, _cpu_row_order().argsort())
        return ordered.flatten(0, 1)[: stop - start]  # [blocks, block, in] -> [rows, in]

    def __call__(self, inputs: Tensor) -> Tensor:
        packed = self.packed.view(-1, self.width // 2)  # [out, in/2], as the kernel was told
        product = torch.ops.aten._weight_int4pack_mm_for_cpu(
            inputs.contiguous(), packed, self.group, self.pairs
        )
        return product[:, : self.rows]


class CudaKernel(Int4Kernel):
    """`_weight_int4pack_mm` (Ampere or newer): tiles of 8 rows by 16 to 128 columns."""

    tokens = CUDA_TOKENS
    row_multiple = 8

    @staticmethod
    def available(width: int, device: torch.device) -> bool:
        if not hasattr(torch.ops.aten, "_weight_int4pack_mm") or width % 32:
            return False
        return torch.cuda.get_device_capability(device) >= (8, 0) and _tile_order(width, device) is not None

    def _pack(self, codes: Callable[[slice], Tensor]) -> Tensor:
        return _convert_on_cuda(self._padded(codes(slice(0, self.rows))), _inner_tiles(self.width))

    def codes(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows `start` (a multiple of 8) to `stop` as uint8 [rows, in]."""
        stop = self.rows if stop is None else stop
        packed = self.packed[start // 8 : -(-stop // 8)]
        order = _tile_order(self.width, packed.device)
        return _untile(packed, order, self.width)[: stop - start]

    def __call__(self, inputs: Tensor) -> Tensor:
        product = torch.ops.aten._weight_int4pack_mm(inputs.contiguous(), self.packed, self.group, self.pairs)
        return product[:, : self.rows]


def _convert_on_cpu(codes: Tensor) -> Tensor:
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)


def _convert_on_cuda(codes: Tensor, tiles: int) -> Tensor:
    """[out, in] -> int32 [out/8, in/(16·tiles), 32, tiles/2]."""
    pairs = codes[:, ::2] << 4 | codes[:, 1::2]
    return torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), tiles)


def _inner_tiles(width: int) -> int:
    return next(tiles for tiles in (8, 4, 2) if width % (16 * tiles) == 0)


def _nibbles(packed: Tensor) -> Tensor:
    """4-bit numbers of a contiguous tensor's bytes, low half first: flat uint8."""
    flat = packed.contiguous().view(torch.uint8).flatten()
    return torch.stack((flat & 15, flat >> 4), -1).flatten()


def _numbers_seen(convert: Callable[[Tensor], Tensor], numbers: Tensor) -> Tensor:
    """The order in which a conversion puts whole `numbers` [out, in] below 16³, sent digit by digit."""
    digits = (numbers // 16**place % 16 for place in range(3))
    return sum(_nibbles(convert(d.byte())).long() * 16**place for place, d in enumerate(digits))


def _random_codes(rows: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 16, (rows, width), dtype=torch.uint8, generator=generator).to(device)


@functools.cache
def _cpu_row_order() -> Tensor | None:
    """Which row of its block each 4-bit place of a column holds, [block]; None without a usable kernel."""
    if not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        return None
    for block in (64, 32, 16):  # a block longer than the kernel's own fails the check below
        rows = torch.arange(block)[:, None].expand(block, 32)
        order = _numbers_seen(_convert_on_cpu, rows)[:block]
        codes = _random_codes(3 * block, 32)
        seen = _nibbles(_convert_on_cpu(codes)).view(3, 32, block)
        expected = codes.view(3, block, 32)[:, order]  # [3, block, 32]
        if torch.equal(seen.transpose(1, 2), expected):
            return order
    return None


@functools.cache
def _tile_order(width: int, device: torch.device) -> Tensor | None:
    """Which place of its tile (row by row) each 4-bit number holds; None if the layout is another."""
    tiles = _inner_tiles(width)
    columns = 16 * tiles
    convert = functools.partial(_convert_on_cuda, tiles=tiles)
    order = _numbers_seen(convert, torch.arange(8 * columns, device=device).view(8, columns))
    codes = _random_codes(16, 3 * columns, device)
    return order if torch.equal(_untile(convert(codes), order, 3 * columns), codes) else None


def _untile(packed: Tensor, order: Tensor, width: int) -> Tensor:
    """Tiles of 8 rows, each in `order`, -> uint8 [out, width]."""
    tiles = _nibbles(packed).view(-1, len(order))[:, order.argsort()]
    placed = tiles.view(-1, width // (len(order) // 8), 8, len(order) // 8)  # [out/8, tiles, 8, columns]
    return placed.transpose(1, 2).reshape(-1, width)
