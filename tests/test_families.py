"""A sixth family: what must be added for one, and that everything knows it then.

The test adds a throw-away architecture to a copy of the package: three new files in `models/`, one with the
texts of its card, and edits of existing files, which are counted.
"""

import filecmp
import os
import shutil
import subprocess
import sys
from pathlib import Path

import hf_vlm

PACKAGE = Path(hf_vlm.__file__).parent
MOST_EDITED = 4

NEW_FILES = {
    "models/configuration_toy.py": '''"""Configuration of the toy."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .configuration_tower import VlmTowerConfig


@strict
class VlmToyConfig(PreTrainedConfig):
    """Configuration of [`VlmToyModel`]."""

    model_type = "vlm_toy"
    sub_configs_defaults = {"vision_config": VlmTowerConfig}

    vision_config: dict | PreTrainedConfig | None = None
    vocab_size: int = 64


__all__ = ["VlmToyConfig"]
''',
    "models/modeling_toy.py": '''"""The toy: an image tower and a bag of words."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from .configuration_toy import VlmToyConfig
from .modeling_tower import VlmTowerModel


@dataclass
class VlmToyOutput(ModelOutput):
    """Similarities."""

    logits_per_image: torch.FloatTensor | None = None


class VlmToyModel(PreTrainedModel):
    """An image tower and a bag of words."""

    config: VlmToyConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"

    def __init__(self, config: VlmToyConfig):
        super().__init__(config)
        self.vision_model = VlmTowerModel._from_config(config.vision_config)
        self.words = nn.Embedding(config.vocab_size, config.vision_config.hidden_size)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight)

    def get_image_features(self, pixel_values):
        """Images as vectors."""
        return BaseModelOutputWithPooling(pooler_output=self.vision_model(pixel_values=pixel_values).pooler_output)

    def get_text_features(self, input_ids, attention_mask=None):
        """Texts as vectors."""
        return BaseModelOutputWithPooling(pooler_output=self.words(input_ids).mean(1))

    def forward(self, pixel_values=None, input_ids=None, attention_mask=None, **kwargs):
        """Similarities."""
        images, texts = self.get_image_features(pixel_values), self.get_text_features(input_ids)
        return VlmToyOutput(logits_per_image=images.pooler_output @ texts.pooler_output.T)


__all__ = ["VlmToyModel", "VlmToyOutput"]
''',
    "models/processing_toy.py": '''"""Processor of the toy."""

from .processing_clip import VlmClipProcessor


class VlmToyProcessor(VlmClipProcessor):
    """Prepares images and texts for [`VlmToyModel`]."""


__all__ = ["VlmToyProcessor"]
''',
    "hub/cards/toy.py": '''"""What a model card says of the toy."""

from .types import CardTexts

TOY = CardTexts(
    title="Toy",
    paper="A Paper on Toys",
    arxiv="0000.00000",
    pipeline_tag="zero-shot-image-classification",
    tags=("toy",),
    description="A toy.",
    usage="import hf_vlm",
    limits=("It is a toy.",),
)

__all__ = ["TOY"]
''',
}

ROW = """    Family(
        "vlm_toy",
        config="VlmToyConfig",
        model="VlmToyModel",
        processor="VlmToyProcessor",
        heads=(Head("VlmToyModel", ZERO_SHOT, RETRIEVAL_TASKS),),
        card="hf_vlm.hub.cards.toy:TOY",
    ),
"""
NAMES = '    "VlmToyConfig",\n    "VlmToyModel",\n    "VlmToyProcessor",\n'
# Existing file, the text before which a line is put, and the line.
EDITS = [
    ("families.py", ")\nFAMILIES = ", ROW),
    ("models/__init__.py", "else:\n", "    from .configuration_toy import VlmToyConfig\n"),
    ("models/__init__.py", "else:\n", "    from .modeling_toy import VlmToyModel, VlmToyOutput\n"),
    ("models/__init__.py", "else:\n", "    from .processing_toy import VlmToyProcessor\n"),
    ("models/__init__.py", '    "cast_weights",\n', NAMES),
    ("__init__.py", "else:\n", "    from .models import VlmToyConfig, VlmToyModel, VlmToyProcessor\n"),
    ("__init__.py", '    "__version__",\n', NAMES),
]

