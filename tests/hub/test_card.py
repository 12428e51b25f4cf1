"""Model cards: every number is one that was measured, nothing private leaks, and what the card says to run runs."""

import ast
import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from transformers import BertConfig, BertModel, BertTokenizer, TrainerCallback

from cases import tiny, tiny_blip2, tiny_llava
from hf_vlm import (
    VlmBlip2ForConditionalGeneration,
    VlmBlip2ForImageTextRetrieval,
    VlmBlip2ForPreTraining,
    VlmBlip2Model,
    VlmBlipForConditionalGeneration,
    VlmBlipForImageTextRetrieval,
    VlmBlipForPreTraining,
    VlmBlipForQuestionAnswering,
    VlmBlipModel,
    VlmClipModel,
    VlmClipProcessor,
    VlmInstructBlipForConditionalGeneration,
    VlmInstructBlipModel,
    VlmLlavaForConditionalGeneration,
    VlmLlavaModel,
    VlmTowerModel,
)
from hf_vlm.data import ContrastiveCollator, PairDataset
from hf_vlm.families import architectures
from hf_vlm.hub.cards.card import CARD_NAME, RESULTS_NAME, card_texts, escape, is_unedited, render_card, write_card
from hf_vlm.hub.cards.evaluations import EVALUATIONS
from hf_vlm.hub.record import (
    CARD_HASH,
    RECORD_NAME,
    count_parameters,
    published,
    read_record,
    training_time,
    write_record,
)
from hf_vlm.runs.arguments import ClipDataArguments, ClipModelArguments
from hf_vlm.runs.finish import finish_run
from hf_vlm.runs.provenance import own_data, own_licence, pretrained_parts
from hf_vlm.training import ContrastiveTrainer, ContrastiveTrainingArguments, add_lora, last_checkpoint

