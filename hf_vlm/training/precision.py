"""Decides whether bf16 autocast is worth it on this machine, by measuring."""

import time

import torch


def matmul_gflops(dtype: torch.dtype, size: int = 1024, seconds: float = 0.5) -> float:
    """GFLOP/s of the fastest of the square matrix products of `size` that the CPU does in about `seconds`.

    The fastest and not the mean: what else the machine is doing must not decide.
    """
    a, b = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)  # draws no random numbers
    a @ b
    start, fastest = time.perf_counter(), float("inf")
    while time.perf_counter() - start < seconds:
        begin = time.perf_counter()
        a @ b
        fastest = min(fastest, time.perf_counter() - begin)
    return 2 * size**3 / fastest / 1e9


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
