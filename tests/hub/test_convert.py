"""Conversion of CLIP: the same outputs in every layout, exactly, or one line that says why not."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoProcessor,
    BertConfig,
    BertModel,
    CLIPForImageClassification,
    CLIPModel,
    CLIPProcessor,
    ProcessorMixin,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from cases import tiny
from hf_vlm import VlmClipConfig, VlmClipModel, VlmClipProcessor, VlmImageProcessor
from hf_vlm.hub.convert import (
    convert_folder,
    from_original,
    from_transformers,
    processor_from_transformers,
    processor_to_transformers,
    to_transformers,
)
from hf_vlm.hub.convert.open_clip import read_config

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def refusal(convert: Callable, *args, **kwargs) -> str:
    """The message of the refusal, which is one line."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - every caller compares the message
        convert(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def native_clip(**options) -> CLIPModel:
    return tiny.randomise(CLIPModel(tiny.native_clip_config(**options)))


def native_processor(size: int = tiny.IMAGE_SIZE) -> CLIPProcessor:
    images = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    return CLIPProcessor(images, tiny.tokenizer())


def save(folder: Path, model: nn.Module, processor: ProcessorMixin | None = None) -> Path:
    model.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    return folder


def assert_same_outputs(first: nn.Module, second: nn.Module) -> None:
    inputs = tiny.clip_inputs()
    with torch.no_grad():
        one, other = first(**inputs, return_loss=True), second(**inputs, return_loss=True)
    for name in ("loss", "logits_per_image", "image_embeds", "text_embeds"):
        torch.testing.assert_close(one[name], other[name], **CLOSE)


def assert_same_weights(first: nn.Module, second: nn.Module) -> None:
    one, other = first.state_dict(), second.state_dict()
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype
        assert torch.equal(tensor, other[name]), name


# --- transformers


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"text": {"eos_token_id": 2, "hidden_act": "gelu"}, "projection_dim": 24, "logit_scale_init_value": 3.0},
        {"vision": tiny.layer_sizes(width=48, heads=6, layers=3, attention_dropout=0.1, layer_norm_eps=1e-6)},
    ],
)
def test_there_and_back(options: dict) -> None:
    native = native_clip(**options)
    ours = from_transformers(native)
    assert_same_outputs(ours, native)
    back = to_transformers(ours)
    assert_same_weights(back, native)
    given, returned = native.config.to_dict(), back.config.to_dict()
    for tower in ("vision_config", "text_config"):
        # A second copy of the projection's size, which nothing reads.
        assert given[tower].pop("projection_dim") == 512
        assert returned[tower].pop("projection_dim") == native.config.projection_dim
    assert returned == {**given, "architectures": None}
    assert_same_weights(from_transformers(back), ours)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"vision": {"patch_size": 16, "num_hidden_layers": 1}, "text": {"num_attention_heads": 1}},
        {"vision": {"patch_dropout": 0.5, "drop_path_rate": 0.3}, "logit_scale_init_value": 3, "max_logit_scale": 3},
    ],
)
def test_ours_as_native(options: dict) -> None:
    ours = tiny.clip_model(**options)
    native = to_transformers(ours)
    assert isinstance(native, CLIPModel)
    assert not native.training
    assert_same_outputs(ours, native)


def test_conversion_copies_the_weights_in_their_dtype() -> None:
    native = native_clip().to(torch.bfloat16)
    ours = from_transformers(native)
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.bfloat16}
    back = to_transformers(ours)
    assert_same_weights(back, native)
    storages = {parameter.data_ptr() for model in (native, ours, back) for parameter in model.parameters()}
    assert len(storages) == sum(len(list(model.parameters())) for model in (native, ours, back))


def test_conversion_stays_on_the_device() -> None:
    native = to_transformers(tiny.clip_model().to("meta"))
    assert {tensor.device.type for tensor in [*native.parameters(), *native.buffers()]} == {"meta"}


def test_native_towers_are_taken_over() -> None:
    native = native_clip()
    ours = VlmClipModel.from_parts(vision=native.vision_model, text=native.text_model, projection_dim=16)
    assert_same_outputs(tiny.randomise(ours), to_transformers(ours))


