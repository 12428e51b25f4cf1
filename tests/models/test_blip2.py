"""BLIP-2's first stage against closed forms written out with plain loops, on one rank and on two."""

import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import RobertaConfig, RobertaModel

from cases import tiny, tiny_blip2
from cases.case import rows_projected
from hf_vlm import VlmBlip2ForImageTextRetrieval, VlmBlip2ForPreTraining
from hf_vlm.models.losses import sample_negatives
from processes import relative_errors, torchrun
from scripts import blip2_steps

CAPTIONS = [*tiny.CAPTIONS, "a cat and a dog", "the right of the house", "two red tree ."]
IDS = torch.tensor([3, 1, 3, 2, 1, 5, 3, 7])


def inputs_of(count: int) -> dict[str, torch.Tensor]:
    return tiny_blip2.stage1_inputs(CAPTIONS[:count])


def smoothed_cross_entropy(scores: list[float], positives: list[int], smoothing: float) -> float:
    log_sum = math.log(sum(math.exp(score) for score in scores))
    targets = [
        (1 - smoothing) * (i in positives) / len(positives) + smoothing / len(scores) for i in range(len(scores))
    ]
    return -sum(target * (score - log_sum) for target, score in zip(targets, scores, strict=True))


@pytest.mark.parametrize("count", [5, 8])
@pytest.mark.parametrize("ids", [None, IDS], ids=["no ids", "ids"])
def test_contrast_takes_the_best_query(ids: torch.Tensor | None, count: int) -> None:
    model, inputs = tiny_blip2.blip2_model(itm_weight=0.0, lm_weight=0.0), inputs_of(count)
    ids = None if ids is None else ids[:count]
    output = model(**inputs, pair_ids=ids, return_loss=True)
    with torch.no_grad():
        images = model.get_image_features(inputs["pixel_values"]).pooler_output
        texts = model.get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output
    assert images.shape == (count, tiny_blip2.QUERIES, 16)
    torch.testing.assert_close(images.norm(dim=-1), torch.ones(count, tiny_blip2.QUERIES))
    temperature = model.similarity.temperature.item()
    scores = [[max(float(query @ text) for query in image) / temperature for text in texts] for image in images]
    best = {int(torch.tensor([float(q @ t) for q in image]).argmax()) for image in images for t in texts}
    assert len(best) > 1  # no one query is the best everywhere
    own = list(range(count)) if ids is None else ids.tolist()
    total = 0.0
    for i in range(count):
        positives = [j for j in range(count) if own[j] == own[i]]
        total += smoothed_cross_entropy(scores[i], positives, 0.1)
        total += smoothed_cross_entropy([row[i] for row in scores], positives, 0.1)
    assert output.loss_itc.item() == pytest.approx(total / (2 * count), rel=1e-5)
    assert output.loss.item() == output.loss_itc.item()
    assert output.loss_itm is None
    assert output.loss_lm is None


@pytest.mark.parametrize("ids", [None, IDS[:5]], ids=["no ids", "ids"])
def test_matching_is_the_mean_over_queries(ids: torch.Tensor | None) -> None:
    """Every pair by itself: the mean of its queries' logits; negatives are never positives."""
    model, inputs = tiny_blip2.blip2_model(lm_weight=0.0), inputs_of(5)
    output = model(**inputs, pair_ids=ids, return_loss=True, sample_seed=3)
    own = torch.arange(5) if ids is None else ids
    positives = own[:, None] == own
    images, _ = sample_negatives(output.logits_per_text, positives, 3)
    texts, _ = sample_negatives(output.logits_per_image, positives, 4)
    assert not positives[torch.arange(5), images].any()
    assert not positives[torch.arange(5), texts].any()
    pairs = [(i, i) for i in range(5)]
    pairs += [(int(images[i]), i) for i in range(5)] + [(i, int(texts[i])) for i in range(5)]
    total = 0.0
    for row, (image, text) in enumerate(pairs):
        length = int(inputs["attention_mask"][text].sum())
        with torch.no_grad():
            states = model.model.encode_images(inputs["pixel_values"][image : image + 1])
            memory = model.model.qformer.project_memory(states)
            tokens = inputs["input_ids"][text : text + 1, :length]
            queries = model.model.qformer(memory, tokens).last_hidden_state[0, : tiny_blip2.QUERIES]
            logits = torch.stack([model.itm_head(query) for query in queries]).mean(dim=0)
        torch.testing.assert_close(output.itm_logits[row].detach(), logits, rtol=1e-4, atol=1e-5)
        total -= float(logits.log_softmax(dim=-1)[int(row < 5)])
    assert output.loss_itm.item() == pytest.approx(total / 15, rel=1e-5)
    assert output.parts["itm"].tolist() == pytest.approx([total, 15], rel=1e-5)


