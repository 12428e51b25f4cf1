"""LLaVA: speed, FLOPs and memory of instruction tuning, speed of answers, and latency of a second turn, in one run.

    python benchmarks/llava.py
    python benchmarks/llava.py --only training --samples 16 --output benchmarks/results/llava.json
    python benchmarks/llava.py --small          # tiny models: a test of the program, in seconds

*Training* (second stage: projector and LLM are trainable, the tower is frozen): conversations of 1 to 3 questions whose
answers have 8 to 300 words in total; four in five have an image. All contenders use the same conversations per step.

- This package: packed rows and, for comparison, padded rows.
- transformers' LlavaForConditionalGeneration with the same weights (converted), trained by TRL's SFTTrainer with
  `assistant_only_loss=True` and TRL's collator: in data order and, at its best, grouped by length.
- Timed: each trainer's `compute_loss` (`VlmSFTTrainer`, `SFTTrainer`) and backward for each micro-batch, and fused
  AdamW. Batches are collated before. bf16 autocast, SDPA.
- TRL's default of activation checkpointing is off, which makes TRL faster; `--checkpointing` enables it for all.
- Without Triton, TRL computes logits (and entropies for its log) at all positions; its loss covers answers only.
- Losses must be equal in fp32, or nothing is timed. Rates count the tokens of images and texts without padding.

*Answers*: several images at once with one question each, greedy, with a fixed number of tokens, against transformers'
class on the same left-padded batch. The tokens must be equal in fp32; for bf16 the table shows the share of equal ones.
With random weights the logits are close together, so answers diverge early.

*Second turn*: another question about the image after a first answer. This package reuses the image features and the
key/value cache of the first turn. transformers gets the whole conversation and the image again, as documented, and, at
its best, the cache but not the image.

Contenders take turns, one step each per round, in separate processes, so that peak memory is measured per contender.
TRL's two variants share a process, and so do those of transformers' second turn; its peak is printed once. Close other
programs: wide ranges in the output mean a busy machine. The default size is an LLM like SmolLM2-135M behind a ViT-S/16
in CLIP's layout at 224 pixels (196 tokens per image), with random weights. As in larger models, the LLM dominates. With
8 conversations per step, 4 per micro-batch, a run takes about ten minutes on two cores, with up to 6.5 GB for each of
three processes.
"""

import argparse
import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from blip import PACKAGES, same_share, verdict
from blip2 import NATIVE, OWN, gibibytes, measure_steps, start
from harness import Spread, environment, interleave, positive, table, write_json
from llava_answers import Answer, Speaker, build_answers, build_native_turn, build_own_turn
from llava_contenders import SIZES, Batches, Learner, build_native, build_own, prepare

PADDED, GROUPED = "hf_vlm, padded", "transformers, by length"
CACHED = "transformers, cache kept"
PARTS = ("training", "answers", "second_turn")
TRAINING_PRECISION, PRECISIONS = "bf16", ("fp32", "bf16")
SPEED_GOAL, MEMORY_GOAL, ANSWER_GOAL = 1.3, 1.33, 1.0  # the second: three quarters of the memory
TRAINING_HEADER = "contender,padding,GFLOP a token,ratio,tokens a second,ratio,goal,memory,ratio,goal".split(",")
ANSWER_HEADER = "precision,contender,first token,ratio,last token,ratio,goal,tokens a second,same tokens,memory".split(
    ","
)


