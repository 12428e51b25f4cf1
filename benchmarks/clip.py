"""Speed and memory of a CLIP training step: this package against transformers' CLIPModel and open_clip, in one run.

    python benchmarks/clip.py
    python benchmarks/clip.py --size small --batch 64 --repeats 9 --output benchmarks/results/clip.json

Every contender has the same weights (converted exactly; losses are compared before timing), images, captions, autocast
for bf16 and fused AdamW. Each is used as its users use it: transformers with captions padded to the longest of the
batch, with SDPA and with eager attention; open_clip with captions padded to 77 and its own loss. Contenders take turns,
one step each per round. Close other programs: wide ranges in the output mean a busy machine. At the default size a run
takes about five minutes on two cores, with 4 GB of memory per contender.
"""

import argparse
import math
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import (
    DTYPES,
    Spread,
    TrainingStep,
    Worker,
    environment,
    interleave,
    matmul_peak,
    positive,
    summary,
    table,
    write_json,
)
from peers import DISCLOSURE, import_open_clip, needs_stubs
from safetensors.torch import load_file, save_file

OPEN_CLIP_LENGTH = 77
GOALS = {"transformers": 1.1, "transformers_eager": 1.1, "open_clip": 1.5}
PACKAGES = ("hf-vlm", "transformers", "open_clip_torch")
LOSS_TOLERANCE = 1e-4
HEADER = "precision contender forward+backward step ratio goal GFLOP of_peak of_peak_step memory".split()

# The head width is 64, as in open_clip. "base" is ViT-B/32.
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"vision": (64, 2, 32, 16), "text": (64, 2), "vocab": 512, "projection": 64, "batch": 4},
    "small": {"vision": (384, 12, 112, 16), "text": (256, 8), "vocab": 49408, "projection": 256, "batch": 32},
    "base": {"vision": (768, 12, 224, 32), "text": (512, 12), "vocab": 49408, "projection": 512, "batch": 16},
}


def make_config(size: str, hidden_act: str):
    """The config of this package for a size; the other contenders' configs are derived from it."""
    from hf_vlm import VlmClipConfig

    (vision_width, vision_layers, image_size, patch_size), (width, layers) = SIZES[size]["vision"], SIZES[size]["text"]
    vocab_size = SIZES[size]["vocab"]
    return VlmClipConfig(
        vision_config={
            "hidden_size": vision_width,
            "intermediate_size": 4 * vision_width,
            "num_hidden_layers": vision_layers,
            "num_attention_heads": vision_width // 64,
            "image_size": image_size,
            "patch_size": patch_size,
            "hidden_act": hidden_act,
        },
        text_config={
            "vocab_size": vocab_size,
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": width // 64,
            "max_position_embeddings": OPEN_CLIP_LENGTH,
            "hidden_act": hidden_act,
            "bos_token_id": vocab_size - 2,
            "eos_token_id": vocab_size - 1,
            "pad_token_id": vocab_size - 1,
        },
        projection_dim=SIZES[size]["projection"],
        logit_scale_init_value=math.log(100),  # as in a trained model: the loss is sensitive to small differences
    )


def make_batch(config, batch: int) -> dict[str, torch.Tensor]:
    """Images and captions of 6 to 20 tokens, most of them near 12 as one-sentence captions are.

    Returns:
        `pixel_values`, `input_ids` and `attention_mask` padded to the longest caption, and `padded_ids` of 77 tokens.
    """
    generator = torch.Generator().manual_seed(0)
    text, side = config.text_config, config.vision_config.image_size
    lengths = (12.5 + 3.0 * torch.randn(batch, generator=generator)).round().long().clamp(6, 20)
    positions = torch.arange(OPEN_CLIP_LENGTH)
    tokens = torch.randint(text.bos_token_id, (batch, OPEN_CLIP_LENGTH), generator=generator)
    tokens[:, 0] = text.bos_token_id
    tokens[positions == lengths[:, None] - 1] = text.eos_token_id
    is_token, longest = positions < lengths[:, None], int(lengths.max())
    return {
        "pixel_values": torch.randn(batch, 3, side, side, generator=generator),
        "input_ids": torch.where(is_token, tokens, text.pad_token_id)[:, :longest].contiguous(),
        "attention_mask": is_token[:, :longest].long().contiguous(),
        "padded_ids": torch.where(is_token, tokens, 0),  # open_clip pads with 0
    }


