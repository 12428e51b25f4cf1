"""BLIP-2's stages on the Hub: pushed by one process, their body loaded by id in another with no key missing."""

from pathlib import Path

import pytest
from transformers import PreTrainedModel

from cases import tiny_blip2
from hf_vlm import VlmBlip2ForConditionalGeneration, VlmBlip2ForPreTraining, VlmInstructBlipForConditionalGeneration
from hub_processes import ACCOUNTS, CARD, WRITER, Worker
from loopback_hub import LoopbackHub

STAGES = {
    VlmBlip2ForPreTraining: (None, tiny_blip2.stage1_processor, None),
    VlmBlip2ForConditionalGeneration: ("llama", tiny_blip2.stage2_processor, "<image> a red cat"),
    VlmInstructBlipForConditionalGeneration: ("opt", tiny_blip2.instruct_processor, "<image> a red cat"),
}


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory):
    """A process that may write, and one without a token."""
    folder = tmp_path_factory.mktemp("workers")
    with LoopbackHub(ACCOUNTS) as hub:
        pair = Worker(hub, folder / "writer", WRITER), Worker(hub, folder / "reader", None)
        yield pair
        for worker in pair:
            worker.close()


@pytest.mark.parametrize("head", STAGES)
def test_automodel_loads_every_stage(head: type[PreTrainedModel], workers: tuple[Worker, Worker], tmp_path: Path):
    llm, processor, text = STAGES[head]
    model = tiny_blip2.blip2_model(head, llm) if llm else tiny_blip2.blip2_model(head)
    model.save_pretrained(tmp_path)
    processor().save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text(CARD)
    writer, reader = workers
    name = f"org/{head.__name__.lower()}"
    writer.result("push_folder", tmp_path, name)
    texts = {} if text is None else {"text": text}
    missing, by_id = reader.result("body", name, **texts)
    assert missing == []
    assert [missing, by_id] == reader.result("body", tmp_path, **texts)