def with_text_tower(model: nn.Module, **options) -> VlmClipModel:
    return VlmClipModel.from_parts(vision=tiny.clip_model().vision_model, text=model, **options)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: with_text_tower(BertModel(BertConfig(**tiny.layer_sizes(), vocab_size=20))),
            "text_config.model_type='bert'; it requires 'vlm_text_tower'",
        ),
        (lambda: tiny.clip_model(vision={"layout": "mean"}), "vision_config.qkv_bias=False; it requires True"),
        (
            lambda: tiny.clip_model(vision={"layout": "mean", "qkv_bias": True}),
            "vision_config.use_class_token=False; it requires True",
        ),
        (
            lambda: tiny.clip_model(vision={"use_patch_bias": True}),
            "vision_config.use_patch_bias=True; it requires False",
        ),
        (lambda: tiny.clip_model(vision={"use_pre_norm": False}), "vision_config.use_pre_norm=False; it requires True"),
        (
            lambda: tiny.clip_model(vision={"final_norm": "sequence"}),
            "vision_config.final_norm='sequence'; it requires 'pooled'",
        ),
        (lambda: tiny.clip_model(vision={"pooling": "mean"}), "vision_config.pooling='mean'; it requires 'class'"),
        (lambda: tiny.clip_model(vision_pooling="mean"), "vision_pooling='mean'; it requires 'tower'"),
        (lambda: tiny.clip_model(text_pooling="class"), "text_pooling='class'; it requires 'tower'"),
        (lambda: tiny.clip_model(loss_type="sigmoid"), "loss_type='sigmoid'; it requires 'softmax'"),
    ],
)
def test_what_clip_cannot_express_is_refused(build: Callable[[], VlmClipModel], message: str) -> None:
    assert refusal(to_transformers, build()) == f"CLIPModel does not support {message}."


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    bert = save(tmp_path, BertModel(BertConfig(**tiny.layer_sizes(), vocab_size=20)))
    assert refusal(from_transformers, bert) == (
        f"{bert} is of type bert, which cannot be converted; "
        "supported types: clip, blip, blip-2, instructblip, llava, llava_next."
    )
    assert refusal(to_transformers, str(bert)).endswith(
        "which cannot be converted; supported types: vlm_clip, vlm_blip, vlm_blip2, vlm_instructblip, vlm_llava."
    )
    assert refusal(to_transformers, native_clip()).startswith("This object is of type clip, ")
    part = CLIPForImageClassification(tiny.native_clip_config())
    assert (
        refusal(from_transformers, part) == "CLIPForImageClassification is not a complete CLIP model: pass a CLIPModel."
    )


@pytest.mark.parametrize("convert", [from_transformers, to_transformers])
def test_incomplete_checkpoints_are_refused(tmp_path: Path, convert: Callable) -> None:
    folder = save(tmp_path, native_clip() if convert is from_transformers else tiny.clip_model())
    convert(folder)
    weights = load_file(folder / "model.safetensors")
    weights["extra.weight"] = torch.zeros(2)
    del weights["visual_projection.weight"], weights["text_projection.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert refusal(convert, folder) == (
        f"The weights of {folder} do not match the model; missing: text_projection.weight, visual_projection.weight; "
        "unexpected: extra.weight."
    )


# --- processors


SHAPES = [(32, 32), (40, 36), (36, 41), (20, 27), (333, 150), (31, 200), (64, 64), (33, 32), (1, 1), (500, 40)]


def greatest_step(first: np.ndarray, second: np.ndarray) -> float:
    """The greatest difference in steps of an 8-bit pixel."""
    std = np.float32(VlmImageProcessor.image_std)[:, None, None]
    return float(np.abs((np.asarray(first) - np.asarray(second)) * std * 255).max())