USE = """
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor, pipeline

import hf_vlm
from cases import tiny
from hf_vlm.evaluation import retrieval_report
from hf_vlm.evaluation.tasks import load_checkpoint
from hf_vlm.families import heads
from hf_vlm.hub.cards.card import write_card
from hf_vlm.hub.export import save_with_code
from hf_vlm.hub.info import checkpoint_info, format_info

folder, with_code = map(Path, sys.argv[1:])
size = {"height": tiny.IMAGE_SIZE, "width": tiny.IMAGE_SIZE}
processor = hf_vlm.VlmToyProcessor(hf_vlm.VlmImageProcessor(size=size), tiny.tokenizer())
vision = tiny.clip_config().vision_config
model = hf_vlm.VlmToyModel(hf_vlm.VlmToyConfig(vision_config=vision, vocab_size=len(processor.tokenizer))).eval()
model.save_pretrained(folder)
processor.save_pretrained(folder)

assert type(AutoConfig.from_pretrained(folder)) is hf_vlm.VlmToyConfig
assert type(AutoModel.from_pretrained(folder)) is hf_vlm.VlmToyModel
assert type(AutoProcessor.from_pretrained(folder)) is hf_vlm.VlmToyProcessor
assert type(AutoImageProcessor.from_pretrained(folder)) is hf_vlm.VlmImageProcessor
classify = pipeline("zero-shot-image-classification", str(folder))
assert len(classify(tiny.image(), candidate_labels=["cat", "tree"])) == 2

info = checkpoint_info(str(folder))
assert (info["architecture"], info["head"]) == ("Toy", "VlmToyModel"), info
assert "Toy (vlm_toy), VlmToyModel" in format_info(info)

assert {"retrieval", "hard_negatives"} <= set(heads()["VlmToyModel"].tasks)
loaded, its_processor = load_checkpoint(str(folder))
images = [tiny.image(seed=seed) for seed in range(4)]
report = retrieval_report(loaded, its_processor, images, ["a red cat", "tree", "a cat", "red"], [0, 1, 2, 3], ks=(1,))
assert 0 <= report["text_to_image_r1"] <= 1, report

card = write_card(folder).read_text()
assert "A Paper on Toys" in card
assert "vlm_toy" in card
save_with_code(model, processor, with_code)
torch.save(loaded(**processor(images=images, text=["a red cat"])).logits_per_image, with_code / "logits.pt")
"""

# In a process that does not find hf_vlm.
USE_CODE = """
import importlib.util, sys
sys.path.append(sys.argv[1])
assert importlib.util.find_spec("hf_vlm") is None
import torch
from transformers import AutoModel, AutoModelForZeroShotImageClassification, AutoProcessor

folder = sys.argv[2]
for auto_class in (AutoModel, AutoModelForZeroShotImageClassification):
    model, info = auto_class.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert type(model).__name__ == "VlmToyModel"
    assert not any(info.values()), info
assert type(AutoProcessor.from_pretrained(folder, trust_remote_code=True)).__name__ == "VlmToyProcessor"
"""


def python(code: str, *arguments: object, path: list[Path] | None = None, flags: tuple[str, ...] = ()) -> None:
    """Runs code in a new process that finds only these folders and the installed packages."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path or [])), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-P", *flags, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def edited_files(copy: Path) -> list[str]:
    """The files of the package that differ in a copy of it."""
    existing = [path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py")]
    return sorted(str(path) for path in existing if not filecmp.cmp(PACKAGE / path, copy / path, shallow=False))


def test_a_sixth_family(tmp_path: Path) -> None:
    copy = shutil.copytree(PACKAGE, tmp_path / "lib" / "hf_vlm", ignore=shutil.ignore_patterns("__pycache__"))
    for name, text in NEW_FILES.items():
        (copy / name).write_text(text, encoding="utf-8")
    for name, before, line in EDITS:
        source = (copy / name).read_text(encoding="utf-8")
        assert source.count(before) == 1, f"{name}: {before!r}"
        (copy / name).write_text(source.replace(before, line + before), encoding="utf-8")
    assert edited_files(copy) == ["__init__.py", "families.py", "models/__init__.py"]
    assert len(edited_files(copy)) <= MOST_EDITED

    tests = Path(__file__).parent
    python(USE, tmp_path / "toy", tmp_path / "toy-with-code", path=[copy.parent, tests])
    site = next(path for path in sys.path if path.endswith("site-packages"))
    python(USE_CODE, site, tmp_path / "toy-with-code", flags=("-S",))