# A tiny model and processor of each type and head that cards are written for.
BLIP_HEADS = (
    VlmBlipModel,
    VlmBlipForPreTraining,
    VlmBlipForImageTextRetrieval,
    VlmBlipForConditionalGeneration,
    VlmBlipForQuestionAnswering,
)
STAGE_ONE = (VlmBlip2Model, VlmBlip2ForPreTraining, VlmBlip2ForImageTextRetrieval)
INSTRUCTED = (VlmInstructBlipModel, VlmInstructBlipForConditionalGeneration)
TALKING = (VlmLlavaModel, VlmLlavaForConditionalGeneration)
HEADS = {*BLIP_HEADS, *STAGE_ONE, VlmBlip2ForConditionalGeneration, *INSTRUCTED, *TALKING}
BASE_MODELS = {VlmBlipModel, VlmBlip2Model, VlmInstructBlipModel, VlmLlavaModel}
TEXTS = {family.model_type: card_texts(family.model_type) for family in architectures()}
BUILDERS = {
    "vlm_clip": (tiny.clip_model, tiny.clip_processor),
    **{f"vlm_blip {head.__name__}": (partial(tiny.blip_model, head), tiny.blip_processor) for head in BLIP_HEADS},
    **{
        f"vlm_blip2 {head.__name__}": (partial(tiny_blip2.blip2_model, head), tiny_blip2.stage1_processor)
        for head in STAGE_ONE
    },
    **{
        f"vlm_blip2 {head.__name__} {llm}": (partial(tiny_blip2.blip2_model, head, llm), tiny_blip2.stage2_processor)
        for head in (VlmBlip2Model, VlmBlip2ForConditionalGeneration)
        for llm in ("llama", "t5")
    },
    **{
        f"vlm_instructblip {head.__name__}": (
            partial(tiny_blip2.blip2_model, head, "llama"),
            tiny_blip2.instruct_processor,
        )
        for head in INSTRUCTED
    },
    **{
        f"vlm_llava {head.__name__}": (partial(tiny_llava.llava_model, head), tiny_llava.llava_processor)
        for head in TALKING
    },
}
ROOT = Path(__file__).resolve().parents[2]
TOKEN = "hf_" + "aBcDeFgH" * 4
# What the small recipe's parts, data and choices can carry, out of the licences that the Hub lists.
HUB_LICENCES = {"apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "ofl-1.1"}
WAYS = ("text_to_image", "image_to_text")
RECALLS = {f"{way}_r{k}": 0.1234 + k / (17 + i) for i, way in enumerate(WAYS) for k in (1, 5, 10)}
CHANCE = {key: value / 31 for key, value in RECALLS.items()}
RESULTS = {
    "retrieval": {"unseen_style": {**RECALLS, "num_images": 1357, "num_texts": 1259, "chance": CHANCE}},
    "hard_negatives": {"unseen_both": {"accuracy": 0.55432, "accuracy_colour": 0.51234, "pairs": 3219.0}},
}
RECORD = {
    "recipe": "clip_pretrain",
    "arguments": {"model": {"lock": ["text"]}, "training": {"seed": 0, "learning_rate": 0.00123, "weight_decay": None}},
    "versions": {"python": "3.11.14", "torch": "2.13.7"},
    "training": {"steps": 4801, "minutes": 39.4321, "timed_steps": 4750, "global_batch_size": 257, "device": "cpu"},
    "parameters": {"total": 45678, "trained": 12345, "parts": {"vision_model": {"total": 45678, "trained": 12345}}},
    "data": [
        {"name": "openmoji", "licence": "CC-BY-SA-4.0", "rows": {"train": 1178}, "source": "https://example.org/a_b"},
        {"name": "some/pairs", "hub_id": "some/pairs", "licence": None, "split": "train"},
    ],
    "parts": [{"part": "text", "id": "org/minilm", "hub_id": "org/minilm", "licence": "Apache-2.0"}],
    "licence": "apache-2.0",
}


def save(folder: Path, name: str = "vlm_clip") -> Path:
    """A tiny checkpoint of a type and head."""
    for build in BUILDERS[name]:
        build().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny checkpoint with record and results."""
    save(tmp_path / "clip-small")
    write_record(tmp_path / "clip-small", RECORD)
    (tmp_path / "clip-small" / RESULTS_NAME).write_text(json.dumps(RESULTS))
    return tmp_path / "clip-small"


def numbers(text: str) -> set[str]:
    """Every number in a text, without separators of thousands."""
    return {found.replace(",", "") for found in re.findall(r"\d[\d,]*(?:\.\d+)*", text)}


def values(content) -> set[str]:
    """Every number in JSON as a card may print it: whole, with one decimal or with three; those in text as they are."""
    if isinstance(content, dict):
        return set().union(*(values(part) for part in [*content.keys(), *content.values()]))
    if isinstance(content, list):
        return set().union(*map(values, content))
    if isinstance(content, bool) or content is None:
        return set()
    if isinstance(content, str):
        return numbers(content)
    whole = {f"{content:.0f}"} if content == int(content) else set()
    return whole | {f"{content:.1f}", f"{content:.3f}", str(content)}


def test_every_card_has_a_test():
    assert set(TEXTS) == {name.split()[0] for name in BUILDERS}
    heads = {name for architecture in TEXTS.values() for name in architecture.heads}
    assert heads == {head.__name__ for head in HEADS - BASE_MODELS}
    assert {family.model_type for family in architectures()} >= set(TEXTS)


@pytest.mark.parametrize("name", BUILDERS)
def test_card_without_record_or_results_claims_nothing(tmp_path, name):
    """Only the config and the processor: no section of results, training or data, no index, no licence."""
    card = ModelCard.load(write_card(save(tmp_path / "model", name)))
    metadata, model_type = card.data.to_dict(), name.split()[0]
    head = TEXTS[model_type].head({"architectures": [name.split()[min(1, len(name.split()) - 1)]]})
    assert "model-index" not in metadata
    assert not {"license", "datasets", "base_model"} & set(metadata)
    assert metadata["library_name"] == "transformers"
    assert metadata["pipeline_tag"] == head.pipeline_tag
    assert set(metadata["tags"]) >= {model_type, *head.tags}
    assert model_type in metadata["tags"]
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", card.text, flags=re.DOTALL), flags=re.MULTILINE)
    cited = ["Citation"] if TEXTS[model_type].citation else []
    assert headings == ["model", "How to use", "Licence", "Limits", *cited]


@pytest.mark.parametrize("name", BUILDERS)
def test_usage_runs(tmp_path, name, monkeypatch, capsys):
    """The card's snippet, run next to the folder and an image."""
    text = write_card(save(tmp_path / "model", name)).read_text()
    (snippet,) = re.findall(r"```python\n(.*?)\n```", text, flags=re.DOTALL)
    assert snippet.startswith("import hf_vlm")
    tiny.image().save(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) >= sum("print(" in line for line in snippet.splitlines())
    assert "nan" not in printed


def test_usage_runs_with_a_bert_text_tower(tmp_path, monkeypatch):
    """BERT's tokenizer gives token types, which a pipeline passes on."""
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *tiny.WORDS]))
    bert_tokenizer = BertTokenizer(str(tmp_path / "vocab.txt"))
    bert = BertModel(BertConfig(vocab_size=len(bert_tokenizer), **tiny.layer_sizes(width=24, heads=2)))
    model = VlmClipModel.from_parts(VlmTowerModel(tiny.tower_config()), bert, projection_dim=16)
    model.save_pretrained(tmp_path / "model")
    size = {"height": tiny.IMAGE_SIZE, "width": tiny.IMAGE_SIZE}
    VlmClipProcessor.from_parts(bert_tokenizer, size=size).save_pretrained(tmp_path / "model")
    (snippet,) = re.findall(r"```python\n(.*?)\n```", write_card(tmp_path / "model").read_text(), flags=re.DOTALL)
    tiny.image().save(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "README.md", "exec"), {})