def measure_training(folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Steps of every contender: compares their losses, times them in turn, counts FLOPs."""
    batches = Batches(args.size, args.samples, args.micro_batch, args.checkpointing)
    builders = {
        OWN: partial(build_own, name=OWN, batches=batches, packed=True),
        PADDED: partial(build_own, name=PADDED, batches=batches, packed=False),
        NATIVE: partial(build_native, name=NATIVE, batches=batches, grouped=GROUPED),
    }
    workers = start(builders, folder, args, TRAINING_PRECISION)
    counts = {}
    for worker in workers.values():
        counts |= worker.ask(Learner.counts)
    if len({(count["tokens"], count["supervised"]) for count in counts.values()}) > 1:
        raise SystemExit(f"The contenders do not learn the same tokens: {counts}. Nothing is timed.")
    results = measure_steps("training", TRAINING_PRECISION, workers, args, args.samples)
    for result in results:
        result |= counts[result["contender"]]
        seconds, tokens = result["step_seconds"], result["tokens"]
        rates = {"low": tokens / seconds["high"], "high": tokens / seconds["low"]}
        result["tokens_per_second"] = {"median": tokens / seconds["median"], **rates}
    return results


def measure_answers(folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Answers about several images in each precision."""
    build = partial(build_answers, size=args.size, images=args.images)
    builders = {OWN: partial(build, name=OWN, native=False), NATIVE: partial(build, name=NATIVE, native=True)}
    return measure_speakers("answers", builders, folder, args)


def measure_second_turn(folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A second answer about an image in each precision."""
    builders = {
        OWN: partial(build_own_turn, name=OWN, size=args.size),
        NATIVE: partial(build_native_turn, name=NATIVE, cached=CACHED, size=args.size),
    }
    return measure_speakers("second turn", builders, folder, args)


def measure_speakers(
    part: str, builders: dict[str, Any], folder: Path, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Answering contenders in each precision: times them in turn, compares their tokens."""
    results = []
    for precision in PRECISIONS:
        workers = start(builders, folder, args, precision)
        rounds = interleave(workers, args.repeats, f"{part}, {precision}", Speaker.run)
        answers = {way: [each[way] for each in found] for found in rounds.values() for way in found[0]}
        memory = {}
        for name, worker in workers.items():
            memory[name] = worker.ask(Speaker.peak_memory)
            worker.close()
        for way, found in answers.items():
            result = {"part": part, "precision": precision, "contender": way, **compare(found, answers[OWN])}
            results.append(result | {"peak_memory_bytes": memory.get(way)})
            if precision == "fp32" and result["same_tokens"] < 1:
                raise SystemExit(f"{way} answers otherwise: only {result['same_tokens']:.0%} of the tokens are equal.")
    return results


def compare(answers: list[Answer], own: list[Answer]) -> dict[str, Any]:
    """Seconds and tokens of an answering contender by round, and its ratio to ours."""
    tokens, pairs = own[-1].tokens, list(zip(answers, own, strict=True))
    count = sum(map(len, tokens))
    return {
        "batch": len(tokens),
        "first_seconds": vars(Spread.of(each.first for each in answers)),
        "first_ratio": vars(Spread.of(a.first / b.first for a, b in pairs)),
        "seconds": vars(Spread.of(each.whole for each in answers)),
        "ratio": vars(Spread.of(a.whole / b.whole for a, b in pairs)),
        "tokens_per_second": vars(Spread.of(count / each.whole for each in answers)),
        "same_tokens": same_share(tokens, answers[-1].tokens),
        "different_answers": len({tuple(row) for row in tokens}),
    }


def training_rows(results: list[dict[str, Any]], size: str) -> list[list[str]]:
    """The steps' results as rows of the table."""
    rows, own = [], results[0]
    for result in results:
        name, ratio = result["contender"], Spread(**result["step_ratio"])
        memory, flops = result["peak_memory_bytes"], result["flops"]
        row = [name, f"{1 - result['tokens'] / result['positions']:.0%}", f"{flops / result['tokens'] / 1e9:.3g}"]
        row.append("" if name == OWN else f"{flops / own['flops']:.2f}")
        rate = Spread(**result["tokens_per_second"])
        row.append(f"{rate.median:.0f} ({rate.low:.0f}-{rate.high:.0f})")
        row.append("" if name == OWN else str(ratio))
        row.append(verdict(SPEED_GOAL, ratio.median, size) if name == NATIVE else "")
        more = 0.0 if memory is None else memory / own["peak_memory_bytes"]
        row += [gibibytes(memory), "" if name == OWN or memory is None else f"{more:.2f}"]
        row.append(verdict(MEMORY_GOAL, more, size) if name == NATIVE else "")
        rows.append(row)
    return rows


def answer_rows(results: list[dict[str, Any]], size: str) -> list[list[str]]:
    """The answering results as rows of the table."""
    rows = []
    for result in results:
        is_own = result["contender"] == OWN
        row = [result["precision"], result["contender"]]
        for seconds, ratio in (("first_seconds", "first_ratio"), ("seconds", "ratio")):
            row += [str(Spread(**result[seconds])), "" if is_own else str(Spread(**result[ratio]))]
        judged = result["part"] == "answers" and not is_own
        row.append(verdict(ANSWER_GOAL, result["ratio"]["median"], size) if judged else "")
        row.append(f"{result['tokens_per_second']['median']:.1f}")
        row.append("" if is_own else f"{result['same_tokens']:.0%}")
        rows.append([*row, gibibytes(result["peak_memory_bytes"])])
    return rows


def print_training(results: list[dict[str, Any]], size: str) -> None:
    """Prints the table of the steps and its legend."""
    own = results[0]
    print(f"\n{table(TRAINING_HEADER, training_rows(results, size))}\n")
    print(f"Median (range) of {own['batch']} conversations per step: {own['tokens']} tokens without padding,")
    print(f"{own['supervised']} supervised. Padding: share of the LLM's positions. Ratios: FLOPs, seconds in the same")
    print("round and memory, over hf_vlm's; above 1 means that hf_vlm needs less.\n", flush=True)


def print_answers(results: list[dict[str, Any]], size: str) -> None:
    """Prints the table of a part with answers and its legend."""
    print(f"\n{results[0]['part'].capitalize()}, {results[0]['batch']} at once\n")
    print(f"{table(ANSWER_HEADER, answer_rows(results, size))}\n")
    print("Seconds to the first and last token, median (range). Ratios: over hf_vlm's in the same round. Different")
    print(f"answers: {', '.join(str(r['different_answers']) for r in results if r['contender'] == OWN)}\n", flush=True)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line, with the defaults of the size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    small = "tiny models, to see whether the program runs"
    parser.add_argument("--small", dest="size", action="store_const", const="small", default="base", help=small)
    parser.add_argument("--samples", type=positive, help="conversations per step (default: 8)")
    parser.add_argument("--micro-batch", type=positive, help="conversations per micro-batch (default: 4)")
    parser.add_argument("--checkpointing", action="store_true", help="use activation checkpointing")
    parser.add_argument("--images", type=positive, help="images per batch of questions (default: 4, with --small 2)")
    parser.add_argument("--repeats", type=positive, default=5, help="timed rounds (default: 5)")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS, help="parts to run (default: all)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=positive, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--output", type=Path, help="JSON file to write (default: none)")
    args = parser.parse_args(arguments)
    for name, value in {**SIZES[args.size]["steps"], **SIZES[args.size]["answers"]}.items():
        if vars(args).get(name) is None:
            setattr(args, name, value)
    return args


def main(arguments: list[str]) -> None:
    """Runs the comparison."""
    args = parse(arguments)
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # no bars for loading weights, here and in the children
    if args.threads:
        torch.set_num_threads(args.threads)
    settings = {name: value for name, value in vars(args).items() if name != "output"}
    report: dict[str, Any] = {"settings": settings, "environment": environment(args.device, (*PACKAGES, "trl"))}
    for values in report.values():
        print(*(f"{name}={value}" for name, value in values.items()), flush=True)
    measures = {"training": measure_training, "answers": measure_answers, "second_turn": measure_second_turn}
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), args.size)
        for name in (name for name in PARTS if name in args.only):
            report[name] = measures[name](Path(folder), args)
            (print_training if name == "training" else print_answers)(report[name], args.size)
            if args.output:  # after each part, so that a later failure does not lose these results
                write_json(args.output, report)


if __name__ == "__main__":
    main(sys.argv[1:])
