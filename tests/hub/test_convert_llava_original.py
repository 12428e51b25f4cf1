"""LLaVA from the layout of its own code, against transformers' models with every parameter randomised."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from cases import tiny, tiny_blip2, tiny_llava
from cases.tiny_llava import GRIDS, IMAGE, batch, native_inputs, pair
from hf_vlm import VlmLlavaForConditionalGeneration
from hf_vlm.hub.convert import from_original, from_transformers
from hf_vlm.hub.convert.llava_original import targets_of

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
WORDS = IMAGE  # the placeholder is the first id after the words
ROWS = 64
EMBEDDINGS, HEAD, NEWLINE = "model.embed_tokens.weight", "lm_head.weight", "model.image_newline"
LAYER = "model.layers.1.mlp.up_proj.weight"
TOWER = "model.vision_tower.vision_tower.vision_model."
# transformers' names on the left.
NAMES = (
    ("model.vision_tower.", TOWER),
    ("model.multi_modal_projector.linear_1.", "model.mm_projector.0."),
    ("model.multi_modal_projector.linear_2.", "model.mm_projector.2."),
    ("model.language_model.", "model."),
)
Weights = dict[str, torch.Tensor]


def original(native: PreTrainedModel, tower: bool = True) -> Weights:
    """The weights of transformers' model in the names of LLaVA's code, with a row for each word and no more."""
    weights = {}
    for name, tensor in native.state_dict().items():
        for one, other in NAMES:
            if name.startswith(one):
                name = other + name.removeprefix(one)
                break
        weights[name] = tensor[:WORDS].clone() if name in (EMBEDDINGS, HEAD) else tensor
    if native.config.text_config.tie_word_embeddings:
        del weights[HEAD]
    return {name: tensor for name, tensor in weights.items() if tower or not name.startswith(TOWER)}


def projector_of(weights: Weights) -> Weights:
    """What `mm_projector.bin` has of them."""
    return {name: tensor for name, tensor in weights.items() if "mm_projector" in name or name == NEWLINE}


def built(
    tower: PreTrainedModel, llm: str = "llama", anyres: bool = False, **options
) -> VlmLlavaForConditionalGeneration:
    """A model of other weights than those of `pair`."""
    if anyres:
        options["image_grid_pinpoints"] = GRIDS
    return VlmLlavaForConditionalGeneration.from_parts(tower, tiny_blip2.llm(llm, std=0.1, vocab_size=WORDS), **options)


def copies(model: nn.Module) -> Weights:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def logits(model: PreTrainedModel, inputs: dict) -> torch.Tensor:
    """Logits of the words, where there is no padding."""
    with torch.no_grad():
        return model(**inputs).logits[..., :WORDS] * inputs["attention_mask"][..., None]


def assert_equal(own: VlmLlavaForConditionalGeneration, native: PreTrainedModel, anyres: bool) -> None:
    inputs = batch(anyres, own)
    wanted = logits(native, native_inputs(inputs, anyres, tiny_llava.PATCH))
    assert wanted.abs().max() > 0.1
    torch.testing.assert_close(logits(own, inputs), wanted, **CLOSE)


# --- whole checkpoints


@pytest.mark.parametrize("anyres", [False, True])
@pytest.mark.parametrize("llm", ["llama", "llama, tied", "qwen2"])
@pytest.mark.parametrize("tower", ["left out", "own", "clip"])
def test_whole_checkpoint(tower: str, llm: str, anyres: bool) -> None:
    native, _ = pair(anyres, llm)
    left_out = tower == "left out"
    base = built(native.model.vision_tower if left_out else tiny_llava.tower(tower, layers=2), llm, anyres)
    before = copies(base)
    own = from_original(original(native, tower=not left_out), base=base.train())
    assert own is base
    assert not own.training
    assert not own.model.trains_tower
    assert_equal(own, native, anyres)
    assert (own.get_input_embeddings().weight is own.get_output_embeddings().weight) == ("tied" in llm)
    for name in ("model.language_model.model.embed_tokens.weight", "model.language_model.lm_head.weight"):
        assert len(own.state_dict()[name]) == ROWS
        assert torch.equal(own.state_dict()[name][WORDS:], before[name][WORDS:])
        assert not torch.equal(own.state_dict()[name][:WORDS], before[name][:WORDS])


def test_a_checkpoint_with_a_tower_of_another_kind() -> None:
    options = {"vision": "siglip", "vision_feature_select_strategy": "full"}
    native, _ = pair(False, **options)
    base = built(tiny_llava.tower("siglip"), vision_feature_select_strategy="full")
    own = from_original({f"module.{name}": tensor for name, tensor in original(native).items()}, base=base)
    assert_equal(own, native, False)


@pytest.mark.parametrize("anyres", [False, True])
def test_a_config_is_enough_where_all_is_in_the_checkpoint(anyres: bool) -> None:
    native, _ = pair(anyres)
    config = from_transformers(native).config
    own = from_original(original(native), config)
    assert {parameter.dtype for parameter in own.parameters()} == {torch.float32}
    assert not own.training
    assert_equal(own, native, anyres)


def test_linear_projector_of_the_first_release() -> None:
    """Against CLIP and the LLM on their own, with the projection written out."""
    tower, llm = tiny_llava.tower("clip"), tiny_blip2.llm("llama", vocab_size=WORDS)
    weight, bias = torch.randn(20, 32) * 0.2, torch.randn(20) * 0.2
    weights = {**llm.state_dict(), "model.mm_projector.weight": weight, "model.mm_projector.bias": bias}
    base = built(tower, projector_type="linear")
    own = from_original(weights, base=base)
    pixels, words = tiny.pixels(1), torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        states = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        embeds = llm.get_input_embeddings()(words)
        together = torch.cat([embeds[:, :1], states @ weight.T + bias, embeds[:, 1:]], dim=1)
        wanted = llm(inputs_embeds=together).logits
        ids = torch.cat([words[:, :1], torch.full((1, tiny_llava.PATCHES), IMAGE), words[:, 1:]], dim=1)
        found = own(input_ids=ids, pixel_values=pixels).logits[..., :WORDS]
    torch.testing.assert_close(found, wanted, **CLOSE)


def test_numbers_are_cast_to_those_of_the_base() -> None:
    native, _ = pair(False)
    half = {name: tensor.half() for name, tensor in original(native).items()}
    base = built(native.model.vision_tower).to(torch.bfloat16)
    own = from_original(half, base=base)
    assert {parameter.dtype for parameter in own.parameters()} == {torch.bfloat16}
    found = own.model.language_model.model.norm.weight
    assert torch.equal(found, native.model.language_model.norm.weight.half().bfloat16())


def test_buffers_of_earlier_versions_are_left_out() -> None:
    native, _ = pair(False)
    more = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(5),
        f"{TOWER}embeddings.position_ids": torch.arange(17)[None],
    }
    own = from_original({**original(native), **more}, base=built(native.model.vision_tower))
    assert_equal(own, native, False)


# --- projectors


@pytest.mark.parametrize("anyres", [False, True])
def test_projector_alone(anyres: bool) -> None:
    native, own = pair(anyres)
    tiny.randomise(own.model.projector, 0.1)
    before = copies(own)
    assert from_original(projector_of(original(native)), base=own) is own
    assert_equal(own, native, anyres)
    after = own.state_dict()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {name for name in after if name.startswith("model.projector.")}


def test_projector_with_embeddings() -> None:
    """As saved when `<im_start>` and `<im_end>` are trained."""
    native, own = pair(False)
    nn.init.zeros_(own.get_input_embeddings().weight)
    weights = original(native)
    from_original({**projector_of(weights), EMBEDDINGS: weights[EMBEDDINGS]}, base=own)
    assert_equal(own, native, False)
    assert not own.get_input_embeddings().weight[WORDS:].any()


# --- refusals


def without(*names: str):
    return lambda weights: {name: tensor for name, tensor in weights.items() if name not in names}


def with_tensor(name: str, *shape: int):
    return lambda weights: {**weights, name: torch.zeros(shape)}


def linear(weights: Weights) -> Weights:
    kept = {name: tensor for name, tensor in weights.items() if "mm_projector" not in name}
    return {**kept, "model.mm_projector.weight": torch.zeros(20, 32), "model.mm_projector.bias": torch.zeros(20)}


def more_words(weights: Weights) -> Weights:
    return {**weights, EMBEDDINGS: torch.zeros(ROWS + 3, 20), HEAD: torch.zeros(ROWS + 3, 20)}


def lora(weights: Weights) -> Weights:
    return {f"base_model.model.{name}": tensor for name, tensor in projector_of(weights).items()}


def two_words(weights: Weights) -> Weights:
    return {**projector_of(weights), EMBEDDINGS: torch.zeros(2, 20)}


def part_of_the_tower(weights: Weights) -> Weights:
    name = f"{TOWER}embeddings.class_embedding"
    return {**projector_of(weights), name: weights[name]}


def refused(call, *args, **kwargs) -> str:
    """The one line of a ValueError."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (linear, 'The checkpoint\'s projector is "linear", but the model\'s is "mlp": set projector_type="linear".'),
        (with_tensor(NEWLINE, 20), "has an image newline, but the model does not use tiles"),
        (
            more_words,
            "The checkpoint has 67 tokens, but the model has only 64 rows of embeddings: build the model with "
            "image_token_id=67.",
        ),
        (two_words, "has only the rows of the two added tokens"),
        (lora, "The weights are LoRA weights: merge them"),
        (without(LAYER), f"do not match the model; missing: {LAYER}."),
        (without(HEAD), f"do not match the model; missing: {HEAD}."),
        (without(EMBEDDINGS), f"do not match the model; missing: {EMBEDDINGS}."),
        (without("model.mm_projector.2.bias"), "do not match the model; missing: model.mm_projector.2.bias."),
        (part_of_the_tower, f"do not match the model; missing: {TOWER}embeddings.patch_embedding.weight, "),
        (
            with_tensor("model.mm_projector.4.bias", 20),
            "do not match the model; unexpected: model.mm_projector.4.bias.",
        ),
        (with_tensor(LAYER, 40, 21), f"do not match the model; wrong shape: {LAYER} (40, 21) instead of (40, 20)."),
        (with_tensor(EMBEDDINGS, 40, 21), f"wrong shape: {EMBEDDINGS} (40, 21) instead of (64, 20)."),
        (with_tensor(EMBEDDINGS), f"wrong shape: {EMBEDDINGS} () instead of (64, 20)."),
        (
            with_tensor("model.mm_projector.0.weight", 20, 48),
            "do not match the model; wrong shape: model.mm_projector.0.weight (20, 48) instead of (20, 32).",
        ),
    ],
)
def test_what_does_not_fit_changes_nothing(change, message: str) -> None:
    native, _ = pair(False)
    base = built(native.model.vision_tower).train()
    before = copies(base)
    assert message in refused(from_original, change(original(native)), base=base)
    assert base.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