def test_every_number_was_measured(folder):
    """What the card has beyond the card of the bare checkpoint is in the record or in the results."""
    text = write_card(folder).read_text()
    body = ModelCard(text).text
    for name in (RECORD_NAME, RESULTS_NAME, CARD_NAME):
        (folder / name).unlink()
    bare = write_card(folder).read_text()
    headings = {
        label
        for evaluation in EVALUATIONS.values()
        for label in [*evaluation.description.metrics.values(), evaluation.note]
    }
    invented = numbers(body) - numbers(bare) - values(RECORD) - values(RESULTS) - numbers(" ".join(headings))
    assert not invented
    assert "\n| chance |" in body
    shown = {f"{value:.3f}" for value in (*RECALLS.values(), *CHANCE.values(), 0.55432, 0.51234)}
    assert shown | {"39.4", "4801", "257", "1357", "3219", "45678", "1178", "0.00123", "2.13.7"} <= numbers(body)


@pytest.mark.parametrize("path", sorted((ROOT / "model_cards").glob("[!R]*.md")), ids=lambda path: path.stem)
def test_released_cards_are_whole(path):
    """The cards in the repository: the client reads them, their numbers are shown, nothing of a machine is in them."""
    card = ModelCard.load(path)
    assert card.data.license in HUB_LICENCES
    assert card.data.eval_results
    for result in card.data.eval_results:
        assert f"{result.metric_value:.3f}" in numbers(card.text)
    for heading in ("How to use", "Results", "Training", "Data", "Limits"):
        assert f"\n## {heading}\n" in card.text
    assert not re.search(r"(?<![\w.:/])(/[\w.]+){2,}|hf_[A-Za-z0-9]{16,}", card.text)


def test_table_of_released_models_is_current():
    """`docs/make_model_table.py` writes it from the cards."""
    script = [sys.executable, str(ROOT / "docs" / "make_model_table.py"), "--check"]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    table = (ROOT / "model_cards" / "README.md").read_text()
    assert all(f"]({path.name})" in table for path in (ROOT / "model_cards").glob("[!R]*.md"))


def test_changed_results_change_the_card(folder):
    before = write_card(folder).read_text()
    changed = json.loads(json.dumps(RESULTS))
    changed["retrieval"]["unseen_style"]["text_to_image_r5"] = 0.98765
    (folder / RESULTS_NAME).write_text(json.dumps(changed))
    after = write_card(folder).read_text()
    assert "0.988" not in before
    assert after.count("0.988") == 1  # in the table
    assert after.count("0.98765") == 1  # in the metadata
    assert f"{RECALLS['text_to_image_r5']:.3f}" not in after


