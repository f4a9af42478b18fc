"""A linear layer whose weights stay packed in 2, 3, 4 or 8 bits, with a step and a zero point per group.

A weight is (code − zero) · step, computed in float32 and rounded once to the activations' type: bit for bit
what `quantize` left in the float model. 4 bits in bfloat16 are multiplied by torch's int4 kernel where it is
faster (int4_kernels.py), which rounds steps to bfloat16; everything else is dequantised a few rows at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qtale_lib.quantization.bitpack import pack_codes, packed_width, unpack_codes
from qtale_lib.quantization.int4_kernels import kernel_class

CHUNK = 2**20  # weights dequantised at once: their float32 values stay in a processor's cache


class PackedLinear(nn.Module):
    """y = x Wᵀ + b for x [..., in], with W [out, in] packed.

    Buffers: codes uint8 [out, bits, ceil(in/8)], steps [out, in/group], zeros uint8 [bits, ceil(·/8)] (packed
    too), bias [out] or None. Where a kernel holds the codes in a layout of its own, `codes` is None and
    `state_dict` puts them back. Made empty: `from_codes` fills it, or load_state_dict and `arrange`.

    Args:
        group_size: weights of a row that share a step; −1 is the whole row.
        dtype: of the activations to come; `.to()` changes it, and never the steps.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        group_size: int,
        bias: bool = False,
        dtype: torch.dtype = torch.float32,
        step_dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.in_features, self.out_features, self.bits = in_features, out_features, bits
        self.group = in_features if group_size == -1 else group_size
        self.dtype, self.kernel = dtype, None
        groups = (out_features, in_features // self.group)
        zeros = (bits, packed_width(groups[0] * groups[1]))
        codes = (out_features, bits, packed_width(in_features))
        self.register_buffer("codes", torch.empty(codes, dtype=torch.uint8, device=device))
        self.register_buffer("steps", torch.empty(groups, dtype=step_dtype, device=device))
        self.register_buffer("zeros", torch.empty(zeros, dtype=torch.uint8, device=device))
        self.register_buffer("bias", torch.empty(out_features, dtype=dtype, device=device) if bias else None)

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        steps: Tensor,
        zeros: Tensor,
        bits: int,
        bias: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> PackedLinear:
        """Pack codes uint8 [out, in] with steps float and zeros uint8 [out, in/group]."""
        (out, width), groups = codes.shape, steps.shape[1]
        packed = cls(width, out, bits, width // groups, bias is not None, dtype, steps.dtype, "meta")
        packed.codes, packed.steps = pack_codes(codes, bits), steps
        packed.zeros, packed.bias = pack_codes(zeros.flatten(), bits), bias
        return packed.arrange()

    def forward(self, inputs: Tensor) -> Tensor:
        """Activations [..., in] -> [..., out]; gradients reach the inputs, there are no others."""
        rows = inputs.reshape(-1, self.in_features)  # [..., in] -> [tokens, in]
        output = self._by_kernel(rows) if self._kernel_serves(rows) else self._by_chunks(rows)
        return output.view(*inputs.shape[:-1], self.out_features)

    def dequantize(self, dtype: torch.dtype | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        """Weights [rows, in] of output rows `start` to `stop` (all) in `dtype` (that of the activations)."""
        rows = slice(start, self.out_features if stop is None else stop)
        return self._values(rows, self.zero_points(), dtype or self.dtype)

    def zero_points(self) -> Tensor:
        """uint8 [out, in/group]."""
        return unpack_codes(self.zeros, self.steps.numel()).view_as(self.steps)

    def unpacked(self) -> Tensor:
        """Codes uint8 [out, in]."""
        return self._unpacked(slice(0, self.out_features))

    def arrange(self) -> PackedLinear:
        """Hand the codes to the int4 kernel, if there is one for this shape, type and device."""
        device = self.steps.device
        fits = self.bits == 4 and self.dtype == torch.bfloat16 and self.kernel is None
        kernel = kernel_class(device, self.group, self.in_features) if fits else None
        if kernel is not None:
            self.kernel = kernel(self._unpacked, self.in_features, self.steps, self.zero_points())
            self.codes = None
        return self

    def _restore(self) -> None:
        """Take the codes back from the kernel."""
        if self.kernel is not None:
            self.codes, self.kernel = pack_codes(self.kernel.codes(), self.bits), None

    def _unpacked(self, rows: slice) -> Tensor:
        if self.kernel is not None:
            return self.kernel.codes(rows.start, rows.stop)
        return unpack_codes(self.codes[rows], self.in_features)

    def _values(self, rows: slice, zeros: Tensor, dtype: torch.dtype) -> Tensor:
        groups = self._unpacked(rows).unflatten(1, (-1, self.group))  # [rows, in] -> [rows, in/group, group]
        values = groups.float().sub_(zeros[rows, :, None]).mul_(self.steps[rows, :, None])
        return values.flatten(1).to(dtype)

    def _kernel_serves(self, rows: Tensor) -> bool:
        few = self.kernel is not None and 0 < len(rows) <= self.kernel.tokens
        learning = rows.requires_grad and torch.is_grad_enabled()  # the kernel has no gradient
        return few and rows.dtype == torch.bfloat16 and not learning

    def _by_kernel(self, rows: Tensor) -> Tensor:
        output = self.kernel(rows)
        return output if self.bias is None else output + self.bias

    def _by_chunks(self, rows: Tensor) -> Tensor:
        chunk = self.out_features if rows.is_cuda else self._chunk_rows()
        zeros, parts = self.zero_points(), []
        for start in range(0, self.out_features, chunk):
            part = slice(start, min(start + chunk, self.out_features))
            bias = None if self.bias is None else self.bias[part].to(rows.dtype)
            parts.append(nn.functional.linear(rows, self._values(part, zeros, rows.dtype), bias))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _chunk_rows(self) -> int:
        """Output rows dequantised at once, a multiple of those that the kernel stores together."""
        block = 1 if self.kernel is None else self.kernel.row_multiple
        return max(1, CHUNK // self.in_features // block) * block

    def _apply(self, fn, recurse=True):
        """Move or convert as any layer, but keep the steps' precision and find the new place's kernel."""
        self._restore()
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.steps.device)).dtype

        def without_loss(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if tensor is self.steps else moved

        super()._apply(without_loss, recurse)
        return self.arrange()

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.kernel is not None:
            destination[prefix + "codes"] = pack_codes(self.kernel.codes(), self.bits)

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{shape}, bits={self.bits}, group={self.group}, bias={self.bias is not None}"
