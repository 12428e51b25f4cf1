"""BLIP-2: speed, FLOPs and memory of both training stages and of caption generation, in one run on one machine.

    python benchmarks/blip2.py
    python benchmarks/blip2.py --only stage1 --batch 16 --output benchmarks/results/blip2.json
    python benchmarks/blip2.py --small          # tiny models: a test of the program, in seconds

*Stage 1*: a step with cached image features against three others: one that runs the frozen tower on the images; a plain
step with cached features, in which every pass projects its own keys and values (`blip2_plain.py`); and that plain step
with the queries computed only once, as in LAVIS. Losses and matching logits are compared in fp32 before timing.

*Stage 2*: a step, images to loss, against transformers' Blip2ForConditionalGeneration with the same weights
(converted). Q-Former, projection and the LayerNorm after the tower are trainable; tower and LLM are frozen. The peer
runs with SDPA and without a cache, once as documented and once with logits of the texts only (`logits_to_keep`). The
losses must be equal in fp32.

*Captions*: 20 new tokens per image, greedy and with 3 beams, against the same class. The tokens must be equal in fp32;
for bf16 the table shows the share of equal ones.

A step is forward, backward and fused AdamW, without dropout. bf16 means autocast in steps, and the dtype of the weights
for captions. Texts have 8 to 20 tokens. Contenders take turns, one step each per round, in separate processes. Variants
of the same model share a process, and its peak memory is printed once. Close other programs: wide ranges in the output
mean a busy machine. The default size is ViT-B/16 at 224 pixels, a Q-Former like BERT-base with 32 queries, and an OPT
with 12 layers of width 768 and random weights. With 8 pairs per step and 4 captions, a run takes about ten minutes on
two cores.
"""

import argparse
import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from blip import CAPTION_HEADER, PACKAGES, same_share, verdict
from blip2_contenders import (
    SIZES,
    Contender,
    Writer,
    build_native_stage2,
    build_native_writer,
    build_plain,
    build_stage1,
    build_stage2,
    build_writer,
    prepare_stage1,
    prepare_stage2,
)
from harness import Spread, Worker, environment, interleave, positive, summary, table, write_json

OWN, UNCACHED, PLAIN, QUERIES_ONCE = "hf_vlm", "hf_vlm, no cache", "plain", "plain, queries once"
NATIVE, NATIVE_TRIMMED = "transformers", "transformers, text logits"
STEP_GOALS = {PLAIN: 1.25, QUERIES_ONCE: 1.25, NATIVE: 1.1, NATIVE_TRIMMED: 1.1}
FLOP_GOALS = {PLAIN: 1.25, QUERIES_ONCE: 1.25}
CAPTION_GOAL = 1.0
PRECISIONS = ("fp32", "bf16")
STAGE1_PRECISION = "bf16"
TOLERANCE = 1e-3
SEARCHES = {"greedy": 1, "3 beams": 3}
PARTS = ("stage1", "stage2", "captions")
STEP_HEADER = "part,contender,GFLOP a pair,ratio,goal,seconds,ratio,without AdamW,goal,memory".split(",")


def start(builders: dict[str, Any], folder: Path, args: argparse.Namespace, precision: str) -> dict[str, Worker]:
    """Contenders, each built in its process."""
    workers = {name: Worker(build, folder, args.device, precision) for name, build in builders.items()}
    for worker in workers.values():
        worker.wait()
    return workers


def check_outputs(part: str, workers: dict[str, Worker]) -> dict[str, float]:
    """Prints by how much fp32 outputs differ from ours, and ends the run if that is more than rounding."""
    outputs = {}
    for worker in workers.values():
        outputs |= worker.ask(Contender.float32_outputs)
    own, differences = outputs.pop(OWN), {}
    print(f"{part}, fp32: loss {own['loss'][0]:.5f}", flush=True)
    for name, output in outputs.items():
        each = {k: max(abs(a - b) for a, b in zip(v, output[k], strict=True)) for k, v in own.items()}
        print(f"  {name} differs by: {', '.join(f'{key} {value:.1e}' for key, value in each.items())}", flush=True)
        differences[name] = max(each.values())
    trained = {name: worker.ask(Contender.num_trained) for name, worker in workers.items()}
    if len(set(trained.values())) > 1:
        raise SystemExit(f"The contenders do not train the same weights: {trained}. Nothing is timed.")
    if max(differences.values()) > TOLERANCE:
        raise SystemExit("The contenders do not compute the same: nothing is timed.")
    return differences