def test_model_index_carries_the_numbers_unrounded(folder):
    """The Hub's own client reads back what was measured; the card survives being loaded and saved."""
    path = write_card(folder, "org/clip-small")
    card = ModelCard.load(path)
    metadata = yaml.safe_load(path.read_text().split("---\n")[1])
    name, found = model_index_to_eval_results(metadata["model-index"])
    assert name == "clip-small"
    expected = {("unseen_style", key): value for key, value in RECALLS.items()}
    expected |= {("unseen_both", "accuracy"): 0.55432, ("unseen_both", "accuracy_colour"): 0.51234}
    assert {(result.dataset_split, result.metric_type): result.metric_value for result in found} == expected
    assert all(a == b for a, b in zip(card.data.eval_results, found, strict=True))
    card.save(folder / "again.md")
    assert ModelCard.load(folder / "again.md").data.to_dict() == card.data.to_dict() == metadata
    assert metadata["license"] in HUB_LICENCES
    assert metadata["datasets"] == ["some/pairs"]
    assert metadata["base_model"] == ["org/minilm"]
    assert '"org/clip-small"' in card.text


def test_rows_of_a_blip(tmp_path):
    """Re-ranking, matching, grey image and majority are extra rows; only the plain numbers go into the model-index."""
    folder = save(tmp_path / "blip", "vlm_blip VlmBlipForPreTraining")
    results = {
        "retrieval": {
            "unseen_both": {**RECALLS, "chance": CHANCE, "rerank": 32, "reranked": {"text_to_image_r1": 0.71}}
        },
        "hard_negatives": {
            "unseen_both": {"accuracy": 0.61, "blind": {"accuracy": 0.41}, "itm": {"accuracy": 0.81, "pairs": 9.0}}
        },
        "caption": {"unseen_both": {"cider": 1.321, "images": 7, "blind": {"cider": 0.021}}},
        "vqa": {"unseen_both": {"vqa_accuracy": 0.62, "majority": {"vqa_accuracy": 0.32}, "questions": 8.0}},
        "caption_filter": {"unseen_both": {"roc_auc": 0.921, "pairs": 9.0, "bad": 4.0, "clip": {"roc_auc": 0.631}}},
    }
    (folder / RESULTS_NAME).write_text(json.dumps(results))
    card = ModelCard.load(write_card(folder))
    for line in (
        "| re-ranked by ITM | 0.710 |",
        "| by ITM | 0.810 |",
        "| the same with a grey image | 0.410 |",
        "| the same with a grey image |  | 0.021 |",
        "| most frequent training answer of the kind |  | 0.320 |",
        "| CLIP, threshold from validation |  |  | 0.631 |",
    ):
        assert line in card.text
    index = {result.metric_type: result.metric_value for result in card.data.eval_results}
    expected = {**RECALLS, "reranked_text_to_image_r1": 0.71, "accuracy": 0.61, "itm_accuracy": 0.81}
    assert index == expected | {"cider": 1.321, "vqa_accuracy": 0.62, "roc_auc": 0.921}
    assert {result.dataset_type for result in card.data.eval_results} == {"hf_vlm_scenes"}


def test_rows_of_a_language_model_behind_a_qformer(tmp_path):
    """Questions in both wordings, on scenes and on easy-VQA: four tables, told apart in the index too."""
    folder = save(tmp_path / "instruct", "vlm_instructblip VlmInstructBlipForConditionalGeneration")
    scores = {}
    for row, (task, test_set) in enumerate(
        [
            ("vqa", "unseen_both"),
            ("vqa_unseen_wordings", "unseen_both"),
            ("easy_vqa", "test"),
            ("easy_vqa_unseen_wordings", "test"),
        ]
    ):
        own, blind, majority = ({"vqa_accuracy": 0.611 + place / 10 + row / 100} for place in range(3))
        scores[task] = {test_set: {**own, "questions": 400.0, "blind": blind, "majority": majority}}
    (folder / RESULTS_NAME).write_text(json.dumps(scores))
    card = ModelCard.load(write_card(folder))
    for row, title in enumerate(
        (
            "Questions",
            "Questions in unseen wordings",
            "Questions of easy-VQA",
            "Questions of easy-VQA in unseen wordings",
        )
    ):
        section = card.text.split(f"### {title}\n")[1].split("\n#")[0]
        assert [f"{0.611 + place / 10 + row / 100:.3f}" in section for place in range(3)] == [True] * 3
        assert "| the same with a grey image |" in section
        assert "| most frequent training answer" in section
    index = {result.dataset_name: result.metric_value for result in card.data.eval_results}
    assert list(index.values()) == pytest.approx([0.611, 0.621, 0.631, 0.641])
    assert ["unseen wordings" in name for name in index] == [False, True] * 2


