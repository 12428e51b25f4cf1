"""Tiny LLaVA models, processors, images and batches, made from nothing; see `tiny.py`."""

import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from cases import tiny, tiny_blip2
from hf_vlm import VlmImageProcessor, VlmLlavaConfig, VlmLlavaForConditionalGeneration, VlmLlavaProcessor, VlmTowerModel
from hf_vlm.models import with_image_token
from hf_vlm.models.anyres import AnyresLayout, anyres_layout

GRIDS = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]
PATCH, PATCHES = 8, 16  # side of a patch in pixels, patches of an image
LAYERS = 4
REGISTERS = 2  # of the tower that has them
IMAGE = 40  # the placeholder of `pair`
SIZES = [(40, 36), (100, 30), (30, 90), (64, 64), (50, 200)]  # (width, height)
CHATML = (
    "{% for message in messages %}{{ '<start>' + message['role'] + '\n' + message['content'] + '<end>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start>assistant\n' }}{% endif %}"
)
# Reads content in parts alone, as templates of llava-hf do.
IN_PARTS = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
RENAMED = (
    ("model.vision_model.", "model.vision_tower."),
    ("model.projector.newline", "model.image_newline"),
    ("model.projector.", "model.multi_modal_projector."),
    ("model.language_model.lm_head", "lm_head"),
    ("model.language_model.model.", "model.language_model."),
)
TOWERS = ["own", "own, eva", "clip", "siglip", "dinov2"]
Batch = dict[str, torch.Tensor]


def tower(name: str, layers: int = LAYERS) -> PreTrainedModel:
    """A randomised tower of TOWERS, or one with registers, in eval mode; SigLIP has no class token."""
    sizes = tiny.layer_sizes(layers=layers, image_size=tiny.IMAGE_SIZE, patch_size=PATCH)
    build = {
        "own": lambda: VlmTowerModel(tiny.tower_config(num_hidden_layers=layers)),
        "own, eva": lambda: VlmTowerModel(tiny.tower_config("eva", num_hidden_layers=layers)),
        "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**sizes)),
        "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**sizes)),
        "dinov2": lambda: Dinov2Model(Dinov2Config(**sizes, mlp_ratio=2)),
        "registers": lambda: Dinov2WithRegistersModel(
            Dinov2WithRegistersConfig(**sizes, mlp_ratio=2, num_register_tokens=REGISTERS)
        ),
    }[name]
    return tiny.randomise(build())


def llava_config(anyres: bool = False, llm: str = "llama", **options) -> VlmLlavaConfig:
    """Our tower before an LLM whose vocabulary ends with the placeholder."""
    parts = {
        "vision_config": tiny.tower_config(),
        "text_config": tiny_blip2.llm_config(llm, vocab_size=len(tiny.VOCABULARY) + 1),
        "image_token_id": tiny_blip2.IMAGE_TOKEN_ID,
        "image_grid_pinpoints": GRIDS if anyres else None,
    }
    return VlmLlavaConfig(**{**parts, **options})


def llava_model(
    head_class: type[PreTrainedModel] = VlmLlavaForConditionalGeneration, anyres: bool = False, **options
) -> PreTrainedModel:
    """A randomised model in eval mode; for the options, see [`llava_config`]."""
    return tiny.randomise(head_class(llava_config(anyres, **options))).eval()


def on_tower(name: str, anyres: bool = False, **options) -> VlmLlavaForConditionalGeneration:
    """A randomised model on a tower of TOWERS; the class token, if there is one, is left out."""
    strategy = "full" if name == "siglip" else "default"
    return llava_model(
        anyres=anyres, **{"vision_config": tower(name).config, "vision_feature_select_strategy": strategy, **options}
    )


def llava_processor(anyres: bool = False) -> VlmLlavaProcessor:
    """That of the model."""
    return VlmLlavaProcessor.from_parts(llava_model(anyres=anyres), with_image_token(tiny_blip2.llm_tokenizer()))


def llava_inputs(anyres: bool = False) -> Batch:
    """One row with two images, one with none, one with one; padded on the left."""
    texts = ["<image> a red cat <image> tree", "two dog on the left", "a <image> the blue house"]
    images = [tiny.image(width, height, seed=width) for width, height in SIZES[:3]]
    return dict(llava_processor(anyres)(images=images, text=texts))


def with_labels(inputs: Batch) -> Batch:
    """A batch that learns its own words: no placeholders, start tokens or padding."""
    inputs = {"attention_mask": (inputs["input_ids"] != tiny.PAD).long(), **inputs}
    return {**inputs, "labels": tiny_blip2.prompt_labels(inputs)}


# --- against transformers


def native_name(name: str) -> str:
    for own, other in RENAMED:
        name = name.replace(own, other)
    return name


