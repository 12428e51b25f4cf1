"""The index: it finds what comparing every embedding finds, loses nothing, doubles nothing, and mixes no models."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.nn import functional as F

from cases import tiny
from hf_vlm.data import ImageError
from hf_vlm.evaluation import embed_images, embed_texts, retrieval_metrics
from hf_vlm.search import DatasetItems, EmbeddingIndex, Item, Result, text_items, write_sheet
from hf_vlm.search.filters import condition, literal
from hf_vlm.search.identity import weights_digest
from hf_vlm.search.store import Row, VectorTable
from hf_vlm.search.terminal import matches_table, printable

pytest.importorskip("lancedb")
PICTURES = 12
EVIL = "x' OR '1'='1"


@pytest.fixture(scope="module")
def clip():
    """A tiny model and its processor, the same for all tests of this file."""
    torch.manual_seed(0)
    return tiny.clip_model(), tiny.clip_processor()


def picture_items() -> list[Item]:
    """Images in two styles; the name of one is hard to quote."""
    styles = ("noto", EVIL)
    return [
        Item(f"p{i}", tiny.image(seed=i), f"picture {i}", metadata={"style": styles[i % 2], "year": 2000 + i})
        for i in range(PICTURES)
    ]


def caption_items() -> list[Item]:
    """A few descriptions."""
    return [Item(f"t{i}", text=text, kind="text") for i, text in enumerate(tiny.CAPTIONS)]


@pytest.fixture(scope="module")
def index(clip, tmp_path_factory):
    """An index of images and texts that tests only read."""
    items = [*picture_items(), *caption_items()]
    return EmbeddingIndex.build(tmp_path_factory.mktemp("index"), items, *clip, progress=False)[0]


@pytest.mark.parametrize("kind", ["image", "text", None])
@pytest.mark.parametrize(
    "query",
    [
        {"text": "a red cat"},
        {"image": 3},
        {"text": "a red cat", "image": 3, "text_weight": 0.7, "image_weight": 0.3},
        {"text": "the blue house", "minus": "a dog", "minus_weight": 0.8},
        {"image": 2, "minus_image": 5},
    ],
)
def test_search_equals_brute_force(index, clip, query, kind):
    parts = {name: tiny.image(seed=value) if name.endswith("image") else value for name, value in query.items()}
    found = index.search(**parts, kind=kind, k=4)
    pool = torch.cat(
        [
            embed_images(*clip, [item.image for item in picture_items()], progress=False),
            embed_texts(*clip, tiny.CAPTIONS, progress=False),
        ]
    )
    total = torch.zeros(pool.shape[1])
    for name, weight in (("text", "text_weight"), ("minus", "minus_weight")):
        if name in parts:
            sign = -1 if name == "minus" else 1
            total += (
                sign
                * query.get(weight, 0.5 if sign < 0 else 1.0)
                * embed_texts(*clip, [parts[name]], progress=False)[0]
            )
    for name, weight in (("image", "image_weight"), ("minus_image", "minus_weight")):
        if name in parts:
            sign = -1 if name == "minus_image" else 1
            total += (
                sign
                * query.get(weight, 0.5 if sign < 0 else 1.0)
                * embed_images(*clip, [parts[name]], progress=False)[0]
            )
    scores = pool @ F.normalize(total, dim=0)
    wanted = {"image": range(PICTURES), "text": range(PICTURES, len(pool)), None: range(len(pool))}[kind]
    best = sorted(wanted, key=lambda row: -scores[row])[:4]
    ids = [item.id for item in [*picture_items(), *caption_items()]]
    assert [match.id for match in found] == [ids[row] for row in best]
    np.testing.assert_allclose([match.score for match in found], scores[best].numpy(), atol=1e-5)


def test_filters(index):
    def ids(where, **options):
        return {match.id for match in index.search("cat", where=where, k=100, **options)}

    assert ids({"style": EVIL}) == {f"p{i}" for i in range(1, PICTURES, 2)}
    assert ids({"style": "noto", "year": [2000, 2002, 2003]}) == {"p0", "p2"}
    assert ids({"style": None}) == {f"t{i}" for i in range(len(tiny.CAPTIONS))}
    assert ids({"style": []}) == set()
    assert ids("year > 2009 AND style = 'noto'") == {"p10"}
    # A condition with OR stays within the kind.
    assert ids("year = 2000 OR text = 'tree'", kind="text") == {"t2"}
    # The filter comes first: the only one that passes is found, however far it is.
    for year in range(2000, 2000 + PICTURES):
        assert [match.metadata["year"] for match in index.search("cat", where={"year": year}, k=1)] == [year]


@pytest.mark.parametrize("value", ["'", "''", "a' OR 'b", "\\'", "x'; DROP TABLE items; --", "%", "\x00", "日本", '"'])
def test_quoted_values_are_values(clip, tmp_path, value):
    items = [Item("evil", text="tree", kind="text", metadata={"tag": value}), *caption_items()]
    index, _ = EmbeddingIndex.build(tmp_path / "index", items, *clip, progress=False)
    assert [match.id for match in index.search("cat", where={"tag": value})] == ["evil"]
    assert index.delete(where={"tag": value + "'"}) == 0
    assert index.delete(where={"tag": value}) == 1
    assert len(index) == len(tiny.CAPTIONS)


def test_wrong_queries_are_one_line(index):
    for query, message in [
        ({}, "nothing to search for"),
        ({"text": "cat", "minus": "cat", "minus_weight": 1.0}, "cancel"),
        ({"text": "cat", "where": {"no": 1}}, "style, year"),
        ({"text": "cat", "where": {"year": object()}}, "cannot compare with"),
        ({"text": "cat", "where": "year = = 3"}, "is invalid"),
        ({"text": "cat", "kind": "video"}, "kind='video' is unknown"),
        ({"text": "cat", "k": 0}, "at least 1"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            index.search(**query)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="what to delete"):
        index.delete()
    with pytest.raises(ValueError, match="no column"):
        condition("a`b", 1, pa.schema([("a", pa.int64())]))
    assert literal(True) == "TRUE"


def test_adding_again_replaces(clip, tmp_path):
    index, report = EmbeddingIndex.build(tmp_path / "index", picture_items(), *clip, progress=False)
    assert (report.added, report.replaced, len(index)) == (PICTURES, 0, PICTURES)
    new = Item("p1", tiny.image(seed=99), "another", metadata={"style": "new"})
    twice = [Item("p50", tiny.image(seed=1), "first"), Item("p50", tiny.image(seed=50), "last")]
    report = index.add([new, *twice], progress=False)
    assert (report.added, report.replaced, len(index)) == (1, 2, PICTURES + 1)
    best = index.search(image=tiny.image(seed=99), k=1)[0]
    assert (best.id, best.text, best.metadata["style"]) == ("p1", "another", "new")
    assert best.score == pytest.approx(1, abs=1e-5)
    assert index.search(image=tiny.image(seed=50), k=1)[0].text == "last"
    assert index.delete(["p1", "p2", "absent"]) == 2
    assert index.delete(where={"style": "noto"}) == PICTURES // 2 - 1
    assert {match.id for match in index.search("cat", k=100)} == {"p50", *(f"p{i}" for i in range(3, PICTURES, 2))}


def test_interrupted_build_goes_on(clip, tmp_path, monkeypatch):
    """An item that fails ends the first build; the second embeds only what the first did not."""
    items = [*picture_items(), Item("bad", b"no picture", place="bad.png"), *caption_items()]
    with pytest.raises(ImageError, match=r"bad\.png.*on_error"):
        EmbeddingIndex.build(tmp_path / "index", items, *clip, progress=False)
    assert len(EmbeddingIndex.open(tmp_path / "index")) == PICTURES
    model, processor = clip
    embedded = []
    handle = model.vision_model.register_forward_hook(lambda module, args, output: embedded.append(1))
    items[PICTURES] = Item("bad", tiny.image(seed=77))
    index, report = EmbeddingIndex.build(tmp_path / "index", items, model, processor, progress=False)
    assert (report.added, report.kept) == (1 + len(tiny.CAPTIONS), PICTURES)
    assert len(embedded) == 1
    EmbeddingIndex.build(tmp_path / "index", items, model, processor, progress=False)
    handle.remove()
    assert len(embedded) == 1
    assert len(index) == len(items)


def test_bad_items_are_left_out_and_reported(clip, tmp_path):
    folder = tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    for i in range(3):
        tiny.image(seed=i).save(folder / "deep" / f"{i}.png")
    (folder / "broken.png").write_bytes((folder / "deep" / "0.png").read_bytes()[:200])
    (folder / "notes.txt").write_text("not a picture")
    index, report = EmbeddingIndex.build(tmp_path / "index", folder, *clip, on_error="skip", progress=False)
    assert (report.added, len(report.errors), len(index)) == (3, 1, 3)
    assert str(folder / "broken.png") in str(report)
    best = index.search(image=folder / "deep" / "1.png", k=1)[0]
    assert best.path == str(folder / "deep" / "1.png")
    assert best.text == "deep/1.png"
    assert max(best.image.size) <= 96
    with pytest.raises(ImageError, match=r"broken\.png"):
        index.add(folder, progress=False)
    with pytest.raises(ValueError, match="on_error"):
        index.add(folder, on_error="ignore")


def test_another_model_is_refused(clip, index, tmp_path):
    model, processor = clip
    uri = tmp_path / "index"
    shutil.copytree(index.table.uri, uri)
    assert EmbeddingIndex.open(uri, model, processor).search("cat", k=1)
    torch.manual_seed(1)
    other = tiny.clip_model()
    with pytest.raises(ValueError, match="use that model") as error:
        EmbeddingIndex.open(uri, other, processor)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="use that model"):
        EmbeddingIndex.build(uri, caption_items(), other, processor)
    with pytest.raises(ValueError, match="already"):
        EmbeddingIndex.create(uri, model, processor)
    assert len(EmbeddingIndex.create(uri, other, processor, replace=True)) == 0


def test_digest_tells_models_not_precisions(clip):
    model, _ = clip
    again = tiny.clip_model()
    again.load_state_dict(model.state_dict())
    assert weights_digest(again) == weights_digest(model) == weights_digest(again.bfloat16())
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        again.text_projection.weight[0, 0] += 0.1
    assert weights_digest(again) != weights_digest(model)


def test_the_model_is_remembered(clip, tmp_path):
    model, processor = clip
    model.save_pretrained(tmp_path / "clip")
    processor.save_pretrained(tmp_path / "clip")
    loaded = tiny.VlmClipModel.from_pretrained(tmp_path / "clip").eval()
    index, _ = EmbeddingIndex.build(tmp_path / "index", caption_items(), loaded, processor, progress=False)
    expected = index.search("a red cat", k=3)
    again = EmbeddingIndex.open(tmp_path / "index")
    assert again.info()["model"] == str(tmp_path / "clip")
    assert again.search("a red cat", k=3) == expected
    (tmp_path / "clip").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="where it is now"):
        EmbeddingIndex.open(tmp_path / "index").search("a red cat")
    assert EmbeddingIndex.open(tmp_path / "index", loaded, processor).search("a red cat", k=3) == expected


def test_object_store_uri(clip, tmp_path):
    """The same code through LanceDB's object-store interface rather than its own for folders."""
    uri = f"file-object-store://{tmp_path}/index"
    index, report = EmbeddingIndex.build(uri, caption_items(), *clip, progress=False)
    assert (report.added, len(index)) == (len(tiny.CAPTIONS), len(tiny.CAPTIONS))
    again = EmbeddingIndex.open(uri, *clip)
    assert again.search("tree", k=1)[0].text == "tree"
    assert again.delete(["t0"]) == 1
    with pytest.raises(ValueError, match="no index here"):
        EmbeddingIndex.open(f"file-object-store://{tmp_path}/nothing")