def test_tiles_without_a_newline_are_refused() -> None:
    native, base = pair(True)
    weights = without(NEWLINE)(projector_of(original(native)))
    assert "has no image newline, but the model uses tiles" in refused(from_original, weights, base=base)


def test_head_that_the_base_ties_is_refused() -> None:
    native, base = pair(False, "llama, tied")
    weights = original(native)
    from_original({**weights, HEAD: weights[EMBEDDINGS]}, base=base)
    message = refused(from_original, {**weights, HEAD: weights[EMBEDDINGS] + 1}, base=base)
    assert message.startswith("The checkpoint's output layer differs from its embeddings")


def test_parts_that_are_nowhere_are_asked_for() -> None:
    native, own = pair(False)
    weights = original(native)
    for given, parts, kind in (
        (original(native, tower=False), "image tower", "mlp"),
        (projector_of(weights), "image tower and LLM", "mlp"),
        (projector_of(linear(weights)), "image tower and LLM", "linear"),
        ({**projector_of(weights), **{name: weights[name] for name in weights if TOWER in name}}, "LLM", "mlp"),
    ):
        for config in (None, own.config):
            assert refused(from_original, given, config) == (
                f"This LLaVA checkpoint lacks the {parts}: pass base=VlmLlavaForConditionalGeneration.from_parts("
                f'tower, llm, projector_type="{kind}").'
            )
    assert refused(from_original, weights).endswith("pass a config or a base.")