@pytest.mark.parametrize(
    "native",
    [
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size={"height": 32, "width": 48}),
        CLIPImageProcessorPil(size={"height": 24, "width": 32}, do_center_crop=False),
        CLIPImageProcessorPil(size={"height": 32, "width": 32}, crop_size={"height": 32, "width": 32}, resample=2),
        CLIPImageProcessorPil(
            size={"shortest_edge": 32},
            crop_size={"height": 32, "width": 32},
            image_mean=[0.5, 0.4, 0.3],
            image_std=[0.2, 0.3, 0.4],
            rescale_factor=1 / 127.5,
        ),
    ],
)
def test_processors_give_the_same_pixels(native: CLIPImageProcessorPil) -> None:
    ours = processor_from_transformers(CLIPProcessor(native, tiny.tokenizer()))
    back = processor_to_transformers(ours)
    for seed, (width, height) in enumerate(SHAPES):
        for image in (tiny.image(width, height, seed), tiny.image(width, height, seed).convert("L")):
            expected = native(image, return_tensors="np")["pixel_values"]
            assert greatest_step(ours.image_processor(image, return_tensors="np")["pixel_values"], expected) < 1e-2
            assert greatest_step(back.image_processor(image, return_tensors="np")["pixel_values"], expected) < 1e-2


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"resize_mode": "squash"},
        {"do_resize": False},
        {"do_normalize": False, "resample": 2},
        {"do_rescale": False},
    ],
)
def test_our_processor_as_native(options: dict) -> None:
    ours = tiny.clip_processor(**options)
    native, image = processor_to_transformers(ours), tiny.image(50, 37)
    expected = ours.image_processor(image, return_tensors="np")["pixel_values"]
    assert greatest_step(native.image_processor(image, return_tensors="np")["pixel_values"], expected) < 1e-2


def test_processors_give_the_same_tokens(tmp_path: Path) -> None:
    native_processor().save_pretrained(tmp_path)
    ours = processor_from_transformers(tmp_path)
    expected = native_processor()(text=tiny.CAPTIONS, padding=True, return_tensors="pt")
    found = ours(text=tiny.CAPTIONS)
    assert torch.equal(found["input_ids"], expected["input_ids"])
    assert torch.equal(found["attention_mask"], expected["attention_mask"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}},
            "does not support size={'shortest_edge': 40} with crop_size={'height': 32, 'width': 32} and ",
        ),
        (
            {"size": {"shortest_edge": 40}, "do_center_crop": False},
            "size={'shortest_edge': 40} with crop_size=None and",
        ),
        ({"do_resize": False}, "size={'shortest_edge': 224} with crop_size="),
    ],
)
def test_image_sizes_without_equivalent_are_refused(options: dict, message: str) -> None:
    processor = CLIPProcessor(CLIPImageProcessorPil(**options), tiny.tokenizer())
    assert message in refusal(processor_from_transformers, processor)


def test_processors_without_equivalent_are_refused() -> None:
    message = refusal(processor_to_transformers, tiny.clip_processor(resize_mode="pad"))
    assert message == "CLIPImageProcessor does not support resize_mode='pad'; it requires 'crop' or 'squash'."
    assert "is of type CLIPProcessor, which cannot be converted; " in refusal(
        processor_to_transformers, native_processor()
    )


# --- folders


def test_folder_there_and_back(tmp_path: Path) -> None:
    native = native_clip()
    source = save(tmp_path / "native", native, native_processor())
    convert_folder(source, tmp_path / "new" / "ours", to="hf_vlm")
    convert_folder(str(tmp_path / "new" / "ours"), str(tmp_path / "back"), to="native")
    image = tiny.image()
    expected = native_processor()(images=[image], text=tiny.CAPTIONS, padding=True, return_tensors="pt")
    for folder, model_class, processor_class in (
        ("new/ours", VlmClipModel, VlmClipProcessor),
        ("back", CLIPModel, CLIPProcessor),
    ):
        model, processor = (
            AutoModel.from_pretrained(tmp_path / folder),
            AutoProcessor.from_pretrained(tmp_path / folder),
        )
        assert (type(model), type(processor)) == (model_class, processor_class)
        inputs = processor(images=[image], text=tiny.CAPTIONS, padding=True, return_tensors="pt")
        with torch.no_grad():
            torch.testing.assert_close(model(**inputs).logits_per_image, native(**expected).logits_per_image, **CLOSE)
    assert [path.name for path in sorted((tmp_path / "new").iterdir())] == ["ours"]