def naive_states(model: VlmBlip2ForPreTraining, states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Text states `(1, L, H)` of one pass over queries and text under a mask, written out layer by layer."""
    qformer, num_queries, length = model.model.qformer, tiny_blip2.QUERIES, tokens.shape[1]
    hidden = qformer.embeddings(1, tokens, True)
    seen = torch.ones(num_queries + length, num_queries + length).tril().bool()
    seen[:num_queries] = False
    seen[:, :num_queries] = True
    for layer in qformer.layers:
        attention, cross = layer.self_attention, layer.cross_attention

        def heads(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.unflatten(-1, (2, 12)).transpose(1, 2)

        query, key, value = (heads(part) for part in attention.qkv(hidden).chunk(3, dim=-1))
        scores = (query @ key.mT / math.sqrt(12)).masked_fill(~seen, -torch.inf)
        hidden = attention.norm(hidden + attention.proj((scores.softmax(-1) @ value).transpose(1, 2).flatten(2)))
        queries, text = hidden[:, :num_queries], hidden[:, num_queries:]
        if cross is not None:
            key, value = (heads(part) for part in cross.key_value(states).chunk(2, dim=-1))
            scores = heads(cross.query(queries)) @ key.mT / math.sqrt(12)
            queries = cross.norm(queries + cross.proj((scores.softmax(-1) @ value).transpose(1, 2).flatten(2)))
        hidden = torch.cat([layer.query_mlp(queries), layer.mlp(text)], dim=1)
    return hidden[:, num_queries:]


def test_writing_is_one_causal_pass_over_queries_and_text() -> None:
    """The text sees the queries and what precedes it; queries do not see the text. One row at a time, unpadded."""
    model, inputs = tiny_blip2.blip2_model(), inputs_of(5)
    output = model(**inputs, return_loss=True, sample_seed=0)
    total, count = 0.0, 0
    with torch.no_grad():
        images = model.model.encode_images(inputs["pixel_values"])
        for row in range(5):
            tokens = inputs["input_ids"][row : row + 1, : int(inputs["attention_mask"][row].sum())].clone()
            targets = tokens[0, 1:].clone()
            assert tokens[0, 0] == tiny.CLS
            tokens[0, 0] = tiny_blip2.DEC
            logits = model.lm_head(naive_states(model, images[row : row + 1], tokens))[0, :-1]
            losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=0.1)
            total, count = total + float(losses.sum()), count + len(losses)
    assert output.loss_lm.item() == pytest.approx(total / count, rel=1e-5)
    assert output.parts["lm"].tolist() == pytest.approx([total, count], rel=1e-5)
    whole = output.loss_itc + output.loss_itm + output.loss_lm
    assert output.loss.item() == pytest.approx(whole.item(), rel=1e-6)


def test_an_image_is_projected_once_for_all_passes() -> None:
    model, inputs = tiny_blip2.blip2_model(), inputs_of(5)
    with rows_projected(model) as calls:
        model(**inputs, return_loss=True).loss.backward()
    assert list(calls.values()) == [[5], [5]]


def test_sample_seed_alone_decides_the_negatives() -> None:
    model, inputs = tiny_blip2.blip2_model(), inputs_of(8)
    losses = [model(**inputs, return_loss=True, sample_seed=seed).loss_itm.item() for seed in (0, 0, 1, 2, 3)]
    assert losses[0] == losses[1]
    assert len({*losses}) > 2


@pytest.mark.parametrize(("count", "ids"), [(1, None), (1, [4]), (3, [4, 4, 4])])
def test_nothing_to_contrast_with(count: int, ids: list[int] | None) -> None:
    """A batch of one, or of one id: no negatives; matching counts the pairs alone, and all gradients are finite."""
    model, inputs = tiny_blip2.blip2_model().train(), inputs_of(count)
    output = model(**inputs, pair_ids=ids and torch.tensor(ids), return_loss=True)
    output.loss.backward()
    assert output.parts["itm"][1] == count
    expected = F.cross_entropy(output.itm_logits[:count], torch.ones(count, dtype=torch.long))
    assert output.loss_itm.item() == pytest.approx(expected.item(), rel=1e-5)
    if count == 1:
        assert output.loss_itc.item() == pytest.approx(0.0, abs=1e-6)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


def test_padding_changes_nothing() -> None:
    model, inputs = tiny_blip2.blip2_model(), inputs_of(5)
    padded = {
        **inputs,
        "input_ids": F.pad(inputs["input_ids"], (0, 3)),
        "attention_mask": F.pad(inputs["attention_mask"], (0, 3)),
    }
    losses = [model(**batch, return_loss=True, sample_seed=0) for batch in (inputs, padded)]
    for name in ("loss_itc", "loss_itm", "loss_lm"):
        assert losses[0][name].item() == pytest.approx(losses[1][name].item(), rel=1e-5)


def test_without_a_loss_pairs_are_matched() -> None:
    """And the text's `[CLS]` is not replaced in the caller's tensor by a loss before."""
    model, inputs = tiny_blip2.blip2_model(), inputs_of(5)
    before = inputs["input_ids"].clone()
    trained = model(**inputs, return_loss=True, sample_seed=0)
    found = model(**inputs)
    assert torch.equal(inputs["input_ids"], before)
    assert found.loss is None
    torch.testing.assert_close(found.itm_logits, trained.itm_logits[:5], rtol=1e-5, atol=1e-5)


def test_nothing_learned_has_loss_zero_with_a_graph() -> None:
    model, inputs = tiny_blip2.blip2_model(itc_weight=0.0, itm_weight=0.0), inputs_of(5)
    output = model(**inputs, labels=torch.full_like(inputs["input_ids"], -100), return_loss=True)
    assert output.loss_lm.item() == 0.0
    output.loss.backward()


@pytest.mark.parametrize("weight", ["itc_weight", "itm_weight", "lm_weight"])
def test_what_a_loss_of_no_weight_needs_alone_is_frozen(weight: str) -> None:
    """A trained parameter without a gradient stalls data parallelism."""
    model, inputs = tiny_blip2.blip2_model(**{weight: 0.0}), inputs_of(5)
    model(**inputs, return_loss=True).loss.backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_temperature_is_clamped() -> None:
    model = tiny_blip2.blip2_model()
    for value, expected in ((9.0, 0.5), (-1.0, 0.001)):
        torch.nn.init.constant_(model.similarity.temperature, value)
        model.similarity.clamp()
        assert model.similarity.temperature.item() == pytest.approx(expected)


def test_what_does_not_fit_is_refused() -> None:
    model, inputs = tiny_blip2.blip2_model(), inputs_of(5)
    with pytest.raises(ValueError, match="The loss needs pairs, not 3 images and 5 texts"):
        model(**{**inputs, "pixel_values": inputs["pixel_values"][:3]}, return_loss=True)
    with pytest.raises(ValueError, match="Pass the texts as input_ids"):
        model(pixel_values=inputs["pixel_values"])
    with pytest.raises(ValueError, match="tokenize with truncation=True"):
        model(inputs["pixel_values"][:1], torch.ones(1, 20, dtype=torch.long))
    with pytest.raises(ValueError, match="needs the Q-Former's text branch"):
        tiny_blip2.blip2_model(qformer={"use_text": False})
    roberta = RobertaModel(RobertaConfig(vocab_size=30, **tiny.layer_sizes(24, heads=2)))
    with pytest.raises(ValueError, match="start from a BERT, not a roberta"):
        VlmBlip2ForPreTraining.from_parts(tiny.clip_model(), roberta)


# --- from parts


def test_from_parts_reads_as_the_bert() -> None:
    """Text alone is the BERT's; the queries' feed-forward layers begin as the text's; the tower is the given one's."""
    bert, clip = tiny_blip2.bert(), tiny.clip_model()
    model = VlmBlip2ForPreTraining.from_parts(clip, bert, num_query_tokens=5, dropout=0.0, projection_dim=8).eval()
    inputs = inputs_of(5)
    with torch.no_grad():
        found = model.model.qformer(None, inputs["input_ids"], inputs["attention_mask"]).last_hidden_state
        expected = bert(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-5)
    for layer in model.model.qformer.layers:
        for name, tensor in layer.mlp.state_dict().items():
            assert torch.equal(tensor, layer.query_mlp.state_dict()[name])
    assert model.config.qformer_config.bos_token_id == tiny_blip2.DEC
    assert model.lm_head.decoder.weight is model.model.qformer.embeddings.word_embedding.weight
    assert model.get_image_features(inputs["pixel_values"]).pooler_output.shape == (5, 5, 8)
    for name, tensor in clip.vision_model.state_dict().items():
        assert torch.equal(model.model.vision_model.state_dict()[name], tensor), name
    assert all(p.requires_grad for p in clip.vision_model.parameters())
    assert not any(p.requires_grad for p in model.model.vision_model.parameters())


# --- two ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict]:
    """What one process did, and what two ranks did."""
    folder = tmp_path_factory.mktemp("ranks")
    one = blip2_steps.main(folder)
    torchrun("blip2_steps", folder)
    return one, torch.load(folder / "results-2.pt", weights_only=False)


@pytest.mark.parametrize("case", blip2_steps.CASES, ids=", ".join)
def test_two_ranks_are_one_process(case: tuple[str, ...], ranks: tuple[dict, dict]) -> None:
    """Hard negatives come from the other rank too; texts are padded to the longest of each."""
    one, two = (dict(results[case]) for results in ranks)
    longest = [int(results.pop("counts")[3]) for results in (one, two)]
    assert longest[1] < longest[0]
    errors = relative_errors(two, one)
    assert {name: error for name, error in errors.items() if not error <= 1e-5} == {}
    assert ("loss_lm" in one) == (case[0] == "pretraining")


@pytest.mark.parametrize("case", [case for case in blip2_steps.CASES if case[3] == "plain"], ids=", ".join)
def test_only_negatives_travel_and_are_projected_once(case: tuple[str, ...], ranks: tuple[dict, dict]) -> None:
    travelled, projected, own, _ = ranks[1][case]["counts"].tolist()
    assert 0 < travelled <= own
    assert projected == own + travelled


@pytest.mark.parametrize("head", [VlmBlip2ForImageTextRetrieval, VlmBlip2ForPreTraining])
def test_heads_load_one_another(head: type, tmp_path: Path) -> None:
    model = tiny_blip2.blip2_model()
    model.save_pretrained(tmp_path)
    loaded = head.from_pretrained(tmp_path)
    inputs = inputs_of(5)
    with torch.no_grad():
        found, expected = loaded(**inputs), model(**inputs)
    torch.testing.assert_close(found.itm_logits, expected.itm_logits)
    assert hasattr(loaded, "lm_head") == (head is VlmBlip2ForPreTraining)
