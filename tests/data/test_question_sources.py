"""Questions from files: answers arrive as written, and a row without a usable answer is refused by row and column."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cases import tiny
from hf_vlm.data import QuestionRows, load_questions, load_source, question_instructions, question_source
from hf_vlm.data.sources.cells import read_answers
from hf_vlm.data.sources.open import DataSource, open_rows
from hf_vlm.data.sources.rows import CaptionError, SkipReport, SourceError

QUESTIONS = ["what colour?", "is it red?", "how many?"]


def source(folder: Path, answers: list[Any], name: str = "a.jsonl") -> dict[str, Any]:
    """A file of questions about one image each, in the format that the name ends with."""
    for number in range(len(answers)):
        tiny.image(seed=number).save(folder / f"{number}.png")
    rows = [
        {"image": f"{number}.png", "question": QUESTIONS[number % 3], "answer": answer}
        for number, answer in enumerate(answers)
    ]
    path = folder / name
    if name.endswith(".csv"):
        lines = ["image,question,answer", *(f"{row['image']},{row['question']},{row['answer']}" for row in rows)]
        path.write_text("\n".join(lines), encoding="utf-8")
    elif name.endswith(".json"):
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {"path": str(path)}


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_answers_of_all_kinds_in_one_column(name: str, tmp_path: Path) -> None:
    fields = source(tmp_path, ["red", ["yes", "yes", "no"], None], name)
    questions = load_questions([fields])
    examples, errors = {}, []
    for index in range(3):
        try:
            example = questions[index]
            examples[example["question"]] = dict(zip(example["answers"], example["weights"], strict=True))
        except CaptionError as error:
            errors.append(str(error))
    shares = {"yes": pytest.approx(2 / 3), "no": pytest.approx(1 / 3)}
    assert examples == {"what colour?": {"red": 1}, "is it red?": shares}
    (error,) = errors
    assert error.endswith(
        "row 2 (2.png): column 'answer' holds no answer; give it a text or a list of texts, or remove the row. "
        "Or load the source with on_error='skip'."
    )
    assert "\n" not in error


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("red", ["red"]),
        (" Red ", [" Red "]),
        ("007", ["007"]),
        ("2024-01-01", ["2024-01-01"]),
        ("none", ["none"]),
        ("null", ["null"]),
        ("true", ["true"]),
        ("0:red", ["0:red"]),
        (3, ["3"]),
        ([3, "three"], ["3", "three"]),
        ([{"answer": "a", "answer_confidence": "yes"}, {"answer": "b", "answer_confidence": "no"}], ["a", "b"]),
        ({"answer": ["a", "a"], "answer_confidence": ["yes", "no"]}, ["a", "a"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("others", [[], ["red", ["yes"], 5]], ids=["alone", "mixed"])
def test_answers_arrive_as_written(answer: Any, expected: list[str], others: list, tmp_path: Path) -> None:
    rows = load_source(question_source(source(tmp_path, [answer, *others])))
    assert rows[0]["answer"] == expected
    assert rows[0]["image"].size == tiny.image().size
    assert rows.texts(0) == {"question": QUESTIONS[0], "answer": expected}
    wrapped = QuestionRows(rows, "again")
    assert (wrapped[0]["answer"], wrapped.texts(0)["answer"]) == (expected, expected)


@pytest.mark.parametrize("answer", ["red", "007", "2024-01-01", "None", "n/a", "3", "3.0", "true"])
def test_cells_of_csv_are_texts(answer: str, tmp_path: Path) -> None:
    assert load_source(question_source(source(tmp_path, [answer], "a.csv")))[0]["answer"] == [answer]
    folder = tmp_path / "photos"
    folder.mkdir()
    tiny.image().save(folder / "0.png")
    (folder / "metadata.csv").write_text(f"file_name,question,answer\n0.png,what?,{answer}")
    assert load_source(question_source({"path": str(folder)}))[0]["answer"] == [answer]


@pytest.mark.parametrize(
    ("answer", "wrong"),
    [
        (None, "holds no answer"),
        ([], "holds no answer"),
        ({}, "holds no answer"),
        ("", "holds an empty answer"),
        ("  ", "holds an empty answer"),
        (["red", ""], "holds an empty answer"),
        (["red", None], "holds no answer"),
        ([{"answer": ""}], "holds an empty answer"),
        (True, "holds the bool True"),
        (2.5, "holds the (float|number) 2.5"),
        ([["red"]], "holds the list"),
    ],
    ids=str,
)
def test_other_answers_are_refused_or_skipped(answer: Any, wrong: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=wrong):
        read_answers(answer)
    fields = source(tmp_path, ["red", answer])
    with pytest.raises(CaptionError, match=rf"row 1 \(1\.png\): column 'answer' {wrong}"):
        load_source(question_source(fields))[1]
    report = SkipReport()
    rows = load_source(question_source(fields), on_error="skip", report=report)
    assert [row["answer"] for row in rows] == [["red"], ["red"]]
    assert report.count == 1


def test_answers_of_a_mixture_have_no_prefix(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    questions = load_questions([source(tmp_path, ["red"] * 3), source(tmp_path / "b", [["blue"]] * 3)])
    assert sorted(questions[index]["answers"] for index in range(6)) == [["blue"]] * 3 + [["red"]] * 3


def test_parquet_tar_and_saved_datasets(tmp_path: Path) -> None:
    dicts = [{"answer": "red", "answer_id": 1}, {"answer": "blue", "answer_id": 2}]
    found = load_source(question_source(source(tmp_path, [dicts, dicts], "a.parquet")))
    assert [found[0]["answer"], found.texts(1)["answer"]] == [["red", "blue"]] * 2
    png = io.BytesIO()
    tiny.image().save(png, "PNG")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, data in (("0.png", png.getvalue()), ("0.question.txt", b"what?"), ("0.answer.txt", b"007")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    columns = {"image": "png", "question": "question.txt", "answer": "answer.txt"}
    row = load_source(question_source({"path": str(tmp_path / "*.tar"), "columns": columns}))[0]
    assert (row["question"], row["answer"], row["image"].size) == ("what?", ["007"], tiny.image().size)
    rows = {"image": [tiny.image()], "question": ["what?"], "answer": [["a", "b"]]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "images" / "train.parquet")
    assert load_source(question_source({"path": str(tmp_path / "images")}))[0]["answer"] == ["a", "b"]
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "saved")
    assert load_source(question_source({"path": str(tmp_path / "saved")}))[0]["image"].size == tiny.image().size


def test_slices_and_columns(tmp_path: Path) -> None:
    fields = source(tmp_path, [f"{number}" for number in range(10)])
    part = load_source(question_source({**fields, "split": "train[40%:60%]"}))
    assert [row["answer"] for row in part] == [["4"], ["5"]]
    path = tmp_path / "b.jsonl"
    path.write_text('{"image": "0.png", "said": "a", "what": "b"}\n')
    with pytest.raises(SourceError, match=r"no column 'question', 'answer'; it has image, said, what.*answer: "):
        load_source(question_source({"path": str(path)}))
    columns = {"question": "what", "answer": "said"}
    (row,) = load_source(question_source({"path": str(path), "columns": columns}))
    assert (row["question"], row["answer"]) == ("b", ["a"])
    with pytest.raises(SourceError, match=r"\['caption'\] is unknown; name image, question and answer"):
        question_source({"path": "a", "columns": {"caption": "a"}})
    with pytest.raises(SourceError, match="questions are not streamed: leave out streaming"):
        question_source({"path": "a", "streaming": True})


def test_a_path_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    tiny.image().save(tmp_path / "secret.png")
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "a.jsonl"
    path.write_text('{"image": "../secret.png", "question": "a", "answer": "b"}\n')
    for on_error in ("raise", "skip"):
        with pytest.raises(SourceError, match="leads out of"):
            load_source(question_source({"path": str(path)}), on_error)[0]


@pytest.mark.parametrize(
    ("name", "text", "wrong"),
    [
        ("a.jsonl", '{"a": 1}\n{"a"\n', r"a\.jsonl, line 2: is not valid JSON"),
        ("a.json", "[1,", r"a\.json, item 2: is not valid JSON"),
        ("a.csv", "a,b\n1\n", "line 2: has more or fewer cells than the header"),
        ("a.csv", 'a,b\n"1,2\n', r"a\.csv, line 2: is not valid CSV.*rest of the file"),
        ("a.jsonl", "", "has no rows in split 'train'"),
    ],
)
def test_broken_files_name_the_line(name: str, text: str, wrong: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(SourceError, match=wrong):
        open_rows(DataSource(str(tmp_path / name)))


def test_texts_need_no_image(tmp_path: Path) -> None:
    fields = source(tmp_path, [["a", "b", "b"], "c"])
    (tmp_path / "0.png").unlink()
    table = question_instructions(load_source(question_source(fields)), "mine")
    assert table["response"] == ["b", "c"]
    assert table["index"] == [0, 1]
