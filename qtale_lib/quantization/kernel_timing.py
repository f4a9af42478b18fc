"""From how many tokens on dequantising beats the int4 kernel: what `int4_kernels.CPU_TOKENS` rests on.

OMP_NUM_THREADS=1 python -m qtale_lib.quantization.kernel_timing      # half a minute
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import torch

from qtale_lib.quantization.packed_linear import PackedLinear

TOKENS = (1, 4, 16, 24, 32, 40, 48, 64, 96, 128, 512)


@torch.no_grad()
def switch_over(
    out: int = 2048, width: int = 2048, group: int = 128, tokens: Iterable[int] = TOKENS
) -> list[dict[str, float]]:
    """Milliseconds (best of 15) of one packed bfloat16 layer [out, width] both ways, by tokens.

    Keys: tokens, kernel, dequantised, and float, the same layer with bfloat16 weights.
    """
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (out, width), dtype=torch.uint8, generator=generator)
    steps = torch.rand(out, width // group, generator=generator)
    layer = PackedLinear.from_codes(codes, steps, codes[:, ::group].clone(), 4, dtype=torch.bfloat16)
    weight, rows = layer.dequantize(), []
    for count in tokens:
        inputs = torch.randn(count, width, generator=generator).bfloat16()
        ways = {
            "kernel": lambda x=inputs: layer._by_kernel(x),
            "dequantised": lambda x=inputs: layer._by_chunks(x),
            "float": lambda x=inputs: torch.nn.functional.linear(x, weight),
        }
        rows.append({"tokens": count, **{way: _milliseconds(run) for way, run in ways.items()}})
    return rows


def _milliseconds(run: Callable[[], object], repeats: int = 15) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1000 * min(times)


def main() -> None:
    """Print the table for TinyLlama's attention and MLP shapes."""
    for out, width in ((2048, 2048), (5632, 2048), (2048, 5632)):
        print(f"out {out}, in {width}, {torch.get_num_threads()} threads: milliseconds")
        for row in switch_over(out, width):
            print("  ".join(f"{name} {value:8.3f}" for name, value in row.items()))


if __name__ == "__main__":
    main()