def test_dataset(clip, tmp_path):
    rows = {
        "picture": [tiny.image(seed=i) for i in range(4)],
        "name": tiny.CAPTIONS[:4],
        "tags": [["a"], ["a", "b"], [], ["c'"]],
        "number": range(4),
        "box": [[1.0]] * 4,
    }
    data = datasets.Dataset.from_dict(rows).cast_column("picture", datasets.Image())
    items = DatasetItems(data, kinds=("image", "text"))
    assert len(items) == 8
    index, report = EmbeddingIndex.build(tmp_path / "index", items, *clip, progress=False)
    assert report.added == 8
    assert EmbeddingIndex.build(tmp_path / "index", items, *clip, progress=False)[1].kept == 8
    best = index.search(image=tiny.image(seed=2), k=1, kind="image")[0]
    assert (best.text, best.metadata["number"]) == (tiny.CAPTIONS[2], 2)
    assert {match.metadata["number"] for match in index.search("cat", where={"tags": "a"})} == {0, 1}
    assert {match.metadata["number"] for match in index.search("cat", where={"tags": ["b", "c'"]})} == {1, 3}
    with pytest.raises(ValueError, match="no column for words"):
        DatasetItems(data, {"caption": "words"})


def test_descriptions(tmp_path):
    (tmp_path / "a.txt").write_text("a red cat\n\n  two dog \n")
    (tmp_path / "b.jsonl").write_text('{"id": 7, "caption": "tree", "style": "noto"}\n')
    (tmp_path / "c.csv").write_text('text,year,code\n"a, b",2020,007\nc,,1\n')
    assert [item.text for item in text_items(tmp_path / "a.txt")] == ["a red cat", "two dog"]
    (item,) = text_items(tmp_path / "b.jsonl")
    assert (item.id, item.text, item.metadata, item.kind) == ("7", "tree", {"style": "noto"}, "text")
    rows = [(item.text, item.metadata) for item in text_items(tmp_path / "c.csv")]
    assert rows[0] == ("a, b", {"year": 2020, "code": 7.0})
    assert rows[1] == ("c", {"year": None, "code": 1.0})
    for name, text, message in [
        ("d.jsonl", '{"caption": "a"}\n{"caption"', "line 2"),
        ("e.csv", "text,b\n1,2,3\n", "line 2"),
        ("f.csv", "words\nhello\n", "line 2: no text column"),
        ("g.txt", "\n", "no descriptions"),
        ("h.doc", "x", "end in"),
    ]:
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            text_items(tmp_path / name)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"kind": "x"}, "cannot be called 'kind'"),
        ({"a b": 1}, "cannot be called 'a b'"),
        ({"year": "soon"}, "'year' holds int64"),
        ({"box": {"x": 1}}, "'box' holds struct"),
    ],
)
def test_bad_metadata_is_refused(clip, index, tmp_path, metadata, message):
    shutil.copytree(index.table.uri, tmp_path / "index")
    own = EmbeddingIndex.open(tmp_path / "index", *clip)
    with pytest.raises(ValueError, match=message):
        own.add([Item("new", text="tree", kind="text", metadata=metadata)], progress=False)
    assert len(own) == len(index)


