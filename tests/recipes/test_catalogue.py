"""The packaged recipes: what the list says, copies, and the message for a wrong name, key, option or file."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from hf_vlm.runs.catalogue import copy_recipe, find_recipe, format_recipes, load_recipes
from hf_vlm.runs.data import find_augmentation
from hf_vlm.runs.launch import launch, parse_arguments
from hf_vlm.runs.sources import check_sources
from recipes import blip_filter, clip_pretrain, llava_align

RECIPES = load_recipes()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_every_recipe_says_what_it_trains_and_needs(recipe):
    assert recipe.title.endswith(".")
    assert recipe.configs
    names = [other.name for other in RECIPES]
    for config in recipe.configs.values():
        assert config.description
        assert config.hardware
        assert config.data
        if config.after:
            assert names.index(config.after.split()[0]) < names.index(recipe.name)


def test_the_list_shows_it():
    text = format_recipes([find_recipe("clip_pretrain")])
    small, paper = text.splitlines()[2:4]
    assert text.startswith("clip_pretrain\n    CLIP pretraining (arXiv 2103.00020)")
    assert "--config small  2 CPU cores, 40 minutes; built-in emoji images" in small
    assert "--config paper  8 GPUs" in paper


def test_the_list_needs_no_torch():
    run = "from hf_vlm.cli.main import app; app(['train'], standalone_mode=False)"
    code = f"import sys; {run}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_a_copy_is_whole_and_overwrites_nothing(tmp_path):
    recipe = find_recipe("llava_instruct")
    script, *configs = copy_recipe(recipe, tmp_path / "mine")
    assert script.read_text() == recipe.path.read_text()
    assert {path.stem for path in configs} == set(recipe.configs)
    assert {path.parent for path in configs} == {tmp_path / "mine" / "llava_instruct"}
    script.unlink()
    with pytest.raises(ValueError, match="exists and is not overwritten"):
        copy_recipe(recipe, tmp_path / "mine")
    assert not script.exists()


def test_a_config_is_a_name_or_a_path(tmp_path, monkeypatch):
    recipe = find_recipe("clip_pretrain")
    monkeypatch.chdir(tmp_path)
    Path("small").mkdir()
    assert recipe.find_config("small") == recipe.path.with_suffix("") / "small.yaml"
    Path("own.yaml").write_text("image_size: 32\noutput_dir: run\n")
    for options in (["--config", "own.yaml"], ["--config=own.yaml"]):
        model_args, *_ = parse_arguments(clip_pretrain.main, [*options, "--bf16", "false"])
        assert model_args.image_size == 32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--config", "smal"], "clip_pretrain has no config 'smal'; it has small, paper. Did you mean small?"),
        (["--config", "absent.yaml"], "There is no file absent.yaml."),
        (["--config"], r"--config needs a name \(small, paper\)"),
        (
            ["--config", "small", "--lerning_rate", "1"],
            "There is no option --lerning_rate. Did you mean --learning_rate?",
        ),
        (["--config", "small", "--max_steps", "many"], "--max_steps.*invalid int value: 'many'"),
        (["--config", "small", "stray"], "'stray' belongs to no option"),
        (["--config", "small", "--sources", "7"], "'7' is not a mapping or list"),
    ],
)
def test_mistakes_on_the_command_line(options, message):
    with pytest.raises(ValueError, match=message):
        parse_arguments(clip_pretrain.main, options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lerning_rate: 1\n", "has the unknown key 'lerning_rate'. Did you mean learning_rate?"),
        ("eval_source: []\n", "has the unknown key 'eval_source'. Did you mean eval_sources?"),
        ("- 1\n", "holds list: write `key: value` lines"),
        ("image_size: [\n", "is not valid YAML: .*line 2"),
    ],
)
def test_mistakes_in_a_file(text, message, tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        parse_arguments(clip_pretrain.main, ["--config", str(path)])


def test_a_required_argument_is_named():
    with pytest.raises(ValueError, match=r"required: --vision; or give --config with a YAML file \(small, small_1.6"):
        parse_arguments(llava_align.main, [])


def test_a_recipe_refuses_arguments_that_it_does_not_use():
    with pytest.raises(ValueError, match="There is no option --eval_sources"):
        parse_arguments(llava_align.main, ["--config", "small", "--eval_sources", "[]"])


def test_lists_and_mappings_are_options_too():
    options = ["--checkpoint", "blip", "--output_dir", "out", "--sources", "[{path: my.parquet}]"]
    _, data_args, _ = parse_arguments(blip_filter.main, options)
    assert data_args.sources == [{"path": "my.parquet"}]


def test_names_within_the_data_arguments():
    with pytest.raises(ValueError, match=r"There is no augmentation 'fotos'; there are blip,.*Did you mean photo\?"):
        find_augmentation("fotos")
    with pytest.raises(ValueError, match=r"The source a\.parquet has the unknown key 'colums'.*Did you mean columns\?"):
        check_sources([{"path": "a.parquet", "colums": {}}])
    with pytest.raises(ValueError, match="sources must be a list of mappings, each with a path"):
        check_sources({"path": "a.parquet"})
    check_sources([{"path": "a.parquet", "task": "vqa"}], extra=["task"])


def test_help_shows_our_groups_before_those_of_transformers(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(clip_pretrain.main, ["--help"])
    text = capsys.readouterr().out
    order = [
        "--config",
        "--lock",
        "--augmentation",
        "--grad_cache_chunk",
        "transformers.TrainingArguments:",
        "--max_steps",
    ]
    places = [text.index(name) for name in order]
    assert places == sorted(places)


@dataclass
class Nothing:
    """No arguments."""


def test_a_users_mistake_is_one_line(capsys, monkeypatch):
    def main(args: Nothing) -> None:
        raise ValueError("The size is 7: give an even one.\nSecond line.")

    main.__annotations__["args"] = Nothing
    with pytest.raises(SystemExit) as caught:
        launch(main, [])
    assert caught.value.code == 1
    assert capsys.readouterr().err == "Error: The size is 7: give an even one. (HF_VLM_TRACEBACK=1 shows where.)\n"
    monkeypatch.setenv("HF_VLM_TRACEBACK", "1")
    with pytest.raises(ValueError, match="even one"):
        launch(main, [])
