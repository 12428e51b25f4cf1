"""BLIP: speed and FLOPs of a pretraining step, and speed of caption generation, in one run on one machine.

    python benchmarks/blip.py
    python benchmarks/blip.py --size small --only captions --repeats 9 --output benchmarks/results/blip.json

*Steps*: a whole pretraining step (momentum update, forward, backward, AdamW, queue) against a plain implementation of
the same step (`blip_plain.py`): every pass projects its own keys and values, and captions are padded to 30 tokens.
Weights, images, captions of 8 to 20 tokens and hard negatives are the same. Losses and matching logits are compared in
fp32 before timing. Both use bf16 autocast and the same fused AdamW, without dropout. The *text side* is the step with
precomputed image features, without momentum update and AdamW.

*Captions*: 20 new tokens per image against transformers' BlipForConditionalGeneration with the same weights
(converted), greedy and with 3 beams. The tokens must be equal in fp32; for bf16 the table shows the equal share.

Contenders take turns, one step each per round, in separate processes. Close other programs: wide ranges in the output
mean a busy machine. The default size is ViT-B/16 with 12 text layers, at 224 pixels with 4 pairs per step and at 384
with 2. A run takes about ten minutes on two cores, with 8 GB of memory per contender. Captions are generated for 8
images of 224 pixels.
"""

import argparse
import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from blip_contenders import (
    LONGEST,
    PADDED_LENGTH,
    SIZES,
    PretrainingStep,
    Writer,
    build_hf_vlm,
    build_native_writer,
    build_plain,
    build_writer,
    prepare_captions,
    prepare_steps,
)
from harness import (
    Spread,
    TrainingStep,
    Worker,
    environment,
    interleave,
    positive,
    summary,
    table,
    write_json,
)

STEP_PRECISION, CAPTION_PRECISIONS = "bf16", ("fp32", "bf16")
TOLERANCE = 1e-3
FLOP_GOALS = {"text side": 2.0, "whole step": 1.3}
STEP_GOAL, CAPTION_GOAL = 1.25, 1.2
LAVIS_GFLOP = {224: 302, 384: 739}
SEARCHES = {"greedy": 1, "3 beams": 3}
PACKAGES = ("hf-vlm", "transformers")
STEP_HEADER = "image,part,contender,GFLOP a pair,ratio,goal,seconds,ratio,goal,memory".split(",")
CAPTION_HEADER = "precision,search,contender,images a second,ratio,goal,same tokens,memory".split(",")


def check_outputs(image_size: int, outputs: dict[str, dict[str, list[float]]]) -> dict[str, float]:
    """Prints by how much losses and matching logits differ, and ends the run if they differ by more than rounding."""
    own, plain = outputs["hf_vlm"], outputs["plain"]
    differences = {
        name: max(abs(a - b) for a, b in zip(values, plain[name], strict=True)) for name, values in own.items()
    }
    shown = ", ".join(f"{name} {difference:.1e}" for name, difference in differences.items())
    print(f"{image_size} pixels, fp32: loss {own['loss'][0]:.5f}; plain differs by: {shown}", flush=True)
    if max(differences.values()) > TOLERANCE:
        raise SystemExit("The two steps do not compute the same: nothing is timed.")
    return differences


def measure_steps(folder: Path, args: argparse.Namespace, image_size: int) -> list[dict[str, Any]]:
    """Both steps at one image size: compares their losses, times them in turn, counts FLOPs."""
    batch = args.batch or SIZES[args.size]["batches"][image_size]
    prepare_steps(folder, args.size, image_size, batch)
    builders = {"hf_vlm": build_hf_vlm, "plain": build_plain}
    workers = {name: Worker(build, folder, args.device, STEP_PRECISION) for name, build in builders.items()}
    for worker in workers.values():
        worker.wait()
    differences = check_outputs(
        image_size, {name: worker.ask(PretrainingStep.float32_outputs) for name, worker in workers.items()}
    )
    title = f"{image_size} pixels"
    whole = interleave(workers, args.repeats, f"{title}, whole step")
    memory = {name: worker.ask(TrainingStep.peak_memory) for name, worker in workers.items()}
    text = interleave(workers, args.repeats, f"{title}, text side", PretrainingStep.run_text)
    results = []
    for name, worker in workers.items():
        parts = {
            "text side": (text, worker.ask(PretrainingStep.text_flops)),
            "whole step": (whole, worker.ask(TrainingStep.flops)),
        }
        worker.close()
        for part, (times, flops) in parts.items():
            result = {"image_size": image_size, "batch": batch, "part": part, "contender": name, "flops": flops}
            result |= summary(times[name], times["hf_vlm"])
            results.append(result | {"differences_fp32": differences, "peak_memory_bytes": memory[name]})
    return sorted(results, key=lambda result: result["part"])


def same_share(tokens: list[list[int]], others: list[list[int]]) -> float:
    """The share of tokens that are equal."""
    pairs = [pair for row in zip(tokens, others, strict=True) for pair in zip(*row, strict=True)]
    return sum(a == b for a, b in pairs) / len(pairs)


