"""BLIP's objectives against closed forms written out with plain loops, and what its parts must and must not do."""

import copy
import math
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel, Trainer, TrainingArguments

from cases import tiny
from cases.case import rows_projected
from hf_vlm import (
    VlmBlipForConditionalGeneration,
    VlmBlipForImageTextRetrieval,
    VlmBlipForPreTraining,
    VlmBlipForQuestionAnswering,
)
from hf_vlm.models.losses import sample_negatives
from hf_vlm.models.momentum import FeatureQueue

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
HEADS = [
    VlmBlipForPreTraining,
    VlmBlipForImageTextRetrieval,
    VlmBlipForConditionalGeneration,
    VlmBlipForQuestionAnswering,
]
IDS = torch.tensor([3, 1, 3, 2, 1])
ANSWERS = ["red", "two tree", "a", "right of the house", "blue"]


def labels_of(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)


def loss_inputs(head: type[PreTrainedModel], inputs: dict[str, torch.Tensor]) -> dict:
    """A batch with what a head needs for its loss."""
    if head is VlmBlipForConditionalGeneration:
        return {**inputs, "labels": labels_of(inputs)}
    if head is VlmBlipForQuestionAnswering:
        return {**inputs, "labels": labels_of(tiny.blip_tokens((ANSWERS * 2)[: len(inputs["input_ids"])]))}
    return {**inputs, "return_loss": True, "sample_seed": 0}


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_all_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


def unit(rows: int, dim: int = 16) -> torch.Tensor:
    return F.normalize(torch.randn(rows, dim), dim=-1)


@torch.no_grad()
def moved(model: nn.Module) -> None:
    """Takes a step in a random direction, so that the averages lag behind."""
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))


# --- closed forms


def soft_cross_entropy(row, candidates, row_m, positives, temperature, alpha) -> float:
    """One row against all candidates: `alpha` of the averaged encoders' distribution, the rest even over positives."""
    scores = [float(row @ c) / temperature for c in candidates]
    scores_m = [float(row_m @ c) / temperature for c in candidates]
    log_sum = math.log(sum(math.exp(s) for s in scores))
    sum_m = sum(math.exp(s) for s in scores_m)
    loss = 0.0
    for i, score in enumerate(scores):
        target = alpha * math.exp(scores_m[i]) / sum_m + (1 - alpha) * (i in positives) / len(positives)
        loss -= target * (score - log_sum)
    return loss


@pytest.mark.parametrize("queued", [0, 3, 8, 11], ids=lambda rows: f"{rows} rows queued")
@pytest.mark.parametrize("ids", [None, IDS], ids=["no ids", "ids"])
def test_contrastive_loss(ids: torch.Tensor | None, queued: int) -> None:
    """A queue of eight: empty, in part, full, overflown; with ids of the batch in it."""
    model = tiny.blip_model(itm_weight=0.0, lm_weight=0.0)
    averaged, queue = copy.deepcopy(model), model.momentum.queue
    rows = [(unit(1)[0], unit(1)[0], int(i % 5)) for i in range(queued)]
    for start in range(0, queued, 3):
        images, texts, their_ids = zip(*rows[start : start + 3], strict=True)
        queue.add(torch.stack(images), torch.stack(texts), torch.tensor(their_ids))
    moved(model)
    inputs, alpha, temperature = tiny.blip_inputs(), 0.3, model.similarity.temperature.item()
    output = model(**inputs, pair_ids=ids, return_loss=True, soft_target_weight=alpha)
    with torch.no_grad():
        images = model.get_image_features(inputs["pixel_values"]).pooler_output.double()
        texts = model.get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output.double()
        images_m = averaged.get_image_features(inputs["pixel_values"]).pooler_output.double()
        texts_m = averaged.get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output.double()
    assert (images - images_m).norm() > 0.1
    kept = rows[-8:]
    own = list(range(5)) if ids is None else ids.tolist()
    candidate_ids = own + ([None] * len(kept) if ids is None else [row[2] for row in kept])
    all_images = [*images_m, *(row[0].double() for row in kept)]
    all_texts = [*texts_m, *(row[1].double() for row in kept)]
    total = 0.0
    for i in range(5):
        positives = [j for j, other in enumerate(candidate_ids) if other == own[i]]
        total += soft_cross_entropy(images[i], all_texts, images_m[i], positives, temperature, alpha)
        total += soft_cross_entropy(texts[i], all_images, texts_m[i], positives, temperature, alpha)
    assert output.loss_itc.item() == pytest.approx(total / 10, rel=1e-5)
    assert output.loss.item() == output.loss_itc.item()
    assert output.parts["itc"].tolist() == pytest.approx([total / 2, 5], rel=1e-5)
    assert output.logits_per_image.shape == (5, 5 + len(kept))