def test_a_base_that_does_not_serve() -> None:
    native, own = pair(False)
    weights = original(native)
    assert refused(from_original, weights, own.config, base=own).endswith(
        "base already has a config: pass only one of them."
    )
    assert refused(from_original, weights, base=own.model).startswith("base is a VlmLlavaModel")
    clip = {"visual.class_embedding": torch.zeros(3)}
    assert refused(from_original, clip, base=own).startswith("base is only for weights in the layout of LLaVA's")
    assert "offloaded" in refused(from_original, weights, base=own.to("meta"))


def test_targets_are_the_tensors_of_the_model() -> None:
    """Written to, they change it: none is a copy."""
    _, own = pair(True)
    for base in (own, built(tiny_llava.tower("own"), anyres=True, projector_type="linear")):
        with torch.no_grad():
            for tensor in targets_of(base).values():
                tensor.fill_(7)
        assert all((tensor == 7).all() for tensor in base.state_dict().values())


# --- files and folders


@pytest.fixture(scope="module")
def native() -> PreTrainedModel:
    return pair(False)[0]


@pytest.mark.parametrize("kind", ["safetensors", "safetensors in parts", "pickle", "pickle in parts", "both", "file"])
def test_files(kind: str, native: PreTrainedModel, tmp_path: Path) -> None:
    weights, path = original(native), tmp_path
    size = "20KB" if "parts" in kind else "1GB"
    if kind == "file":
        path = tmp_path / "model_state_dict.bin"
        torch.save(weights, path)
    else:
        save_torch_state_dict(weights, tmp_path, max_shard_size=size, safe_serialization="pickle" not in kind)
        torch.save({"model.mm_projector.0.weight": torch.zeros(3)}, tmp_path / "mm_projector.bin")
    if kind == "both":
        torch.save({}, tmp_path / "pytorch_model.bin")
    assert ("parts" in kind) == bool(list(tmp_path.glob("*-00002-of-*")))
    for given in (path, str(path)):
        assert_equal(from_original(given, base=built(native.model.vision_tower)), native, False)