def test_cards_cite_their_papers(tmp_path):
    for name, arxiv in (("vlm_blip2 VlmBlip2ForPreTraining", "2301.12597"), ("vlm_instructblip", "2305.06500")):
        builder = next(known for known in BUILDERS if known.startswith(name))
        text = write_card(save(tmp_path / name, builder)).read_text()
        (entry,) = re.findall(r"```bibtex\n(@inproceedings\{.*?)\n```", text, flags=re.DOTALL)
        assert entry.count("{") == entry.count("}")
        assert f"eprint    = {{{arxiv}}}" in entry
        assert f"https://arxiv.org/abs/{arxiv}" in text


def test_an_evaluation_without_texts_is_shown_as_it_is(folder):
    (folder / RESULTS_NAME).write_text(json.dumps({"captioning": {"test": {"cider": 0.45678}}}))
    card = ModelCard.load(write_card(folder))
    assert "### Captioning" in card.text
    assert "0.457" in card.text
    assert [result.metric_value for result in card.data.eval_results] == [0.45678]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (RESULTS_NAME, "{", "results.json is not valid JSON"),
        (RESULTS_NAME, '{"retrieval": 3}', "results.json does not hold"),
        (RECORD_NAME, "[]", "training_record.json holds no JSON object"),
        (RECORD_NAME, '{"data": [1]}', "training_record.json: 'data'"),
        ("config.json", '{"model_type": "bert"}', "type bert, only for vlm_clip, vlm_blip"),
    ],
)
def test_broken_files_are_one_line(folder, name, content, message):
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        write_card(folder)
    assert "\n" not in str(caught.value)
    assert not (folder / "README.md").exists()


def test_text_from_outside_is_text(folder):
    """A dataset whose name is Markdown, HTML, YAML and a code fence."""
    evil = "a|b](http://x) <script>*\n---\n# h\n```\n{{ 7*7 }}: &x"
    record = {**RECORD, "recipe": evil, "data": [{"name": evil, "hub_id": evil, "licence": evil, "credit": evil}]}
    record["arguments"] = {"data": {"sources": [{"path": evil}]}}
    write_record(folder, record)
    card = ModelCard.load(write_card(folder, 'org/"; import os #'))
    assert card.data.datasets == [evil]
    body = re.sub(r"```(json|python)\n.*?\n```", "", card.text, flags=re.DOTALL)
    assert "<script" not in body.replace("\\<script", "")
    assert body.replace("](https://arxiv.org/", "").count("](http") == body.count("\\](http")
    assert not re.search(r"^(# h|```|---)$", body, flags=re.MULTILINE)
    assert "49" not in numbers(body)
    rows = [line for line in card.text.splitlines() if line.startswith("| a")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 6 for row in rows if "script" in row)
    (snippet,) = re.findall(r"```python\n(.*?)\n```", card.text, flags=re.DOTALL)
    assert not any(isinstance(node, ast.Import) and node.names[0].name == "os" for node in ast.walk(ast.parse(snippet)))
    assert escape("a_b\nc") == r"a\_b c"
    assert escape("a\x1b[2J\u202eb") == r"a\\x1b\[2J\\u202eb"


def test_what_is_published_holds_no_secrets_and_no_paths():
    given = {
        "hub_token": TOKEN,
        "push_to_hub_token": None,
        "note": f"use {TOKEN}",
        "output_dir": "/home/somebody/runs/clip",
        "cache": Path("~/cache/x/"),
        "windows": r"C:\Users\somebody\data",
        "sources": [{"path": "/data/shards/*.tar", "storage_options": {"key": "k"}}, {"path": "org/pairs"}],
        "url": "https://user:pass@host.example/a/b.tar?signature=s",
        "max_new_tokens": 5,
        "tokenizer": "wheel:minilm",
        "seed": 0,
        "bf16": False,
    }
    assert published(given) == {
        "note": "use hf_...",
        "output_dir": "clip",
        "cache": "x",
        "windows": "data",
        "sources": [{"path": "*.tar"}, {"path": "org/pairs"}],
        "url": "https://host.example/a/b.tar",
        "max_new_tokens": 5,
        "tokenizer": "wheel:minilm",
        "seed": 0,
        "bf16": False,
    }


