"""Shared parts of the speed comparisons: contenders in separate processes, interleaved timing, FLOPs, memory, tables.

- Every contender runs in a child process. Peak memory is measured per contender, and a peer may patch its imports.
- One process works at a time (A B C A B C ...), so that changes in machine speed affect all contenders equally.
- A ratio is computed within a round; the median over rounds is reported. The spread is the full range.
"""

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from tqdm import tqdm

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
MATMUL_SIZES = (512, 1024, 2048, 3072)


@dataclass(frozen=True)
class Times:
    """One training step: seconds of forward and backward, seconds of the whole step, and the loss before the step."""

    forward_backward: float
    step: float
    loss: float


class TrainingStep:
    """A training step on one batch: forward, loss, backward and AdamW; under autocast unless in float32.

    Args:
        model: The model to train; it is moved to the device and set to training mode.
        loss: Computes the scalar loss of the batch.
        device: `"cpu"` or `"cuda"`.
        precision: A key of `DTYPES`.
    """

    def __init__(self, model: torch.nn.Module, loss: Callable[[], torch.Tensor], device: str, precision: str):
        self.model = model.to(device).train()
        self.loss = loss
        self.device = device
        self.precision = precision
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def autocast(self) -> AbstractContextManager:
        """The context of the forward pass."""
        dtype = DTYPES[self.precision]
        return torch.autocast(self.device, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)

    def run(self) -> Times:
        """Takes one training step."""
        synchronize(self.device)
        start = time.perf_counter()
        self.optimizer.zero_grad()
        with self.autocast():
            loss = self.loss()
        loss.backward()
        synchronize(self.device)
        backward_end = time.perf_counter()
        self.optimizer.step()
        synchronize(self.device)
        return Times(backward_end - start, time.perf_counter() - start, loss.item())

    def float32_loss(self) -> float:
        """The loss of the current weights in float32."""
        with torch.no_grad():
            return self.loss().item()

    def flops(self) -> int:
        """FLOPs of one forward and backward pass, counting matrix products and convolutions."""
        self.optimizer.zero_grad()
        aten = torch.ops.aten
        attention = {
            aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
        }
        with FlopCounterMode(display=False, custom_mapping=attention) as counter:
            with self.autocast():
                loss = self.loss()
            loss.backward()
        return counter.get_total_flops()

    def peak_memory(self) -> int:
        """Peak memory in bytes; see [`peak_memory`]."""
        return peak_memory(self.device)


def peak_memory(device: str) -> int:
    """Peak memory in bytes: resident memory of the process on the CPU, allocated memory on a GPU."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# PyTorch counts the FLOPs of its CUDA attention kernels only; the CPU kernel gets the same formula here.
def _attention_flops(query_shape, key_shape, value_shape, *args, out_shape=None, **kwargs) -> int:
    return sdpa_flop_count(query_shape, key_shape, value_shape)


def _attention_backward_flops(grad_shape, query_shape, key_shape, value_shape, *args, out_shape=None, **kwargs) -> int:
    return sdpa_backward_flop_count(grad_shape, query_shape, key_shape, value_shape)


class Worker:
    """A contender in a child process. The child starts building it immediately.

    Args:
        build: Makes the contender there; a function at the top of a module.
        *args: Its arguments.
    """

    def __init__(self, build: Callable[..., Any], *args: Any):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["transformers.modeling_utils"])  # imported once for all, which saves seconds
        self.pipe, child_pipe = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(child_pipe, torch.get_num_threads(), build, args), daemon=True
        )
        self.process.start()
        child_pipe.close()

    def wait(self) -> None:
        """Waits until the contender is built.

        Raises:
            ImportError: if a package that it needs is missing there.
            RuntimeError: if the child ended for another reason, which it printed.
        """
        if (missing := self._receive()) is not None:
            self.process.join()
            raise ImportError(missing)

    def ask(self, method: Callable[[Any], Any]) -> Any:
        """Calls a method of the contender, such as `TrainingStep.run`, in the child and returns its result."""
        self.pipe.send(method)
        return self._receive()

    def close(self) -> None:
        """Ends the child."""
        self.pipe.send(None)
        self.process.join()

    def _receive(self) -> Any:
        try:
            return self.pipe.recv()
        except EOFError:
            self.process.join()
            raise RuntimeError(f"A contender ended with exit code {self.process.exitcode}; see above.") from None


def _serve(pipe: Any, num_threads: int, build: Callable[..., Any], args: tuple) -> None:
    torch.set_num_threads(num_threads)
    try:
        contender = build(*args)
    except ImportError as error:
        pipe.send(str(error))
        return
    pipe.send(None)
    while (method := pipe.recv()) is not None:
        pipe.send(method(contender))


def interleave(
    workers: dict[str, Worker], repeats: int, title: str, method: Callable[[Any], Any] = TrainingStep.run
) -> dict[str, list[Any]]:
    """Runs `method` of every contender in turn, `repeats` times, after one warm-up round."""
    rounds = [
        {name: worker.ask(method) for name, worker in workers.items()}
        for _ in tqdm(range(repeats + 1), desc=title, unit="round")
    ]
    return {name: [times[name] for times in rounds[1:]] for name in workers}


def synchronize(device: str) -> None:
    """Waits until the device has finished all queued work."""
    if device != "cpu":
        torch.cuda.synchronize()


def matmul_peak(device: str, precision: str, repeats: int = 5) -> float:
    """Peak FLOPs per second of a square matrix product on this machine, over several sizes."""
    best = 0.0
    for size in MATMUL_SIZES:
        left = torch.randn(size, size, device=device, dtype=DTYPES[precision])
        right = torch.randn(size, size, device=device, dtype=DTYPES[precision])
        out = left @ right
        for _ in range(repeats):
            synchronize(device)
            start = time.perf_counter()
            torch.mm(left, right, out=out)
            synchronize(device)
            best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


@dataclass(frozen=True)
class Spread:
    """A median with its full range."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """The spread of some numbers."""
        values = list(values)
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f}-{self.high:.3f})"


def summary(times: list[Times], own: list[Times]) -> dict[str, Any]:
    """Spreads of a contender's seconds and of its per-round ratios to ours, and its last loss."""
    pairs = list(zip(times, own, strict=True))
    return {
        "forward_backward_seconds": vars(Spread.of(each.forward_backward for each in times)),
        "step_seconds": vars(Spread.of(each.step for each in times)),
        "forward_backward_ratio": vars(Spread.of(a.forward_backward / b.forward_backward for a, b in pairs)),
        "step_ratio": vars(Spread.of(a.step / b.step for a, b in pairs)),
        "last_loss": times[-1].loss,
    }


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows as aligned text columns: the first column left-aligned, the others right-aligned."""
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    )


def positive(text: str) -> int:
    """A positive integer from the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def environment(device: str, packages: Iterable[str]) -> dict[str, Any]:
    """The conditions of a run: versions, device, threads and machine load before the run."""
    return {
        **{name: version(name) for name in ("torch", *packages)},
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if device != "cpu" else torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
    }


def version(package: str) -> str:
    """The installed version of a package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Writes a report as JSON and creates its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