def test_folder_of_a_projector(native: PreTrainedModel, tmp_path: Path) -> None:
    own = from_transformers(native)
    nn.init.zeros_(own.model.projector.linear_2.weight)
    torch.save(projector_of(original(native)), tmp_path / "mm_projector.bin")
    assert_equal(from_original(tmp_path, base=own), native, False)


def test_folders_that_cannot_be_read(tmp_path: Path) -> None:
    assert refused(from_original, tmp_path).startswith(
        f"{tmp_path} holds no weights; expected one of model.safetensors, "
    )
    index = tmp_path / "model.safetensors.index.json"
    for text in (
        "",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": "b", "c": 3}}',
    ):
        index.write_text(text)
        assert refused(from_original, tmp_path) == f"{index} is not an index of weight files: replace it."
    save_file({"model.mm_projector.weight": torch.zeros(2, 2)}, tmp_path.parent / "outside.safetensors")
    for name in ("../outside.safetensors", str(tmp_path.parent / "outside.safetensors"), "a/../../b.safetensors", "."):
        index.write_text(json.dumps({"weight_map": {"model.mm_projector.weight": name}}))
        assert refused(from_original, tmp_path) == (
            f"{index} lists {name}, but only files in the folder of the index are read."
        )
    index.write_text(json.dumps({"weight_map": {"model.mm_projector.weight": ".."}}))
    assert "is not a weights file" in refused(from_original, tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}}))
    assert refused(from_original, tmp_path) == (
        f"{tmp_path} lacks model-00001-of-00001.safetensors, which {index.name} lists: download the missing file."
    )


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin", "non_lora_trainables.bin"])
def test_lora_folder_is_refused(name: str, tmp_path: Path) -> None:
    torch.save({"model.mm_projector.weight": torch.zeros(2, 2)}, tmp_path / "mm_projector.bin")
    (tmp_path / name).touch()
    assert refused(from_original, tmp_path).startswith(f"{tmp_path} holds LoRA weights: merge them")


class Code:
    def __reduce__(self):
        return (Path.touch, (Path("code_was_run"),))


@pytest.mark.filterwarnings("ignore:.*TorchScript archive:UserWarning")
def test_pickles_with_code_and_damaged_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tensors = {"model.mm_projector.weight": torch.zeros(20, 32)}
    path = Path("mm_projector.bin")
    torch.save({**tensors, "model.mm_projector.bias": Code()}, path)
    damaged = [path.read_bytes()]
    for zipped in (True, False):
        torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
        whole = path.read_bytes()
        damaged += [whole[:length] for length in (0, 1, 2, 10, len(whole) // 2, len(whole) - 4)]
    damaged += [b"(", b"c", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"]
    for content in damaged:
        path.write_bytes(content)
        for given in (path, Path()):
            assert refused(from_original, given).startswith(f"{path} cannot be read as plain tensors")
    assert not Path("code_was_run").exists()
    for content in ([torch.zeros(2)], torch.zeros(2), {"model": 3}, {"a": [1]}, {3: torch.zeros(2)}):
        torch.save(content, path)
        assert refused(from_original, path).startswith(f"{path} does not hold a dict of tensors")