def test_queue_keeps_the_latest_rows_whatever_their_number() -> None:
    """Ragged batches, and one larger than the queue."""
    queue, rows, added = FeatureQueue(4, 2), torch.arange(26.0).view(13, 2), 0
    for count in (3, 2, 1, 6, 1):
        added += count
        latest = slice(added - count, added)
        queue.add(rows[latest], -rows[latest], torch.arange(13)[latest])
        images, texts, ids = queue.filled()
        expected = list(range(max(0, added - 4), added))
        assert sorted(ids.tolist()) == expected
        assert torch.equal(images[ids.argsort()], rows[expected])
        assert torch.equal(texts, -images)


@pytest.mark.parametrize(
    ("rows", "ids"),
    [(5, None), (5, IDS), (5, torch.tensor([1, 1, 1, 1, 2])), (5, torch.full((5,), 7)), (1, None), (2, None)],
    ids=["no ids", "ids", "one without equal", "all equal", "one pair", "two pairs"],
)
@pytest.mark.parametrize("itc_weight", [0.0, 1.0])
def test_matching_loss(rows: int, ids: torch.Tensor | None, itc_weight: float) -> None:
    """With the negatives that were drawn, pair by pair; a row without a possible negative is out of the mean."""
    model = tiny.blip_model(itc_weight=itc_weight, lm_weight=0.0).train()
    inputs = {name: tensor[:rows] for name, tensor in tiny.blip_inputs().items()}
    output = model(**inputs, pair_ids=ids, return_loss=True, sample_seed=4)
    own = torch.arange(rows) if ids is None else ids
    positives = own[:, None] == own
    if itc_weight:
        per_image, per_text = output.logits_per_image[:, :rows], output.logits_per_text[:, :rows]
    else:
        per_image = output.image_embeds @ output.text_embeds.T / model.similarity.temperature
        per_text = per_image.T
    images, has_image = sample_negatives(per_text, positives, 4)
    texts, has_text = sample_negatives(per_image, positives, 5)
    pairs = [(i, i, 1) for i in range(rows)]
    pairs += [(int(images[i]), i, 0) for i in range(rows) if has_image[i]]
    pairs += [(i, int(texts[i]), 0) for i in range(rows) if has_text[i]]
    assert all(own[image] != own[text] for image, text, label in pairs if not label)
    total = 0.0
    with torch.no_grad():
        for image, text, label in pairs:
            length = int(inputs["attention_mask"][text].sum())
            logits = model(inputs["pixel_values"][image, None], inputs["input_ids"][text, None, :length]).itm_logits
            total -= logits.double().log_softmax(dim=-1)[0, label].item()
    assert output.loss_itm.item() == pytest.approx(total / len(pairs), rel=1e-4)
    assert output.parts["itm"].tolist() == pytest.approx([total, len(pairs)], rel=1e-4)
    assert all(gradient.isfinite().all() for gradient in gradients(model, output.loss).values())


def test_hard_negatives_are_drawn_by_their_weights() -> None:
    """Chi-square over many rows; the softmax of the similarities, plus a little, without the positives."""
    torch.manual_seed(1)
    logits, positives = torch.randn(1, 6), torch.tensor([[True, False, False, False, True, False]])
    weights = (logits[0].softmax(dim=-1) + 1e-4).masked_fill(positives[0], 0.0)
    expected = weights / weights.sum() * 20000
    for seed in (None, 3):
        drawn, exists = sample_negatives(logits.expand(20000, -1), positives.expand(20000, -1), seed)
        counts = torch.bincount(drawn, minlength=6)
        assert exists.all()
        assert counts[positives[0]].sum() == 0
        possible = ~positives[0]
        assert ((counts - expected)[possible].square() / expected[possible]).sum() < 21  # 3 degrees, p < 1e-4