def prepare(folder: Path, size: str, batch: int, hidden_act: str) -> None:
    """Writes the batch, and the weights in each contender's layout, for the child processes."""
    from hf_vlm import VlmClipModel
    from hf_vlm.hub.convert import to_transformers
    from hf_vlm.hub.convert.open_clip import NAMES, transposed
    from hf_vlm.hub.convert.state_dict import rename

    torch.manual_seed(0)
    model = VlmClipModel(make_config(size, hidden_act))
    model.save_pretrained(folder / "hf_vlm")
    to_transformers(model).save_pretrained(folder / "transformers")
    original = transposed(rename(model.state_dict(), NAMES))
    original["logit_scale"] = original["logit_scale"].reshape(())
    save_file({name: tensor.contiguous() for name, tensor in original.items()}, folder / "open_clip.safetensors")
    save_file(make_batch(model.config, batch), folder / "batch.safetensors")


def load_batch(folder: Path, device: str) -> dict[str, torch.Tensor]:
    """The batch on the device."""
    return {name: tensor.to(device) for name, tensor in load_file(folder / "batch.safetensors").items()}


def build_hf_vlm(folder: Path, size: str, hidden_act: str, device: str, precision: str) -> TrainingStep:
    """This package's model."""
    from hf_vlm import VlmClipModel

    model, batch = VlmClipModel.from_pretrained(folder / "hf_vlm"), load_batch(folder, device)
    del batch["padded_ids"]
    return TrainingStep(model, lambda: model(**batch, return_loss=True).loss, device, precision)


def build_transformers(
    folder: Path, size: str, hidden_act: str, device: str, precision: str, attention: str = "sdpa"
) -> TrainingStep:
    """transformers' CLIPModel with its default attention."""
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(folder / "transformers", attn_implementation=attention)
    batch = load_batch(folder, device)
    del batch["padded_ids"]
    return TrainingStep(model, lambda: model(**batch, return_loss=True).loss, device, precision)


def build_transformers_eager(*options: Any) -> TrainingStep:
    """transformers' CLIPModel with eager attention, which is faster than SDPA on some machines."""
    return build_transformers(*options, attention="eager")