@pytest.mark.parametrize("exists", [False, True])
def test_refused_folder_writes_nothing(tmp_path: Path, exists: bool) -> None:
    model, padded = tiny.clip_model(), tiny.clip_processor(resize_mode="pad")
    sources = [
        save(tmp_path / "sigmoid", tiny.clip_model(loss_type="sigmoid"), tiny.clip_processor()),
        save(tmp_path / "padded", model, padded),
        save(tmp_path / "bert", BertModel(BertConfig(**tiny.layer_sizes(), vocab_size=20))),
    ]
    target = tmp_path / "out" / "target"
    if exists:
        target.mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    for source in sources:
        refusal(convert_folder, source, target, to="native")
    refusal(convert_folder, sources[0], target, to="hf_vlm")
    assert refusal(convert_folder, sources[0], target, to="onnx") == ("Unknown target 'onnx': choose native or hf_vlm.")
    with pytest.raises(OSError, match="bare"):
        convert_folder(save(tmp_path / "bare", model), target, to="native")
    assert [path for path in sorted(tmp_path.rglob("*")) if "bare" not in path.parts] == before


def test_folder_in_use_is_refused(tmp_path: Path) -> None:
    source = save(tmp_path / "native", native_clip(), native_processor())
    for target in (source, source / "config.json"):
        assert refusal(convert_folder, source, target, to="hf_vlm") == (
            f"{target} exists and is not an empty folder: choose a new or empty folder."
        )
    empty = tmp_path / "empty"
    empty.mkdir()
    convert_folder(source, empty, to="hf_vlm")
    assert_same_outputs(AutoModel.from_pretrained(empty), CLIPModel.from_pretrained(source))


# --- open_clip, whose layout is written here once more, on torch's own attention


class QuickGelu(nn.Module):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden * torch.sigmoid(1.702 * hidden)


ACTIVATIONS = {"quick_gelu": QuickGelu, "gelu": nn.GELU}


class Block(nn.Module):
    def __init__(self, width: int, heads: int, hidden_act: str):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 3 * width))
        self.mlp.add_module("gelu", ACTIVATIONS[hidden_act]())
        self.mlp.add_module("c_proj", nn.Linear(3 * width, width))

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        normed = self.ln_1(hidden)
        hidden = hidden + self.attn(normed, normed, normed, attn_mask=mask, need_weights=False)[0]
        return hidden + self.mlp(self.ln_2(hidden))


class Blocks(nn.Module):
    def __init__(self, width: int, heads: int, layers: int, hidden_act: str):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads, hidden_act) for _ in range(layers))

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        for block in self.resblocks:
            hidden = block(hidden, mask)
        return hidden


class Visual(nn.Module):
    def __init__(self, width: int, heads: int, layers: int, patch_size: int, hidden_act: str):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty((tiny.IMAGE_SIZE // patch_size) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Blocks(width, heads, layers, hidden_act)
        self.proj = nn.Parameter(torch.empty(width, 16))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        patches = self.conv1(pixel_values).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_embedding.expand(len(patches), 1, -1), patches], dim=1)
        hidden = self.transformer(self.ln_pre(tokens + self.positional_embedding))
        return self.ln_post(hidden[:, 0]) @ self.proj


class OpenClip(nn.Module):
    def __init__(
        self,
        vision: dict | None = None,
        text: dict | None = None,
        hidden_act: str = "quick_gelu",
        context_length: int = tiny.MAX_LENGTH,
    ):
        super().__init__()
        vision = {"width": 64, "heads": 1, "layers": 2, "patch_size": 8, **(vision or {})}
        text = {"width": 128, "heads": 2, "layers": 1, **(text or {})}
        self.visual = Visual(**vision, hidden_act=hidden_act)
        self.transformer = Blocks(**text, hidden_act=hidden_act)
        self.token_embedding = nn.Embedding(len(tiny.VOCABULARY), text["width"])
        self.positional_embedding = nn.Parameter(torch.empty(context_length, text["width"]))
        self.ln_final = nn.LayerNorm(text["width"])
        self.text_projection = nn.Parameter(torch.empty(text["width"], 16))
        self.logit_scale = nn.Parameter(torch.empty(()))
        tiny.randomise(self)

    def encode_text(self, input_ids: torch.Tensor) -> torch.Tensor:
        length = input_ids.shape[1]
        mask = torch.full((length, length), -torch.inf).triu(1)
        hidden = self.token_embedding(input_ids) + self.positional_embedding[:length]
        hidden = self.ln_final(self.transformer(hidden, mask))
        return hidden[torch.arange(len(input_ids)), input_ids.argmax(dim=-1)] @ self.text_projection