def test_bad_vectors_are_refused(tmp_path):
    table = VectorTable.create(tmp_path / "index", 4, "{}")
    good = np.eye(4, dtype=np.float32)[:2]
    for vectors in (good[:, :3], good[:1], 2 * good, good * np.nan):
        with pytest.raises(ValueError, match="vector"):
            table.write([Row("a", "text"), Row("b", "text")], vectors)
    with pytest.raises(ValueError, match="twice"):
        table.write([Row("a", "text"), Row("a", "text")], good)
    assert len(table) == 0


def test_writers_at_once_double_nothing(tmp_path):
    """Three writers of the same ids: each write ends whole, one after another."""
    VectorTable.create(tmp_path / "index", 4, "{}")
    vectors = np.tile(np.eye(4, dtype=np.float32)[0], (10, 1))

    def write(writer: str) -> None:
        table = VectorTable.open(tmp_path / "index")
        for first in range(0, 100, 10):
            table.write([Row(str(first + i), "text", writer) for i in range(10)], vectors)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(write, "abc"))
    rows = VectorTable.open(tmp_path / "index").table.search().select(["id", "text"]).limit(1000).to_list()
    assert sorted(int(row["id"]) for row in rows) == list(range(100))
    writers = {row["id"]: row["text"] for row in rows}
    assert all(writers[str(i)] == writers[str(i - i % 10)] for i in range(100))