def pair(anyres: bool, llm: str = "llama", vision: str | None = None, **options) -> tuple:
    """transformers' model and ours, with the same random weights; `vision` is one of TOWERS, CLIP's by default."""
    config = {
        "vision_config": tiny.native_clip_config().vision_config if vision is None else tower(vision).config,
        "text_config": tiny_blip2.llm_config(llm, vocab_size=64),
        "image_token_index": IMAGE,
        "tie_word_embeddings": "tied" in llm,
        **{name.replace("projector_bias", "multimodal_projector_bias"): value for name, value in options.items()},
    }
    if anyres:
        native = LlavaNextForConditionalGeneration(LlavaNextConfig(**config, image_grid_pinpoints=GRIDS))
    else:
        native = LlavaForConditionalGeneration(LlavaConfig(**config))
    tiny.randomise(native).eval()
    own = VlmLlavaForConditionalGeneration.from_parts(
        native.model.vision_tower,
        tiny_blip2.llm(llm, vocab_size=64),
        IMAGE,
        image_grid_pinpoints=GRIDS if anyres else None,
        **options,
    )
    weights = native.state_dict()
    own.load_state_dict({name: weights[native_name(name)] for name in own.state_dict()})
    return native, own


def pictures(anyres: bool, sizes: list[tuple[int, int]] = SIZES) -> Batch:
    """Pixels of different images of these sizes (width, height)."""
    mode = {"resize_mode": "anyres", "image_grid_pinpoints": GRIDS} if anyres else {"resize_mode": "pad"}
    processor = VlmImageProcessor(size={"height": tiny.IMAGE_SIZE, "width": tiny.IMAGE_SIZE}, **mode)
    return dict(processor([tiny.image(w, h, seed=i) for i, (w, h) in enumerate(sizes)], return_tensors="pt"))


def layouts(patch: int = PATCH, sizes: list[tuple[int, int]] = SIZES) -> list[AnyresLayout]:
    return [anyres_layout((height, width), GRIDS, tiny.IMAGE_SIZE, patch) for width, height in sizes]


def padded(rows: list[list[int]], side: str = "left") -> Batch:
    """Rows of tokens as a batch."""
    length = max(map(len, rows))
    blanks = [[0] * (length - len(row)) for row in rows]
    pairs = list(zip(rows, blanks, strict=True))
    ids = [blank + row if side == "left" else row + blank for row, blank in pairs]
    mask = [blank + [1] * len(row) if side == "left" else [1] * len(row) + blank for row, blank in pairs]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def rows(counts: list[int]) -> Batch:
    """Two images, then two, then one, then none; padded on the left."""
    return padded(
        [
            [3, *[IMAGE] * counts[0], 5, 6, *[IMAGE] * counts[1], 7],
            [*[IMAGE] * counts[2], *[IMAGE] * counts[3], 8, 9, 10],
            [4, 5, 6, *[IMAGE] * counts[4], 2],
            [4, 5, 6, 7, 8],
        ]
    )


def batch(anyres: bool, model: PreTrainedModel) -> Batch:
    """Rows with the images of SIZES, for a model of `pair`."""
    vision, strategy = model.config.vision_config, model.config.vision_feature_select_strategy
    side = vision.image_size // vision.patch_size
    with_class = strategy == "full" and vision.model_type != "siglip_vision_model"
    registers = REGISTERS if vision.model_type == "dinov2_with_registers" else 0
    count = side**2 + with_class + registers
    counts = [layout.num_tokens for layout in layouts(vision.patch_size)] if anyres else [count] * 5
    return rows(counts) | pictures(anyres)


def one_by_one(inputs: Batch, anyres: bool) -> list[Batch]:
    """The rows of `batch` by themselves, without padding and each with its own images."""
    images, views = [2, 2, 1, 0], [layout.num_views for layout in layouts()] if anyres else [1] * 5
    found, first = [], 0
    for row, count in enumerate(images):
        kept = inputs["attention_mask"][row].bool()
        one = {name: inputs[name][row : row + 1, kept] for name in ("input_ids", "attention_mask")}
        if count:
            start = sum(views[:first])
            one["pixel_values"] = inputs["pixel_values"][start : start + sum(views[first : first + count])]
            if anyres:
                one["image_sizes"] = inputs["image_sizes"][first : first + count]
        found.append(one)
        first += count
    return found


def native_inputs(inputs: Batch, anyres: bool, patch: int, sizes: list[tuple[int, int]] = SIZES) -> Batch:
    """The same batch for transformers, which pads the views of each image to the most."""
    if not anyres:
        return inputs
    views = inputs["pixel_values"].split([layout.num_views for layout in layouts(patch, sizes)])
    most = max(map(len, views))
    padded_views = [torch.cat([view, view.new_zeros(most - len(view), *view.shape[1:])]) for view in views]
    return inputs | {"pixel_values": torch.stack(padded_views)}