def measure_captions(folder: Path, args: argparse.Namespace, precision: str) -> list[dict[str, Any]]:
    """Both captioners in one precision: times them in turn, compares their tokens."""
    builders = {"hf_vlm": build_writer, "transformers": build_native_writer}
    workers = {name: Worker(build, folder, args.device, precision) for name, build in builders.items()}
    for worker in workers.values():
        worker.wait()
    results = []
    for search, num_beams in SEARCHES.items():
        write = partial(Writer.write, num_beams=num_beams)
        rounds = interleave(workers, args.repeats, f"captions, {precision}, {search}", write)
        own_tokens = rounds["hf_vlm"][-1][1]
        own_seconds = [seconds for seconds, _ in rounds["hf_vlm"]]
        for name, written in rounds.items():
            seconds = [each for each, _ in written]
            ratios = [other / own for other, own in zip(seconds, own_seconds, strict=True)]
            same = same_share(own_tokens, written[-1][1])
            if precision == "fp32" and same < 1:
                raise SystemExit(f"{name} writes other captions ({search}): only {same:.0%} of the tokens are equal.")
            result = {"precision": precision, "search": search, "contender": name, "batch": len(own_tokens)}
            result |= {"images_per_second": vars(Spread.of(len(own_tokens) / each for each in seconds))}
            result |= {"ratio": vars(Spread.of(ratios)), "same_tokens": same}
            result |= {"different_captions": len({tuple(row) for row in own_tokens})}
            results.append(result)
    for name, worker in workers.items():
        memory = worker.ask(Writer.peak_memory)
        worker.close()
        results = [r | {"peak_memory_bytes": memory} if r["contender"] == name else r for r in results]
    return results


def verdict(goal: float, ratio: float, size: str) -> str:
    """A goal and whether it was met; goals apply to the base size only."""
    return f"{goal:g} {'reached' if ratio >= goal else 'missed'}" if size == "base" else ""


def step_rows(results: list[dict[str, Any]], size: str) -> list[list[str]]:
    """The steps' results as rows of the table."""
    rows = []
    flops = {(r["image_size"], r["part"]): r["flops"] for r in results if r["contender"] == "hf_vlm"}
    for result in results:
        part, is_own = result["part"], result["contender"] == "hf_vlm"
        key = "step" if part == "whole step" else "forward_backward"
        more, ratio = result["flops"] / flops[result["image_size"], part], Spread(**result[f"{key}_ratio"])
        time_goal = verdict(STEP_GOAL, ratio.median, size) if part == "whole step" else ""
        rows.append(
            [
                f"{result['image_size']} x {result['batch']}",
                part,
                result["contender"],
                f"{result['flops'] / result['batch'] / 1e9:.4g}",
                "" if is_own else f"{more:.2f}",
                "" if is_own else verdict(FLOP_GOALS[part], more, size),
                str(Spread(**result[f"{key}_seconds"])),
                "" if is_own else str(ratio),
                "" if is_own else time_goal,
                f"{result['peak_memory_bytes'] / 2**30:.2f} GiB" if part == "whole step" else "",
            ]
        )
    return rows


def caption_rows(results: list[dict[str, Any]], size: str) -> list[list[str]]:
    """The captioners' results as rows of the table."""
    return [
        [
            result["precision"],
            result["search"],
            result["contender"],
            str(Spread(**result["images_per_second"])),
            *(
                ["", "", ""]
                if result["contender"] == "hf_vlm"
                else [
                    str(Spread(**result["ratio"])),
                    verdict(CAPTION_GOAL, result["ratio"]["median"], size),
                    f"{result['same_tokens']:.0%}",
                ]
            ),
            f"{result['peak_memory_bytes'] / 2**30:.2f} GiB",
        ]
        for result in results
    ]


def print_report(steps: list[dict[str, Any]], captions: list[dict[str, Any]], size: str) -> None:
    """Prints the tables and their legends."""
    if steps:
        print(f"\n{table(STEP_HEADER, step_rows(steps, size))}\n")
        print(
            f"Image: side x pairs per step. Captions: {LONGEST} tokens here, {PADDED_LENGTH} in the plain step. Ratios:"
        )
        print("plain over hf_vlm, of seconds in the same round. Text side: seconds of forward and backward.")
        if size == "base":
            known = " and ".join(f"{gflop} at {side}" for side, gflop in LAVIS_GFLOP.items())
            print(f"For scale: LAVIS does {known} GFLOP a pair.")
    if captions:
        print(f"\n{table(CAPTION_HEADER, caption_rows(captions, size))}\n")
        print("Median (range). Ratio: seconds of transformers over hf_vlm's in the same round. Different captions:")
        print(
            "; ".join(
                f"{r['precision']} {r['search']} {r['different_captions']} of {r['batch']}" for r in captions[::2]
            )
        )
    print(flush=True)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="base", help="size of the model (default: base)")
    parser.add_argument("--batch", type=positive, help="pairs per step and images to caption (default: by size)")
    parser.add_argument("--repeats", type=positive, default=5, help="timed rounds (default: 5)")
    parser.add_argument("--only", choices=["steps", "captions"], help="one of the two parts (default: both)")
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
    for part in report.values():
        print(*(f"{name}={value}" for name, value in part.items()), flush=True)
    steps, captions = [], []
    if args.only != "captions":
        for image_size in SIZES[args.size]["batches"]:
            with tempfile.TemporaryDirectory() as folder:
                steps += measure_steps(Path(folder), args, image_size)
    if args.only != "steps":
        with tempfile.TemporaryDirectory() as folder:
            prepare_captions(Path(folder), args.size, args.batch or SIZES[args.size]["captions"])
            for precision in CAPTION_PRECISIONS:
                captions += measure_captions(Path(folder), args, precision)
    print_report(steps, captions, args.size)
    if args.output:
        write_json(args.output, report | {"steps": steps, "captions": captions})


if __name__ == "__main__":
    main(sys.argv[1:])