def test_minutes_are_summed_over_the_lines_of_the_log():
    """20 samples a step: 10 steps at 100 samples a second take 2 s, then 5 at 10 take 10 s; evaluation is no line."""
    log = [
        {"step": 10, "samples_per_second": 100.0},
        {"step": 10, "eval_loss": 1.0},
        {"step": 15, "samples_per_second": 10},
    ]
    assert training_time(log, 20) == {"minutes": pytest.approx(12 / 60), "timed_steps": 15}
    assert training_time([{"step": 10, "eval_loss": 1.0}], 20) == {}


def test_parts_of_a_model_are_counted():
    """A frozen tower is counted and not trained; a head's base model is opened, as if its parts were the head's."""
    model = tiny.clip_model()
    model.lock_tower("text")
    counted = count_parameters(model)
    assert counted["total"] == sum(p.numel() for p in model.parameters())
    assert counted["parts"]["text_model"]["trained"] == 0
    assert counted["trained"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    head = torch.nn.ModuleDict({"model": model, "classifier": torch.nn.Linear(2, 3)})
    assert set(count_parameters(head)["parts"]) == {*counted["parts"], "classifier"}
    written = tiny_blip2.blip2_model(VlmBlip2ForConditionalGeneration, "llama")
    before = count_parameters(written)["parts"]
    adapted = count_parameters(add_lora(written, 2, 4))["parts"]
    assert adapted.keys() == before.keys()
    assert before["language_model"]["trained"] == 0 < adapted["language_model"]["trained"]


class StopAfter(TrainerCallback):
    """Ends a run after a step, as a user would."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def run(output: Path, steps: int, **options) -> ContrastiveTrainer:
    """The end of a recipe on a tiny model, up to a step: trains what is left, saves, writes record and card."""
    args = ContrastiveTrainingArguments(
        output_dir=str(output),
        max_steps=4,
        per_device_train_batch_size=4,
        logging_steps=1,
        save_steps=1,
        bf16=False,
        report_to="none",
        hub_token=TOKEN,
        disable_tqdm=True,
        **options,
    )
    rows = [{"image": tiny.image(seed=i), "caption": caption, "id": i} for i, caption in enumerate(tiny.CAPTIONS)]
    processor = tiny.clip_processor()
    trainer = ContrastiveTrainer(
        tiny.clip_model(),
        args,
        train_dataset=PairDataset(rows),
        data_collator=ContrastiveCollator(processor),
        processing_class=processor,
    )
    trainer.add_callback(StopAfter(steps))
    trainer.train(resume_from_checkpoint=last_checkpoint(output))
    trainer.save_model()
    data_args = ClipDataArguments(sources=[{"path": str(output.parent / "shards" / "*.tar"), "streaming": True}])
    finish_run(trainer, "clip_pretrain", ClipModelArguments(lock=["text"]), data_args)
    return trainer


def test_a_run_writes_record_and_card_and_survives_resuming(tmp_path):
    """Stopped after two of four steps, resumed, and started once more when it was finished."""
    output = tmp_path / "run"
    run(output, 2)
    half = read_record(output)
    run(output, 4)
    whole = read_record(output)
    assert (half["training"]["steps"], whole["training"]["steps"]) == (2, 4)
    assert whole["training"]["timed_steps"] == 4
    assert whole["training"]["minutes"] > half["training"]["minutes"] > 0
    assert whole["training"]["global_batch_size"] == 4
    assert whole["arguments"]["training"]["learning_rate"] == 5e-5
    assert whole["arguments"]["model"]["lock"] == ["text"]
    assert set(whole["versions"]) >= {"python", "torch", "transformers", "datasets", "hf_vlm"}
    (output / RESULTS_NAME).write_text(json.dumps(RESULTS))
    run(output, 4, learning_rate=0.5)
    again = read_record(output)
    assert again.pop(CARD_HASH) != whole.pop(CARD_HASH)
    assert again == whole  # nothing was trained: the record is the same
    assert is_unedited(output)
    text = (output / "README.md").read_text()
    assert "0.554" in text  # but the results are the last evaluation's
    written = text + (output / RECORD_NAME).read_text()
    assert TOKEN not in written
    assert "hub_token" not in written
    assert str(tmp_path) not in written
    assert os.path.expanduser("~") + "/" not in written
    assert '"path": "*.tar"' in written


def test_an_edited_card_is_kept(tmp_path, caplog):
    """By a run that goes on in its folder; the record is written all the same."""
    output = tmp_path / "run"
    run(output, 2)
    assert is_unedited(output)
    edited = (output / CARD_NAME).read_text() + "More.\n"
    (output / CARD_NAME).write_text(edited)
    run(output, 4)
    assert (output / CARD_NAME).read_text() == edited
    assert "has been edited and is kept" in caplog.text
    assert read_record(output)["training"]["steps"] == 4
    assert not is_unedited(output)
    (output / CARD_NAME).unlink()
    run(output, 4)
    assert "More." not in (output / CARD_NAME).read_text()
    assert is_unedited(output)


def test_a_card_without_a_hash_is_replaced_only_if_it_is_what_would_be_written(folder):
    """Records of earlier versions have none."""
    path = write_card(folder)
    write_record(folder, RECORD)
    assert is_unedited(folder)
    (folder / RESULTS_NAME).write_text("{}")
    before = path.read_text()
    assert not is_unedited(folder)
    assert write_card(folder).read_text() == before != render_card(folder)
    assert read_record(folder).get(CARD_HASH) is None


def test_training_anew_in_the_same_folder_is_recorded(tmp_path):
    output = tmp_path / "run"
    run(output, 2)
    first = read_record(output)
    for checkpoint in output.glob("checkpoint-*"):
        checkpoint.rename(tmp_path / checkpoint.name)
    run(output, 2, learning_rate=0.5)
    assert read_record(output)["arguments"]["training"]["learning_rate"] == 0.5
    assert first["arguments"]["training"]["learning_rate"] == 5e-5


def test_where_parts_come_from(tmp_path):
    """Wheels have a licence, Hub models a commit and what their cached card says, folders a name."""
    cached = Path(os.environ["HF_HOME"]) / "hub" / "models--org--tower"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("abc123")
    snapshot = cached / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    (tmp_path / "bert").mkdir()
    wheel, folder = pretrained_parts({"vision": None, "text": "wheel:minilm", "tokenizer": str(tmp_path / "bert")})
    assert wheel["hub_id"] == "sentence-transformers/all-MiniLM-L6-v2"
    assert wheel["licence"].startswith("Apache-2.0")
    assert folder == {"part": "tokenizer", "id": "bert"}
    (tmp_path / "bert" / "training_record.json").write_text('{"licence": "mit"}')
    (trained,) = pretrained_parts({"model": str(tmp_path / "bert")})
    assert trained == {"part": "model", "id": "bert", "licence": "mit"}
    write_record(tmp_path / "bert", {"licence": "mit", "parts": [{**wheel, "part": "language_model"}]})
    stage, inner = pretrained_parts({"model": str(tmp_path / "bert")})
    assert stage == {"part": "model", "id": "bert", "licence": "mit"}
    assert inner == {**wheel, "part": "language_model of bert"}
    assert pretrained_parts({"vision": str(tmp_path / "bert")}) == [{"part": "vision", "id": "bert", "licence": "mit"}]
    (llm,) = pretrained_parts({"language_model": "wheel:smollm2"})
    assert (llm["part"], llm["hub_id"]) == ("language_model", "HuggingFaceTB/SmolLM2-135M-Instruct")
    assert llm["licence"] == "Apache-2.0"
    assert own_licence([stage, inner, llm]) == "apache-2.0"
    (known,) = pretrained_parts({"vision": "org/tower"})
    assert known == {
        "part": "vision",
        "id": "org/tower",
        "hub_id": "org/tower",
        "revision": "abc123",
        "licence": "cc-by-4.0",
    }
    (unknown,) = pretrained_parts({"text": "org/never-seen"})
    assert (unknown["revision"], unknown["licence"]) == (None, None)


def test_where_data_come_from(tmp_path):
    (tmp_path / "a.parquet").touch()
    found = own_data(
        [{"path": str(tmp_path / "a.parquet")}, {"path": "org/pairs", "revision": "v1"}], [{"path": "b.tar"}]
    )
    assert found == [
        {"name": "a.parquet", "use": "train", "split": "train"},
        {
            "name": "org/pairs",
            "use": "train",
            "split": "train",
            "hub_id": "org/pairs",
            "licence": None,
            "revision": "v1",
        },
        {"name": "b.tar", "use": "validation", "split": "train"},
    ]