def measure_steps(part: str, precision: str, workers: dict[str, Worker], args: argparse.Namespace, batch: int) -> list:
    """Contenders of one stage: compares their losses, times them in turn, counts FLOPs."""
    differences = check_outputs(part, workers)
    rounds = interleave(workers, args.repeats, f"{part}, {precision}", Contender.run)
    own = [ways[OWN] for ways in rounds[OWN]]
    results = []
    for name, worker in workers.items():
        memory, flops = worker.ask(Contender.peak_memory), worker.ask(Contender.flops)
        worker.close()
        for way, count in flops.items():
            result = {"part": part, "precision": precision, "contender": way, "batch": batch, "flops": count}
            result |= summary([ways[way] for ways in rounds[name]], own)
            result |= {"difference_fp32": differences.get(way, 0.0)}
            results.append(result | {"peak_memory_bytes": memory if way == name else None})
    return results


def measure_stage1(folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Steps of the first stage: from cached features, from images, and plain."""
    batch = args.batch or SIZES[args.size]["batch"]
    prepare_stage1(folder, args.size, batch)
    builders = {
        OWN: partial(build_stage1, name=OWN, images="vision_features"),
        UNCACHED: partial(build_stage1, name=UNCACHED, images="pixel_values"),
        PLAIN: partial(build_plain, name=PLAIN, queries_once=QUERIES_ONCE),
    }
    workers = start(builders, folder, args, STAGE1_PRECISION)
    return measure_steps("stage 1", STAGE1_PRECISION, workers, args, batch)


def measure_stage2(folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Steps of the second stage in each precision, against transformers."""
    batch = args.batch or SIZES[args.size]["batch"]
    prepare_stage2(folder, args.size, batch)
    builders = {
        OWN: partial(build_stage2, name=OWN),
        NATIVE: partial(build_native_stage2, name=NATIVE, trimmed=NATIVE_TRIMMED),
    }
    results = []
    for precision in PRECISIONS:
        workers = start(builders, folder, args, precision)
        results += measure_steps("stage 2", precision, workers, args, batch)
    return results


def measure_captions(folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Both captioners in each precision: times them in turn, compares their tokens."""
    prepare_stage2(folder, args.size, args.captions or SIZES[args.size]["captions"])
    results = []
    for precision in PRECISIONS:
        workers = start({OWN: build_writer, NATIVE: build_native_writer}, folder, args, precision)
        found = []
        for search, num_beams in SEARCHES.items():
            title, write = f"captions, {precision}, {search}", partial(Writer.write, num_beams=num_beams)
            rounds = interleave(workers, args.repeats, title, write)
            found += [{"precision": precision, "search": search} | result for result in compare_captions(rounds)]
        if precision == "fp32" and any(result["same_tokens"] < 1 for result in found):
            raise SystemExit(f"{NATIVE} writes other captions: {[result['same_tokens'] for result in found]} equal.")
        memory = {name: worker.ask(Writer.peak_memory) for name, worker in workers.items()}
        for worker in workers.values():
            worker.close()
        results += [result | {"peak_memory_bytes": memory[result["contender"]]} for result in found]
    return results


def compare_captions(rounds: dict[str, list[tuple[float, list[list[int]]]]]) -> list[dict[str, Any]]:
    """Speed and tokens of each captioner, from seconds and tokens by round."""
    own_tokens, results = rounds[OWN][-1][1], []
    for name, written in rounds.items():
        seconds = [each for each, _ in written]
        ratios = [other / own for other, (own, _) in zip(seconds, rounds[OWN], strict=True)]
        result = {"contender": name, "batch": len(own_tokens), "same_tokens": same_share(own_tokens, written[-1][1])}
        result |= {"images_per_second": vars(Spread.of(len(own_tokens) / each for each in seconds))}
        result |= {"ratio": vars(Spread.of(ratios))}
        results.append(result | {"different_captions": len({tuple(row) for row in own_tokens})})
    return results


def gibibytes(count: int | None) -> str:
    """Bytes for the table."""
    return "" if count is None else f"{count / 2**30:.2f} GiB"


def step_rows(results: list[dict[str, Any]], size: str) -> list[list[str]]:
    """The steps' results as rows of the table."""
    rows = []
    own = {(r["part"], r["precision"]): r["flops"] for r in results if r["contender"] == OWN}
    for result in results:
        name, more = result["contender"], result["flops"] / own[result["part"], result["precision"]]
        row = [f"{result['part']}, {result['precision']}, x {result['batch']}", name]
        row.append(f"{result['flops'] / result['batch'] / 1e9:.4g}")
        flop_goal = verdict(FLOP_GOALS[name], more, size) if name in FLOP_GOALS else ""
        row += ["", ""] if name == OWN else [f"{more:.2f}", flop_goal]
        row.append(str(Spread(**result["step_seconds"])))
        # The optimiser counts towards the goal only where the contenders' optimisers differ.
        judged = result["forward_backward_ratio" if name in FLOP_GOALS else "step_ratio"]["median"]
        goal = verdict(STEP_GOALS[name], judged, size) if name in STEP_GOALS else ""
        ratios = [str(Spread(**result[f"{key}_ratio"])) for key in ("step", "forward_backward")]
        row += ["", "", ""] if name == OWN else [*ratios, goal]
        rows.append([*row, gibibytes(result["peak_memory_bytes"])])
    return rows


def caption_rows(results: list[dict[str, Any]], size: str) -> list[list[str]]:
    """The captioners' results as rows of the table."""
    rows = []
    for result in results:
        ratio = Spread(**result["ratio"])
        row = [result["precision"], result["search"], result["contender"], str(Spread(**result["images_per_second"]))]
        goal = verdict(CAPTION_GOAL, ratio.median, size)
        row += ["", "", ""] if result["contender"] == OWN else [str(ratio), goal, f"{result['same_tokens']:.0%}"]
        rows.append([*row, gibibytes(result["peak_memory_bytes"])])
    return rows


def print_steps(results: list[dict[str, Any]], size: str) -> None:
    """Prints the table of a stage and its legend."""
    print(f"\n{table(STEP_HEADER, step_rows(results, size))}\n")
    print("x: pairs per step. Seconds: whole step, median (range). Ratios: over hf_vlm's in the same round. The")
    print(
        "goal of stage 1 is for forward and backward on cached features, the goal of stage 2 for the whole step.\n",
        flush=True,
    )


def print_captions(results: list[dict[str, Any]], size: str) -> None:
    """Prints the table of the captions and its legend."""
    print(f"\n{table(CAPTION_HEADER, caption_rows(results, size))}\n")
    print("Median (range). Ratio: seconds of transformers over hf_vlm's in the same round. Different captions:")
    counts = (f"{r['precision']} {r['search']} {r['different_captions']} of {r['batch']}" for r in results[::2])
    print("; ".join(counts), flush=True)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    small = "tiny models, to see whether the program runs"
    parser.add_argument("--small", dest="size", action="store_const", const="small", default="base", help=small)
    parser.add_argument("--batch", type=positive, help="pairs per step (default: 8, with --small 4)")
    parser.add_argument("--captions", type=positive, help="images to caption (default: 4, with --small 2)")
    parser.add_argument("--repeats", type=positive, default=5, help="timed rounds (default: 5)")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS, help="parts to run (default: all)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=positive, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--output", type=Path, help="JSON file to write (default: none)")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    """Runs the comparison."""
    args = parse(arguments)
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # no bars for loading weights, here and in the children
    if args.threads:
        torch.set_num_threads(args.threads)
    settings = {name: value for name, value in vars(args).items() if name != "output"}
    report: dict[str, Any] = {"settings": settings, "environment": environment(args.device, PACKAGES)}
    for values in report.values():
        print(*(f"{name}={value}" for name, value in values.items()), flush=True)
    measures = {"stage1": measure_stage1, "stage2": measure_stage2, "captions": measure_captions}
    for name in (name for name in PARTS if name in args.only):
        with tempfile.TemporaryDirectory() as folder:
            report[name] = measures[name](Path(folder), args)
        (print_captions if name == "captions" else print_steps)(report[name], args.size)
        if args.output:  # after each part, so that a later failure does not lose these results
            write_json(args.output, report)


if __name__ == "__main__":
    main(sys.argv[1:])