def test_hard_negatives_never_are_positives_even_at_the_edge() -> None:
    """Similarities so unlike that all weight but the smallest share is at positives."""
    logits = torch.tensor([[300.0, 0.0, 200.0], [0.0, 300.0, 200.0], [0.0, 200.0, 300.0]]).repeat(500, 1)
    positives = torch.eye(3, dtype=torch.bool).repeat(500, 1)
    drawn, exists = sample_negatives(logits, positives, 0)
    assert exists.all()
    assert not positives[torch.arange(1500), drawn].any()
    drawn, exists = sample_negatives(logits, torch.ones_like(positives), 0)
    assert not exists.any()
    assert drawn.max() < 3


def smoothed(log_probs: torch.Tensor, target: int, smoothing: float) -> float:
    even = sum(float(value) for value in log_probs) / len(log_probs)
    return -(1 - smoothing) * float(log_probs[target]) - smoothing * even


def test_caption_loss() -> None:
    """Label smoothing, padding, a prompt that is not learned, each token predicted by what precedes it."""
    model, inputs = tiny.blip_model(VlmBlipForConditionalGeneration, label_smoothing=0.1), tiny.blip_inputs()
    labels = labels_of(inputs)
    labels[1, :4] = -100
    with torch.no_grad():
        log_probs = model(**inputs).logits.double().log_softmax(dim=-1)
        output = model(**inputs, labels=labels)
        divided = model(**inputs, labels=labels, num_items_in_batch=7).loss.item()
        nothing = model(**inputs, labels=torch.full_like(labels, -100), num_items_in_batch=0).loss.item()
    assert nothing == 0.0
    terms = [
        smoothed(log_probs[row, place - 1], int(labels[row, place]), 0.1)
        for row in range(5)
        for place in range(1, labels.shape[1])
        if labels[row, place] != -100
    ]
    assert len(terms) == (inputs["attention_mask"].sum() - 5 - 3).item()
    assert output.loss.item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)
    assert output.parts["lm"].tolist() == pytest.approx([sum(terms), len(terms)], rel=1e-5)
    assert divided == pytest.approx(sum(terms) / 7, rel=1e-5)
    model.train()
    nothing = model(**inputs, labels=torch.full_like(labels, -100)).loss
    assert nothing.item() == 0
    assert all((gradient == 0).all() for gradient in gradients(model, nothing).values())


def test_pretraining_writes_like_the_captioner() -> None:
    """Also where the decoder has a memory of its own, and by default every real token is learned."""
    for shared in (True, False):
        model = tiny.blip_model(share_encoder_decoder=shared)
        captioner = VlmBlipForConditionalGeneration.from_pretraining(model).eval()
        inputs = tiny.blip_inputs()
        labels = labels_of(inputs)
        found = model(**inputs, return_loss=True).loss_lm
        torch.testing.assert_close(found, captioner(**inputs, labels=labels).loss, **CLOSE)
        labels[:, 2] = -100
        given = model(**inputs, labels=labels, return_loss=True).loss_lm
        torch.testing.assert_close(given, captioner(**inputs, labels=labels).loss, **CLOSE)
        assert (given - found).abs() > 1e-4


def test_answer_loss_with_several_weighted_answers_a_question() -> None:
    model, inputs = tiny.blip_model(VlmBlipForQuestionAnswering, label_smoothing=0.1), tiny.blip_inputs()
    answers = tiny.blip_tokens([*ANSWERS, "tree", "red cat"])
    index, weights = torch.tensor([0, 1, 2, 3, 4, 1, 1]), torch.tensor([1.0, 0.3, 1.0, 0.5, 1.0, 0.6, 0.1])
    with torch.no_grad():
        output = model(**inputs, labels=labels_of(answers), answer_index=index, answer_weights=weights)
        total = 0.0
        for row in range(7):  # alone, and without any padding
            question, length = int(index[row]), int(answers["attention_mask"][row].sum())
            question_ids = inputs["input_ids"][question][: int(inputs["attention_mask"][question].sum())]
            ids = answers["input_ids"][row, :length]
            logits = model(
                inputs["pixel_values"][question, None], question_ids[None], decoder_input_ids=ids[None]
            ).logits[0]
            log_probs = logits.double().log_softmax(dim=-1)
            total += weights[row].item() * sum(
                smoothed(log_probs[place - 1], int(ids[place]), 0.1) for place in range(1, length)
            )
    assert output.loss.item() == pytest.approx(total / 5, rel=1e-5)
    assert output.parts["lm"].tolist() == pytest.approx([total, 5], rel=1e-5)


