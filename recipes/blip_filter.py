"""The filter of BLIP's CapFilt (arXiv 2201.12086, section 3.3): image-text pairs are scored, and kept or flagged.

Your own pairs (a Hub data set, a folder, parquet, jsonl, csv, tar), with synthetic captions beside them if you like:

    python recipes/blip_filter.py --checkpoint blip-small --sources '[{path: my-pairs.parquet}]' \\
        --captioner blip-small --output_dir filtered

    datasets.load_dataset("filtered")

Without sources, the demonstration after `blip_pretrain.py` and `clip_pretrain.py`: scenes whose captions are corrupted
at a known rate, and how well the matching head finds the bad ones, beside CLIP's similarity:

    python recipes/blip_filter.py --config recipes/blip_filter/small.yaml

A stopped run continues when started again.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from trl import TrlParser

from hf_vlm.bootstrap.filter import FilterSettings, PairFilter, filter_sources
from hf_vlm.bootstrap.on_scenes import Corruption, add_results, filter_scenes, filter_table


@dataclass
class FilterArguments:
    """The models, and what becomes of the pairs."""

    checkpoint: str = field(metadata={"help": "Folder or Hub id of a BLIP with a matching head, which filters."})
    output_dir: str = field(metadata={"help": "Folder of what is written."})
    captioner: str | None = field(default=None, metadata={"help": "BLIP that writes synthetic captions as well."})
    action: str = field(default="keep", metadata={"help": "keep writes what matches, flag everything."})
    threshold: float = field(default=0.5, metadata={"help": "Smallest probability of a match that is kept."})
    itc: bool = field(default=False, metadata={"help": "Also give the similarity of the embeddings."})
    prompt: str | None = field(default=None, metadata={"help": "What synthetic captions begin with."})
    shard_rows: int = field(default=1000, metadata={"help": "Rows of a source for each file that is written."})
    bf16: bool = field(default=False, metadata={"help": "Compute in bfloat16."})
    seed: int = field(default=0, metadata={"help": "Decides synthetic captions and corruptions."})


@dataclass
class DataArguments:
    """Where the pairs come from."""

    sources: str | None = field(
        default=None, metadata={"help": "List of data sources (path, split, columns, ...); none: the demonstration."}
    )
    on_error: str = field(default="raise", metadata={"help": "raise or skip broken rows."})


@dataclass
class DemonstrationArguments:
    """The scenes with corrupted captions."""

    clip: str | None = field(default=None, metadata={"help": "CLIP to compare with."})
    num_scenes: int = field(default=1000, metadata={"help": "Scenes of each test set."})
    scene_size: int = field(default=128, metadata={"help": "Side of a scene in pixels."})
    another_image: float = field(default=0.2, metadata={"help": "Share of captions that are another image's."})
    wrong_attribute: float = field(default=0.2, metadata={"help": "Share of captions with one wrong attribute."})
    update_card: bool = field(default=False, metadata={"help": "Add the numbers to the card of the checkpoint."})


def demonstrate(args: DemonstrationArguments, settings: FilterSettings, folder: Path) -> None:
    """Prints how well the scores find the bad captions, and writes it to `results.json`."""
    corruption = Corruption(args.num_scenes, args.scene_size, args.another_image, args.wrong_attribute, settings.seed)
    reports = filter_scenes(PairFilter(settings), corruption, args.clip)
    print(filter_table(reports))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps({"caption_filter": reports}, indent=2))
    if args.update_card:
        add_results(settings.checkpoint, {"caption_filter": reports})


def main(filter_args: FilterArguments, data_args: DataArguments, demonstration_args: DemonstrationArguments) -> None:
    """Filters the sources, or shows the filter at work on scenes."""
    options = {name: value for name, value in vars(filter_args).items() if name != "output_dir"}
    settings = FilterSettings(**options, on_error=data_args.on_error)
    folder = Path(filter_args.output_dir)
    if data_args.sources is None:
        demonstrate(demonstration_args, settings, folder)
        return
    sources = data_args.sources if isinstance(data_args.sources, list) else yaml.safe_load(data_args.sources)
    totals = filter_sources(folder, sources, settings)
    print(f"Wrote {folder}: of {totals['texts']} texts of {totals['images']} images, {totals['kept']} match.")
    if settings.captioner is not None:
        print(f"Of these, synthetic: {totals['synthetic']}, of which {totals['kept_synthetic']} match.")


if __name__ == "__main__":
    main(*TrlParser((FilterArguments, DataArguments, DemonstrationArguments)).parse_args_and_config())
