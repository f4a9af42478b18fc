"""Small integers packed into bytes without gaps: the storage of quantized weights, in memory and on disk."""

import torch
from torch import Tensor, nn

LANES = 8  # codes packed together: 8 codes of b bits fill b bytes exactly, for every b


def packed_width(codes: int) -> int:
    """Bytes per plane that `codes` codes of a row take; codes that do not fill their lanes are padded."""
    return -(-codes // LANES)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 [..., n] below 2^bits -> bytes uint8 [..., bits, ceil(n/8)].

    Lane j of byte column i holds code j·ceil(n/8) + i, so that both ways run over whole rows at once.
    """
    width = packed_width(codes.shape[-1])
    padded = nn.functional.pad(codes, (0, LANES * width - codes.shape[-1]))
    lanes = padded.unflatten(-1, (LANES, width))  # [..., n] -> [..., 8, n/8]
    packed = codes.new_zeros(*codes.shape[:-1], bits, width)
    for lane in range(LANES):
        byte, shift = divmod(lane * bits, 8)
        packed[..., byte, :] |= lanes[..., lane, :] << shift
        if shift + bits > 8:  # the code straddles two bytes
            packed[..., byte + 1, :] |= lanes[..., lane, :] >> (8 - shift)
    return packed


def unpack_codes(packed: Tensor, count: int) -> Tensor:
    """What `pack_codes` packed: bytes uint8 [..., bits, ceil(count/8)] -> codes uint8 [..., count]."""
    bits, width = packed.shape[-2:]
    lanes = packed.new_empty(*packed.shape[:-2], LANES, width)
    for lane in range(LANES):
        byte, shift = divmod(lane * bits, 8)
        code = packed[..., byte, :] >> shift
        if shift + bits > 8:
            code |= packed[..., byte + 1, :] << (8 - shift)
        torch.bitwise_and(code, 2**bits - 1, out=lanes[..., lane, :])
    return lanes.flatten(-2)[..., :count]  # [..., 8, n/8] -> [..., n]