@pytest.mark.parametrize("num_candidates", [1, 3, 7, 128])
def test_ranked_answers_by_brute_force(num_candidates: int) -> None:
    model, inputs = tiny.blip_model(VlmBlipForQuestionAnswering), tiny.blip_inputs()
    texts = ["red", "two tree", "dog", "a", "right of the house", "blue", "green house"]  # none begins like another
    answers = tiny.blip_tokens(texts)
    found = model.rank_answers(answers["input_ids"], answers["attention_mask"], **inputs, num_candidates=num_candidates)
    expected = []
    for row in range(5):
        question = inputs["input_ids"][row][: int(inputs["attention_mask"][row].sum())]
        likelihoods = []
        for text in texts:
            ids = tiny.blip_tokens([text])["input_ids"]
            with torch.no_grad():
                logits = model(inputs["pixel_values"][row, None], question[None], decoder_input_ids=ids).logits[0]
            likelihoods.append([float(logits[i - 1].log_softmax(-1)[ids[0, i]]) for i in range(1, ids.shape[1])])
        candidates = sorted(range(7), key=lambda i: -likelihoods[i][0])[:num_candidates]
        expected.append(max(candidates, key=lambda i: sum(likelihoods[i])))
    assert found.tolist() == expected
    assert num_candidates == 1 or len(set(expected)) > 1


# --- once an image, and never by the tower where features are given


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "not shared"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_images_are_projected_once_a_pass(shared: bool, checkpointing: bool) -> None:
    """Matching, its hard negatives and writing look at the same keys and values."""
    model, inputs = tiny.blip_model(share_encoder_decoder=shared).train(), tiny.blip_inputs()
    model.update_momentum()
    if checkpointing:
        model.activation_checkpointing_enable()
    towers: list[int] = []
    handle = model.model.vision_model.register_forward_hook(lambda *_: towers.append(1))
    with rows_projected(model) as calls:
        model(**inputs, return_loss=True).loss.backward()
    handle.remove()
    assert len(towers) == 1
    assert list(calls.values()) == [[5]] * (2 if shared else 4)


@pytest.mark.parametrize("head", [VlmBlipForConditionalGeneration, VlmBlipForQuestionAnswering])
@pytest.mark.parametrize("generation", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
def test_images_are_projected_once_for_all_tokens_and_beams(head: type[PreTrainedModel], generation: dict) -> None:
    model, inputs = tiny.blip_model(head), tiny.blip_inputs()
    with rows_projected(model) as calls:
        found = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, **generation)
    assert found.shape[0] == 5 * generation.get("num_return_sequences", 1)
    assert all(rows == [5] for rows in calls.values())


@pytest.mark.parametrize("head", HEADS)
def test_cached_features_take_the_place_of_the_tower(head: type[PreTrainedModel]) -> None:
    model, inputs = tiny.blip_model(head).train(), loss_inputs(head, tiny.blip_inputs())
    tower = model.model.vision_model
    with torch.no_grad():
        features = tower(pixel_values=inputs["pixel_values"]).last_hidden_state
    expected = gradients(model, model(**inputs).loss)
    calls: list[int] = []
    hook = tower.register_forward_hook(lambda *_: calls.append(1))
    found = gradients(model, model(**{**inputs, "pixel_values": None, "vision_features": features}).loss)
    hook.remove()
    assert calls == []
    assert any(name.startswith("model.vision_model.") for name in expected)
    assert_all_close(found, {n: g for n, g in expected.items() if not n.startswith("model.vision_model.")})


