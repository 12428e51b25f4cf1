"""Measures whether bf16 autocast is faster on this machine."""

import time

import torch


def matmul_gflops(dtype: torch.dtype, size: int = 1024, seconds: float = 0.5) -> float:
    """GFLOP/s of a square matrix product of `size` on the CPU, measured for about `seconds`.

    Uses the best time, not the mean, so that background load does not matter.
    """
    a, b = (
        torch.ones(size, size, dtype=dtype),
        torch.ones(size, size, dtype=dtype),
    )  # does not use the RNG
    a @ b
    start, fastest = time.perf_counter(), float("inf")
    while time.perf_counter() - start < seconds:
        begin = time.perf_counter()
        a @ b
        fastest = min(fastest, time.perf_counter() - begin)
    return 2 * size**3 / fastest / 1e9


def choose_bf16() -> tuple[bool, str]:
    """Whether to train in bf16, and why: a one-second probe on CPU, the device's support on CUDA.

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