def assert_equals_open_clip(ours: VlmClipModel, theirs: OpenClip) -> None:
    inputs = tiny.clip_inputs()
    padded = tiny.tokens(padding="max_length", max_length=tiny.MAX_LENGTH)["input_ids"]
    with torch.no_grad():
        outputs = ours(**inputs)
        features = ours.get_image_features(inputs["pixel_values"]), ours.get_text_features(inputs["input_ids"])
        images, texts = theirs.visual(inputs["pixel_values"]), theirs.encode_text(padded)
        normed = nn.functional.normalize(images, dim=-1), nn.functional.normalize(texts, dim=-1)
        logits = theirs.logit_scale.exp() * normed[0] @ normed[1].T
    torch.testing.assert_close(features[0].pooler_output, images, **CLOSE)
    torch.testing.assert_close(features[1].pooler_output, texts, **CLOSE)
    torch.testing.assert_close(outputs.logits_per_image, logits, **CLOSE)


@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"vision": {"width": 128, "heads": 2, "patch_size": 4, "layers": 1}, "text": {"width": 64, "heads": 1}},
        {"context_length": tiny.MAX_LENGTH + 3},
        {"vision": {"layers": 3, "patch_size": 16}, "text": {"width": 64, "heads": 1, "layers": 4}},
    ],
)
def test_open_clip(options: dict, hidden_act: str) -> None:
    theirs = OpenClip(**options, hidden_act=hidden_act)
    ours = from_original(theirs.state_dict(), hidden_act=hidden_act)
    assert not ours.training
    assert_equals_open_clip(ours, theirs)


def test_open_clip_with_a_config() -> None:
    theirs = OpenClip(vision={"width": 48, "heads": 4}, text={"width": 40, "heads": 5})
    config = from_original(OpenClip().state_dict(), hidden_act="quick_gelu").config.to_dict()
    config["vision_config"].update(tiny.layer_sizes(width=48, heads=4), intermediate_size=144)
    config["text_config"].update(tiny.layer_sizes(width=40, heads=5, layers=1), intermediate_size=120)
    assert_equals_open_clip(from_original(theirs.state_dict(), VlmClipConfig(**config)), theirs)
    assert refusal(from_original, theirs.state_dict(), hidden_act="gelu") == (
        "The width 48 is not a multiple of the attention head width 64: pass a config."
    )


def custom_text(name: str) -> str:
    return name if name.startswith("visual.") or name == "logit_scale" else f"text.{name}"


@pytest.mark.parametrize("change", [custom_text, "module.{}".format], ids=["custom text", "data parallel"])
def test_open_clip_prefixes(change: Callable[[str], str]) -> None:
    theirs = OpenClip()
    state_dict = {change(name): tensor for name, tensor in theirs.state_dict().items()}
    assert_equals_open_clip(from_original(state_dict, hidden_act="quick_gelu"), theirs)


def test_open_clip_with_openai_sizes_and_half_precision() -> None:
    theirs = OpenClip()
    state_dict = {name: tensor.half() for name, tensor in theirs.state_dict().items()}
    theirs.load_state_dict(state_dict)
    sizes = {"input_resolution": torch.tensor(32), "context_length": torch.tensor(12), "vocab_size": torch.tensor(20)}
    ours = from_original({**state_dict, **sizes}, hidden_act="quick_gelu")
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}
    assert_equals_open_clip(ours, theirs)


