"""The filter of BLIP's CapFilt (arXiv 2201.12086, section 3.3): scores image-text pairs, then keeps or flags them.

On your own pairs (a Hub dataset, a folder, parquet, jsonl, csv or tar), with synthetic captions if wanted:

    hf-vlm recipes run blip_filter --checkpoint blip-small --sources '[{path: my-pairs.parquet}]' \\
        --captioner blip-small --output_dir filtered

    datasets.load_dataset("filtered")

Without sources, a demonstration after `blip_pretrain` and `clip_pretrain`. Captions of built-in scenes are corrupted at
a known rate. The recipe prints how well the matching head and CLIP's similarity find them:

    hf-vlm recipes run blip_filter --config small

An interrupted run resumes when started again.
"""

import json
from dataclasses import asdict
from pathlib import Path

from hf_vlm.bootstrap.filter import FilterSettings, PairFilter, filter_sources
from hf_vlm.bootstrap.on_scenes import Corruption, add_results, filter_scenes, filter_table
from hf_vlm.files import write_text
from hf_vlm.runs.arguments import BlipFilterArguments, FilterSceneArguments, SourceArguments
from hf_vlm.runs.launch import launch
from hf_vlm.runs.parts import check_parts


def demonstrate(args: FilterSceneArguments, settings: FilterSettings, folder: Path) -> None:
    """Prints how well the scores find the corrupted captions, and writes it to `results.json`."""
    corruption = Corruption(args.num_scenes, args.scene_size, args.another_image, args.wrong_attribute, settings.seed)
    reports = filter_scenes(PairFilter(settings), corruption, args.clip)
    print(filter_table(reports))
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "results.json", json.dumps({"caption_filter": reports}, indent=2))
    if args.update_card:
        add_results(settings.checkpoint, {"caption_filter": reports})


def main(filter_args: BlipFilterArguments, data_args: SourceArguments, scene_args: FilterSceneArguments) -> None:
    """Filters the sources, or shows the filter at work on scenes."""
    options = {name: value for name, value in asdict(filter_args).items() if name != "output_dir"}
    settings = FilterSettings(**options, on_error=data_args.on_error)
    folder = Path(filter_args.output_dir)
    check_parts("blip_filter", {**vars(filter_args), **vars(scene_args)})
    if data_args.sources is None:
        demonstrate(scene_args, settings, folder)
        return
    totals = filter_sources(folder, data_args.sources, settings, report=data_args.report)
    print(f"Wrote {folder}: {totals['kept']} of {totals['texts']} texts of {totals['images']} images match.")
    if settings.captioner is not None:
        print(f"Of {totals['synthetic']} synthetic captions, {totals['kept_synthetic']} match.")


if __name__ == "__main__":
    launch(main)
