"""Decides whether bf16 autocast is worth it on this machine, by measuring."""

import time

import torch


def matmul_gflops(dtype: torch.dtype, size: int = 1024, seconds: float = 0.5) -> float:
    """GFLOP/s of square matrix products of `size` on the CPU, measured for about `seconds`."""
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    a @ b
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        a @ b
        count += 1
    return 2 * size**3 * count / (time.perf_counter() - start) / 1e9


def choose_bf16() -> tuple[bool, str]:
    """Whether to train in bf16 here, and why: on CPU by a one-second probe, on CUDA by what the device supports.

    Returns:
        The decision and a sentence for the log.
    """
    if torch.cuda.is_available():
        supported = torch.cuda.is_bf16_supported()
        return supported, f"bf16: {'on' if supported else 'off'} (the GPU {'has' if supported else 'lacks'} it)"
    full, half = matmul_gflops(torch.float32), matmul_gflops(torch.bfloat16)
    use = half > 1.2 * full
    return use, f"bf16: {'on' if use else 'off'} (probe: {half:.0f} GFLOP/s in bf16, {full:.0f} in fp32)"


__all__ = ["choose_bf16", "matmul_gflops"]