@pytest.mark.parametrize("head", HEADS)
def test_another_image_changes_the_loss(head: type[PreTrainedModel]) -> None:
    model, inputs = tiny.blip_model(head), loss_inputs(head, tiny.blip_inputs())
    with torch.no_grad():
        first = model(**inputs)
        inputs["pixel_values"] = inputs["pixel_values"].clone()
        inputs["pixel_values"][3] = torch.randn(3, 32, 32)
        second = model(**inputs)
    for name in ("loss", "loss_itc", "loss_itm", "loss_lm"):
        assert first.get(name) is None or (first[name] - second[name]).abs() > 1e-4, name


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_and_the_first_token_never_matter(head: type[PreTrainedModel], attention: str) -> None:
    """[DEC] and [ENC] come from the model, whatever stands in their place; what padding holds is never read."""
    model, inputs = tiny.blip_model(head), loss_inputs(head, tiny.blip_inputs())
    model.set_attn_implementation(attention)
    padded = {**inputs, **{name: F.pad(inputs[name], (0, 4)) for name in ("input_ids", "attention_mask")}}
    padded["input_ids"] = padded["input_ids"].masked_fill(padded["attention_mask"] == 0, 7)
    if "labels" in inputs:
        padded["labels"] = F.pad(inputs["labels"], (0, 4), value=-100)
        padded["labels"][:, 0] = 9 if head is VlmBlipForQuestionAnswering else -100
    with torch.no_grad():
        torch.testing.assert_close(model(**padded).loss, model(**inputs).loss, **CLOSE)
        if head in (VlmBlipForConditionalGeneration, VlmBlipForQuestionAnswering):
            padded["input_ids"] = padded["input_ids"].clone()
            padded["input_ids"][:, 0] = 8
            torch.testing.assert_close(model(**padded).loss, model(**inputs).loss, **CLOSE)


def test_matching_reads_enc_and_contrast_reads_cls() -> None:
    model, inputs = tiny.blip_model(), tiny.blip_inputs()
    other = {**inputs, "input_ids": inputs["input_ids"].clone()}
    other["input_ids"][:, 0] = 8
    first, second = model(**inputs), model(**other)
    assert torch.equal(first.itm_logits, second.itm_logits)
    assert (first.text_embeds - second.text_embeds).norm() > 0.1


# --- momentum and queue


def test_averages_and_queue_move_only_when_told() -> None:
    model, inputs = tiny.blip_model(momentum=0.9).train(), tiny.blip_inputs()
    momentum = model.momentum
    before = {name: tensor.clone() for name, tensor in momentum.state_dict().items()}
    moved(model)
    model.eval()
    for training in (False, True):  # also not by an evaluation between two steps
        model.train(training)
        assert not any(module.training for module in momentum.encoders.modules())
        with torch.no_grad():
            model(**inputs, return_loss=True)
    model.eval()(**inputs, return_loss=True).loss.backward()
    model.enqueue()
    assert momentum.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in momentum.state_dict().items())
    model.update_momentum()
    for name, module in model.averaged_modules().items():
        weights = dict(module.named_parameters())
        for key, average in momentum.encoders[name].named_parameters():
            expected = 0.9 * before[f"encoders.{name}.{key}"] + 0.1 * weights[key]
            torch.testing.assert_close(average, expected, **CLOSE)
            assert not average.requires_grad
    model.train()
    parts = [{name: tensor[rows] for name, tensor in inputs.items()} for rows in (slice(0, 3), slice(3, 5))]
    with torch.no_grad():
        expected = momentum.encoders["similarity"].embed_texts(
            momentum.encoders["text_encoder"](inputs["input_ids"], inputs["attention_mask"]).last_hidden_state
        )
    for part, ids in zip(parts, (IDS[:3], IDS[3:]), strict=True):
        model(**part, pair_ids=ids, return_loss=True).loss.backward()
        assert int(momentum.queue.count) == 0
    model.enqueue()
    _, texts, ids = momentum.queue.filled()
    torch.testing.assert_close(texts, expected, **CLOSE)
    assert ids.tolist() == IDS.tolist()
    model.enqueue()
    assert int(momentum.queue.count) == 5