def test_open_clip_with_a_bias_is_sigmoid() -> None:
    theirs = OpenClip()
    ours = from_original({**theirs.state_dict(), "logit_bias": torch.tensor(-3.0)}, hidden_act="quick_gelu")
    assert ours.config.loss_type == "sigmoid"
    plain = from_original(theirs.state_dict(), hidden_act="quick_gelu")
    inputs = tiny.clip_inputs()
    with torch.no_grad():
        torch.testing.assert_close(ours(**inputs).logits_per_image, plain(**inputs).logits_per_image - 3.0, **CLOSE)


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt", "model.bin", "epoch_1.pt"])
def test_open_clip_files(tmp_path: Path, name: str) -> None:
    theirs, path = OpenClip(), tmp_path / name
    if name.startswith("epoch"):
        torch.save({"epoch": 1, "state_dict": theirs.state_dict(), "optimizer": {"lr": 0.1}}, path)
    elif name.endswith("safetensors"):
        save_file(theirs.state_dict(), path)
    else:
        torch.save(theirs.state_dict(), path)
    for given in (path, str(path)):
        assert_equals_open_clip(from_original(given, hidden_act="quick_gelu"), theirs)


class Code:
    def __reduce__(self):
        return (Path.touch, (Path("code_was_run"),))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*TorchScript archive:UserWarning")
def test_open_clip_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"visual.class_embedding": Code()}, "code.pt")
    Path("damaged.pt").write_bytes(b"damaged")
    Path("damaged.safetensors").write_bytes(b"damaged")
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), "archive.pt")
    for name in ("code.pt", "damaged.pt", "damaged.safetensors", "archive.pt"):
        assert refusal(from_original, name, hidden_act="gelu").startswith(f"{name} cannot be read as plain tensors")
    assert not Path("code_was_run").exists()
    assert refusal(from_original, "model.onnx", hidden_act="gelu").startswith("model.onnx is not a weights file")
    with pytest.raises(FileNotFoundError):
        from_original("absent.pt", hidden_act="gelu")


def test_open_clip_weights_that_do_not_fit() -> None:
    state_dict = OpenClip().state_dict()
    config = from_original(state_dict, hidden_act="gelu").config
    lacking = {name: tensor for name, tensor in state_dict.items() if ".ln_2." not in name}
    lacking["visual.transformer.resblocks.0.ls_1.gamma"] = torch.ones(64)
    lacking["text_projection"] = torch.ones(16, 128)
    message = (
        "The weights of this open_clip checkpoint do not match the model; missing: transformer.resblocks.0.ln_2.bias, "
        "transformer.resblocks.0.ln_2.weight, visual.transformer.resblocks.0.ln_2.bias and 3 more; unexpected: "
        "visual.transformer.resblocks.0.ls_1.gamma; wrong shape: text_projection (16, 128) instead of (128, 16)."
    )
    assert refusal(from_original, lacking, config) == message
    assert refusal(from_original, lacking, hidden_act="gelu") == message
    del lacking["token_embedding.weight"]
    assert refusal(from_original, lacking, hidden_act="gelu").endswith(
        "do not match the model; missing: token_embedding.weight."
    )


def test_open_clip_needs_its_activation() -> None:
    state_dict = OpenClip().state_dict()
    config = from_original(state_dict, hidden_act="gelu").config
    for options in ({}, {"config": config, "hidden_act": "gelu"}):
        assert "pass hidden_act" in refusal(from_original, state_dict, **options)


def test_another_original_is_refused() -> None:
    resnet = {"visual.conv1.weight": torch.ones(2, 3, 3, 3), "visual.layer1.0.conv1.weight": torch.ones(2, 2, 3, 3)}
    assert refusal(from_original, resnet, hidden_act="gelu") == (
        "Unknown layout of weights, with the tensors visual.conv1.weight, visual.layer1.0.conv1.weight, ...; "
        "supported: the original layouts of CLIP (open_clip, vision transformers only), BLIP, BLIP-2 and LLaVA."
    )


@pytest.mark.parametrize(("width", "heads"), [(768, 12), (1024, 16), (1280, 16), (1408, 16), (1664, 16)])
def test_heads_of_open_clip_towers(width: int, heads: int) -> None:
    """ViT-B, L, H, g and bigG, whose tensors do not tell the number of heads."""
    with torch.device("meta"):
        theirs = OpenClip(vision={"width": width, "heads": 1, "layers": 1}, text={"width": 1280, "heads": 1})
    config = read_config(theirs.state_dict(), "gelu")
    assert (config.vision_config.num_attention_heads, config.text_config.num_attention_heads) == (heads, 20)
    assert (config.vision_config.image_size, config.vision_config.patch_size) == (32, 8)