def build_open_clip(folder: Path, size: str, hidden_act: str, device: str, precision: str) -> TrainingStep:
    """open_clip's CLIP and ClipLoss."""
    open_clip = import_open_clip()
    vision_width, vision_layers, image_size, patch_size = SIZES[size]["vision"]
    width, layers = SIZES[size]["text"]
    vision = {"width": vision_width, "layers": vision_layers, "image_size": image_size, "patch_size": patch_size}
    text = {"width": width, "layers": layers, "heads": width // 64, "vocab_size": SIZES[size]["vocab"]}
    quick_gelu = hidden_act == "quick_gelu"
    model = open_clip.CLIP(SIZES[size]["projection"], vision_cfg=vision, text_cfg=text, quick_gelu=quick_gelu)
    model.load_state_dict(load_file(folder / "open_clip.safetensors"))
    batch, clip_loss = load_batch(folder, device), open_clip.ClipLoss()

    def loss() -> torch.Tensor:
        return clip_loss(*model(batch["pixel_values"], batch["padded_ids"]))

    return TrainingStep(model, loss, device, precision)


BUILDERS: dict[str, Callable[..., TrainingStep]] = {
    "hf_vlm": build_hf_vlm,
    "transformers": build_transformers,
    "transformers_eager": build_transformers_eager,
    "open_clip": build_open_clip,
}


def check_losses(losses: dict[str, float]) -> None:
    """Prints the losses of the same weights, and ends the run if they differ by more than rounding."""
    own = losses["hf_vlm"]
    differences = {name: abs(loss - own) for name, loss in losses.items() if name != "hf_vlm"}
    shown = "".join(f"; {name} differs by {difference:.1e}" for name, difference in differences.items())
    print(f"Loss in fp32 before training: hf_vlm {own:.6f}{shown}", flush=True)
    if max(differences.values(), default=0.0) > LOSS_TOLERANCE:
        raise SystemExit("The contenders do not compute the same loss: nothing is timed.")


def measure(folder: Path, args: argparse.Namespace, precision: str, missing: dict[str, str]) -> list[dict[str, Any]]:
    """One precision: starts the contenders, compares their losses, times them in turn, counts FLOPs."""
    options = (folder, args.size, args.hidden_act, args.device, precision)
    workers = {name: Worker(BUILDERS[name], *options) for name in ("hf_vlm", *args.peers) if name not in missing}
    for name in list(workers):
        try:
            workers[name].wait()
        except ImportError as error:
            missing[name] = str(error)
            del workers[name]
    check_losses({name: worker.ask(TrainingStep.float32_loss) for name, worker in workers.items()})
    peak = matmul_peak(args.device, precision)
    times = interleave(workers, args.repeats, precision)
    peak = max(peak, matmul_peak(args.device, precision))
    results = []
    for name, worker in workers.items():
        memory, flops = worker.ask(TrainingStep.peak_memory), worker.ask(TrainingStep.flops)
        worker.close()
        result = {"precision": precision, "contender": name, "matmul_peak_flops_per_second": peak, "flops": flops}
        results.append(result | summary(times[name], times["hf_vlm"]) | {"peak_memory_bytes": memory})
    return results


def row(result: dict[str, Any]) -> list[str]:
    """A result as a row of the table."""
    name, flops, peak = result["contender"], result["flops"], result["matmul_peak_flops_per_second"]
    forward_backward, step = Spread(**result["forward_backward_seconds"]), Spread(**result["step_seconds"])
    ratio, goal = Spread(**result["step_ratio"]), GOALS.get(name)
    return [
        result["precision"],
        name,
        str(forward_backward),
        str(step),
        "" if goal is None else str(ratio),
        "" if goal is None else f"{goal:.2f} {'reached' if ratio.median >= goal else 'missed'}",
        f"{flops / 1e9:.1f}",
        f"{flops / forward_backward.median / peak:.0%}",
        f"{flops / step.median / peak:.0%}",
        f"{result['peak_memory_bytes'] / 2**30:.2f} GiB",
    ]


def print_report(results: list[dict[str, Any]], missing: dict[str, str]) -> None:
    """Prints the table and its legend."""
    absent = [["", name, "not measured", *[""] * (len(HEADER) - 3)] for name in missing]
    print(f"\n{table([name.replace('_', ' ') for name in HEADER], [*map(row, results), *absent])}\n")
    print("Seconds: median (range). Ratio: seconds of a step over hf_vlm's in the same round. Of peak: FLOPs over")
    print("seconds of forward+backward (and of the step) over the best matrix product measured in this run:")
    for result in results:
        if result["contender"] == "hf_vlm":
            print(f"{result['precision']}: {result['matmul_peak_flops_per_second'] / 1e12:.3f} TFLOP/s")
    for name, reason in missing.items():
        print(f"{name} was not measured: {reason}")


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="base", help="sizes of the towers (default: base)")
    parser.add_argument("--batch", type=positive, help="pairs per step (default: 16 for base, 32 for small)")
    parser.add_argument(
        "--repeats", type=positive, default=7, help="timed rounds, at least 5 for a reliable median (default: 7)"
    )
    parser.add_argument("--peers", nargs="*", choices=list(GOALS), default=list(GOALS), help="default: all")
    parser.add_argument("--precision", nargs="+", choices=DTYPES, default=list(DTYPES), help="default: both")
    parser.add_argument("--hidden-act", choices=["quick_gelu", "gelu"], default="quick_gelu", help="activation")
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
    args.batch = args.batch or SIZES[args.size]["batch"]
    missing: dict[str, str] = {}
    settings = {name: value for name, value in vars(args).items() if name != "output"}
    report: dict[str, Any] = {"settings": settings, "environment": environment(args.device, PACKAGES)}
    for part in report.values():
        print(*(f"{name}={value}" for name, value in part.items()))
    if "open_clip" in args.peers and needs_stubs():
        print(DISCLOSURE)
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), args.size, args.batch, args.hidden_act)
        results = [result for each in args.precision for result in measure(Path(folder), args, each, missing)]
    print_report(results, missing)
    if args.output:
        write_json(args.output, report | {"results": results, "missing": missing})


if __name__ == "__main__":
    main(sys.argv[1:])