def test_steps_that_are_never_enqueued_do_not_pile_up() -> None:
    model, inputs = tiny.blip_model(queue_size=8).train(), tiny.blip_inputs()
    for _ in range(6):
        model(**inputs, return_loss=True)
    assert sum(len(ids) for *_, ids in model.momentum.waiting) <= 13


def test_averages_are_no_part_of_the_weights(tmp_path: Path) -> None:
    model = tiny.blip_model()
    names = set(model.state_dict())
    model.update_momentum()
    assert set(model.state_dict()) == names == {n for n, _ in model.named_parameters()}
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == names
    later = tiny.blip_model()
    later.momentum.load_state_dict(model.momentum.state_dict())
    found, expected = later.momentum.state_dict(), model.momentum.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_temperature_is_clamped() -> None:
    similarity = tiny.blip_model().similarity
    for value, expected in ((-1.0, 0.001), (0.2, 0.2), (3.0, 0.5)):
        with torch.no_grad():
            similarity.temperature.fill_(value)
        similarity.clamp()
        assert similarity.temperature.item() == pytest.approx(expected)


# --- writing

PROMPTS = ["a red", "two", "", "the blue house and the", "a"]


def row_of(inputs: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    """One row of a batch, without its padding."""
    length = int(inputs["attention_mask"][row].sum())
    return {name: t[row, None] if name == "pixel_values" else t[row, None, :length] for name, t in inputs.items()}


@pytest.mark.parametrize("generation", [{}, {"num_beams": 3}], ids=str)
@pytest.mark.parametrize("head", [VlmBlipForConditionalGeneration, VlmBlipForQuestionAnswering])
def test_batches_are_written_as_if_alone(head: type[PreTrainedModel], generation: dict) -> None:
    """Prompts (or questions) of different lengths; each begins with [DEC], followed by its prompt."""
    model, inputs = tiny.blip_model(head), tiny.blip_inputs(PROMPTS)
    model.set_attn_implementation("sdpa")
    together = model.generate(**inputs, max_new_tokens=6, **generation)
    for row, prompt in enumerate(PROMPTS):
        alone = model.generate(**row_of(inputs, row), max_new_tokens=6, **generation)[0]
        assert alone[0] == tiny.DEC
        if head is VlmBlipForConditionalGeneration:
            words = tiny.blip_tokenizer()(prompt, add_special_tokens=False)["input_ids"]
            assert alone[1 : 1 + len(words)].tolist() == words
        found = [token for token in together[row].tolist() if token]
        assert found == [token for token in alone.tolist() if token]
    model.set_attn_implementation("eager")
    assert torch.equal(model.generate(**inputs, max_new_tokens=6, **generation), together)
    features = {**inputs, "pixel_values": None, "vision_features": model.model.encode_images(inputs["pixel_values"])}
    assert torch.equal(model.generate(**features, max_new_tokens=6, **generation), together)


def test_prompts_padded_on_either_side_are_one() -> None:
    model, inputs = tiny.blip_model(VlmBlipForConditionalGeneration), tiny.blip_inputs(PROMPTS)
    left = {**inputs, **tiny.blip_tokens(PROMPTS, padding_side="left")}
    assert not torch.equal(left["input_ids"], inputs["input_ids"])
    found = model.generate(**left, max_new_tokens=6, num_beams=2)
    assert torch.equal(found, model.generate(**inputs, max_new_tokens=6, num_beams=2))
    del inputs["attention_mask"]  # padding shows
    assert torch.equal(found, model.generate(**inputs, max_new_tokens=6, num_beams=2))


def test_captions_without_a_prompt_and_by_greedy_steps() -> None:
    """Without a cache: the likeliest token after all before it, until [SEP]."""
    model, pixel_values = tiny.blip_model(VlmBlipForConditionalGeneration), tiny.pixels(3)
    found = model.generate(pixel_values, max_new_tokens=6)
    for row in range(3):
        ids = [tiny.CLS]
        while len(ids) < 7 and ids[-1] != tiny.SEP:
            with torch.no_grad():
                logits = model(pixel_values[row, None], torch.tensor([ids])).logits[0, -1]
            ids.append(int(logits.argmax()))
        assert found[row].tolist()[: len(ids)] == [tiny.DEC, *ids[1:]]
        assert set(found[row].tolist()[len(ids) :]) <= {0}


def test_nucleus_sampling_is_seeded_and_looks_at_every_image() -> None:
    model, pixel_values = tiny.blip_model(VlmBlipForConditionalGeneration), tiny.pixels(4)
    options = {"do_sample": True, "top_p": 0.9, "max_new_tokens": 8}
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(model.generate(pixel_values, **options))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    several = model.generate(pixel_values, num_beams=3, num_return_sequences=3, max_new_tokens=5)
    for row in range(4):
        alone = model.generate(pixel_values[row, None], num_beams=3, num_return_sequences=3, max_new_tokens=5)
        assert torch.equal(several[3 * row : 3 * row + 3, : alone.shape[1]], alone)


# --- refusals, precision, accumulation


def test_texts_and_images_that_do_not_fit() -> None:
    model, inputs = tiny.blip_model(VlmBlipForConditionalGeneration), tiny.blip_inputs()
    with pytest.raises(ValueError, match="5 texts cannot be divided among 2 images"):
        model(**{**inputs, "pixel_values": inputs["pixel_values"][:2]})
    ids = torch.full((3, 4), 7)  # 12 tokens can be halved, 3 texts cannot
    with pytest.raises(ValueError, match="3 texts cannot be divided among 2 images"):
        model(tiny.pixels(2), ids)
    with pytest.raises(ValueError, match="Pass either pixel_values or vision_features"):
        model(input_ids=ids)
    with pytest.raises(ValueError, match="Texts of 17 tokens do not fit 16 positions"):
        model(tiny.pixels(3), torch.full((3, 17), 7))
    with pytest.raises(ValueError, match="Pass the texts as input_ids"):
        model(tiny.pixels(3))
    with pytest.raises(ValueError, match="Texts of 17 tokens do not fit 16 positions"):
        model.generate(tiny.pixels(3), min_new_tokens=16, max_new_tokens=20)
    with pytest.raises(StrictDataclassError, match="All three loss weights are 0"):
        tiny.blip_config(itc_weight=0.0, itm_weight=0.0, lm_weight=0.0)
    with pytest.raises(ValueError, match="The loss needs pairs, not 2 images and 4 texts"):
        tiny.blip_model()(tiny.pixels(2), torch.full((4, 5), 7), return_loss=True)


@pytest.mark.parametrize("head", HEADS)
def test_losses_in_bfloat16(head: type[PreTrainedModel]) -> None:
    model, inputs = tiny.blip_model(head).train(), loss_inputs(head, tiny.blip_inputs(["a red cat", "tree"]))
    plain = model(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(**inputs)
    for name in ("loss", "loss_itc", "loss_itm", "loss_lm"):
        if plain.get(name) is not None:
            assert mixed[name].dtype == torch.float32
            assert mixed[name].item() == pytest.approx(plain[name].item(), rel=0.05), name
    assert all(gradient.isfinite().all() for gradient in gradients(model, mixed.loss).values())


@pytest.mark.parametrize("split", [(8, 1), (2, 4), (1, 8)], ids=str)
def test_accumulation_does_not_change_the_captioners_step(split: tuple[int, int], tmp_path: Path) -> None:
    """transformers' Trainer over captions of unequal length: one SGD step is that of the whole batch."""
    model = tiny.blip_model(VlmBlipForConditionalGeneration)
    inputs = loss_inputs(VlmBlipForConditionalGeneration, tiny.blip_inputs((tiny.CAPTIONS * 2)[:8]))
    whole = copy.deepcopy(model)
    loss = whole(**inputs).loss
    expected = gradients(whole, loss)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    options = {"optim": "sgd", "lr_scheduler_type": "constant", "learning_rate": 1.0, "max_grad_norm": 0.0}
    options |= {"max_steps": 1, "use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=split[0], gradient_accumulation_steps=split[1], **options
    )
    rows = [{name: tensor[row] for name, tensor in inputs.items()} for row in range(8)]
    result = Trainer(model, arguments, train_dataset=rows).train()
    assert result.training_loss == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        error = (before[name] - parameter.detach() - expected[name]).norm()
        assert error <= 1e-6 * before[name].norm() + 1e-4 * expected[name].norm(), name