def test_graph_finds_old_and_new_rows(tmp_path):
    """Past the limit a search is approximate; rows written, replaced or deleted since the graph was built count."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((700, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    rows = [Row(str(i), ("image", "text")[i % 2], str(i), metadata={"i": i}) for i in range(700)]
    table = VectorTable.create(tmp_path / "index", 16, "{}")
    table.write(rows[:600], vectors[:600])
    table.tidy(601)
    assert not table.is_approximate
    table.tidy(600)
    assert table.is_approximate
    assert table.unindexed() == 0
    table.write(rows[600:650], vectors[600:650])
    table.tidy(600)
    assert table.unindexed() == 50  # too few to pay
    table.write([rows[3]], vectors[699:])
    table.delete("id = '4'")
    now = vectors[:650].copy()
    now[3] = vectors[699]
    recall = 0.0
    for query in (*vectors[::20], vectors[699], vectors[620]):
        scores = now @ query
        scores[4] = -2
        truth = set(map(str, np.argsort(-scores)[:10]))
        exact = [row["id"] for row in table.search(query, 10, exact=True)]
        assert set(exact) == truth
        approximate = [row["id"] for row in table.search(query, 10)]
        assert approximate[0] == exact[0]
        recall += len(truth & set(approximate)) / 10 / 37
    assert recall > 0.95
    assert all(row["kind"] == "text" for row in table.search(vectors[0], 10, "kind = 'text'"))
    assert [row["id"] for row in table.search(vectors[0], 1, "i = 77")] == ["77"]
    table.write(rows[650:], vectors[650:])
    table.tidy(600)
    assert table.unindexed() == 0


def test_captions_cannot_command(clip, tmp_path):
    """Markup in a caption is text in the sheet, control characters are escapes in the terminal and in JSON."""
    evil = "<script>alert(1)</script>\x1b[31mred\x1b[0m \u202etfel"
    index, _ = EmbeddingIndex.build(tmp_path / "index", [Item(evil, tiny.image(), evil)], *clip, progress=False)
    matches = index.search("cat")
    table = matches_table(matches)
    assert "\x1b" not in table
    assert "\u202e" not in table
    assert "\\x1b[31mred" in table
    assert not set(json.dumps([match.to_dict() for match in matches])) & {"\x1b", "\u202e"}
    page = write_sheet(tmp_path / "s.html", "t", "n", [Result(evil, [match.hit() for match in matches])]).read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert page.count("data:image/png") == 1


def test_table_is_aligned(index):
    lines = matches_table(index.search("cat", k=15)).splitlines()
    assert len(lines) == 16
    start = lines[0].index("kind")
    assert {line[start - 1 : start + 5].rstrip() for line in lines} == {" kind", " image", " text"}
    assert printable("👩‍🚀 é") == "👩‍🚀 é"


@pytest.mark.slow
def test_trained_model_finds_the_emoji(tmp_path):
    """A small CLIP, trained for seconds: the index gives exactly the recall of its embeddings, far above chance."""
    pytest.importorskip("resvg_py")
    from hf_vlm.data import ContrastiveCollator, PairDataset, load_emoji

    torch.manual_seed(0)
    rows = load_emoji()["validation"].select(range(60))
    words = sorted({word for name in rows["name"] for word in name.split()})
    model, processor = named_clip(words)
    pairs = PairDataset(
        [{"image": row["image"], "caption": [row["name"]], "id": row["emoji_id"]} for row in rows], seed=0
    )
    batch = ContrastiveCollator(processor)([pairs[i] for i in range(len(rows))])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(150):
        optimizer.zero_grad()
        model(**batch, return_loss=True).loss.backward()
        optimizer.step()
    model.eval()
    items = DatasetItems(rows, {"caption": "name", "id": "emoji"}, ("image", "text"))
    index, _ = EmbeddingIndex.build(tmp_path / "index", items, model, processor, progress=False)
    images = embed_images(model, processor, rows["image"], progress=False)
    texts = embed_texts(model, processor, rows["name"], progress=False)
    expected = retrieval_metrics(images, texts, torch.arange(60), torch.arange(60), ks=(1, 10))
    for k in (1, 10):
        by_text = [row["emoji"] in {match.id for match in index.search(row["name"], kind="image", k=k)} for row in rows]
        by_image = [
            row["name"] in {match.text for match in index.search(image=row["image"], kind="text", k=k)} for row in rows
        ]
        assert np.mean(by_text) == pytest.approx(expected[f"text_to_image_r{k}"], abs=0.02)
        assert np.mean(by_image) == pytest.approx(expected[f"image_to_text_r{k}"], abs=0.02)
        assert min(np.mean(by_text), np.mean(by_image)) > 3 * k / 60
    both = [index.search(row["name"], row["image"], kind="image", k=1)[0].id == row["emoji"] for row in rows]
    assert np.mean(both) >= expected["text_to_image_r1"]
    # Subtracting a name lowers the rank of its image.
    others = rows["name"][1:] + rows["name"][:1]
    minus = [
        index.search(a, minus=b, minus_weight=1.0, kind="image", k=60)
        for a, b in zip(rows["name"], others, strict=True)
    ]
    plain = [index.search(a, kind="image", k=60) for a in rows["name"]]
    emoji = rows["emoji"][1:] + rows["emoji"][:1]
    ranks = [
        [[match.id for match in found].index(each) for found, each in zip(results, emoji, strict=True)]
        for results in (minus, plain)
    ]
    assert np.mean(ranks[0]) > np.mean(ranks[1]) + 10


def named_clip(words: list[str]):
    """A small model for the words of some names."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    from hf_vlm import VlmClipModel, VlmClipProcessor, VlmImageProcessor

    vocabulary = ["<pad>", "<unk>", *words, "<start>", "<end>"]
    size, start, end = len(vocabulary), len(vocabulary) - 2, len(vocabulary) - 1
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", start), ("<end>", end)]
    )
    ids = {"vocab_size": size, "bos_token_id": start, "eos_token_id": end, "pad_token_id": 0}
    model = VlmClipModel(tiny.clip_config(text={**ids, "max_position_embeddings": 16}, projection_dim=32))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<end>", model_max_length=16
    )
    side = {"height": tiny.IMAGE_SIZE, "width": tiny.IMAGE_SIZE}
    return model.train(), VlmClipProcessor(VlmImageProcessor(size=side), fast)
