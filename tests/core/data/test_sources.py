"""Sources: every format gives the same rows, and whatever is wrong is said with file, row and field."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from ptrain.data.load import canonical, joined
from ptrain.data.rows import conversations, plain_messages
from ptrain.data.sources import huggingface, local, tasks
from ptrain.data.workspace import Workspace, using
from ptrain.errors import DataError

RUN = cast(Any, None)
SAID = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "2 + 2? 🙂"},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2, "b": 2}}}]},
    {"role": "tool", "content": "4", "tool_call_id": "x"},
    {"role": "assistant", "content": "4"},
]
ROWS = [{"messages": SAID, "n": 1}, {"messages": SAID[:2] + SAID[4:], "n": 2}]


@pytest.fixture(autouse=True)
def space(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Temporary files go into a folder of the test."""
    with using(Workspace(tmp_path_factory.mktemp("space"))):
        yield


def load(kind: Any, split: str = "train", **keys: Any) -> Dataset:
    """The rows of a source."""
    return kind(kind.Config(type=kind.__name__, **keys)).load(RUN, split)


def said(dataset: Dataset) -> list[list[dict[str, Any]]]:
    """The conversations of a data set."""
    table: Any = dataset.with_format("arrow")[:]
    return [plain_messages(row or []) for row in conversations(table["messages"])]


def lines(rows: list[Any]) -> str:
    """JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows)


PACK = {"": lambda raw: raw, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.mark.parametrize("packed", list(PACK))
def test_jsonl(tmp_path: Path, packed: str) -> None:
    """Compressed or not, with blank lines; rows know where they come from."""
    path = tmp_path / f"a.jsonl{packed}"
    path.write_bytes(PACK[packed](("\n" + lines(ROWS[:1]) + "\n\n" + lines(ROWS[1:])).encode()))
    rows = load(local.JsonLinesFiles, path=str(path))
    assert said(rows) == [row["messages"] for row in ROWS]
    assert rows["origin"] == [f"{path}:2", f"{path}:5"] and rows["n"] == [1, 2]


def test_zstandard(tmp_path: Path) -> None:
    """With its package; without, the message says so."""
    path = tmp_path / "a.jsonl.zst"
    try:
        import zstandard  # pyright: ignore[reportMissingImports]
    except ImportError:
        path.write_bytes(b"")
        with pytest.raises(DataError, match="pip install zstandard"):
            load(local.JsonLinesFiles, path=str(path))
        return
    path.write_bytes(zstandard.compress(lines(ROWS).encode()))
    assert said(load(local.JsonLinesFiles, path=str(path))) == [row["messages"] for row in ROWS]


def test_globs_and_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of a pattern in the order of their names, those of a list in its order; relative paths too."""
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.jsonl").write_text(lines([{"text": name}]))
    assert load(local.JsonLinesFiles, path=str(tmp_path / "*.jsonl"))["text"] == ["a", "b", "c"]
    both = [str(tmp_path / "c.jsonl"), str(tmp_path / "[ab].jsonl")]
    assert load(local.JsonLinesFiles, path=both)["text"] == ["c", "a", "b"]
    monkeypatch.chdir(tmp_path)
    assert load(local.JsonLinesFiles, path="?.jsonl")["text"] == ["a", "b", "c"]
    (tmp_path / "odd[1].jsonl").write_text(lines([{"text": "odd"}]))
    assert load(local.JsonLinesFiles, path="odd[1].jsonl")["text"] == ["odd"]


def test_the_other_formats_hold_the_same_rows(tmp_path: Path) -> None:
    """JSON, Parquet, Arrow stream and file, CSV, text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=1))
    wanted = [row["messages"] for row in ROWS]
    assert said(load(local.JsonFiles, path=str(tmp_path / "a.json"))) == wanted
    table = pa.Table.from_pylist(ROWS)
    pq.write_table(table, tmp_path / "a.parquet")
    assert said(load(local.ParquetFiles, path=str(tmp_path / "a.parquet"))) == wanted
    for name, writer in (("stream", pa.ipc.new_stream), ("file", pa.ipc.new_file)):
        with pa.OSFile(str(tmp_path / name), "wb") as sink, writer(sink, table.schema) as out:
            out.write_table(table)
        assert said(load(local.ArrowFiles, path=str(tmp_path / name))) == wanted
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, ["text", "n"])
    writer.writeheader()
    writer.writerows([{"text": "two\nlines, quoted", "n": 1}, {"text": "ü", "n": 2}])
    (tmp_path / "a.csv").write_text(out.getvalue())
    rows = load(local.CsvFiles, path=str(tmp_path / "a.csv"))
    assert rows["text"] == ["two\nlines, quoted", "ü"] and rows["n"] == ["1", "2"]
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree\n")
    assert load(local.TextFiles, path=str(tmp_path / "a.txt"))["text"] == ["one\ntwo\n\nthree\n"]
    assert load(local.TextFiles, path=str(tmp_path / "a.txt"), separator="\n\n")["text"] == ["one\ntwo", "three\n"]


def test_files_of_spreadsheets(tmp_path: Path) -> None:
    """They begin with a byte order mark, which is no part of the text; a cell may hold a long document."""
    mark, document = codecs.BOM_UTF8.decode(), "word " * 100_000
    for kind, content in {
        local.CsvFiles: f'text\n"{document}"\n', local.TextFiles: document,
        local.JsonFiles: json.dumps([{"text": document}]), local.JsonLinesFiles: lines([{"text": document}]),
    }.items():  # fmt: skip
        (tmp_path / "a").write_text(mark + content)
        assert load(kind, path=str(tmp_path / "a"))["text"] == [document], kind
    for wrong in ("", ";;", "\\t"):
        with pytest.raises(ValidationError, match="delimiter"):
            load(local.CsvFiles, path=str(tmp_path / "a"), delimiter=wrong)


BAD_LINES = [
    (lines(ROWS * 18) + '{"messages": [{"role": "human", "content": "a"}]}\n', 37, "messages[0].role", "one of system"),
    (lines(ROWS) + '{"messages": [{"role": "user", "content": 5}]}\n', 3, "messages[0].content", "text"),
    (lines(ROWS) + '{"messages": "hello"}\n', 3, "messages", "a list of messages"),
    (lines(ROWS) + "[1, 2]\n", 3, "row", "an object"),
    (lines(ROWS) + '{"messages": [\n', 3, "no JSON", "one JSON object a line"),
    ("[\n{}\n]\n", 1, "no JSON", "one JSON object a line"),
    (json.dumps(ROWS), 1, "this line is a list", "one JSON object a line"),
]


@pytest.mark.parametrize(("text", "line", "found", "expected"), BAD_LINES)
def test_a_bad_row_is_named(tmp_path: Path, text: str, line: int, found: str, expected: str) -> None:
    """File, line, field, what was expected."""
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        load(local.JsonLinesFiles, path=str(path))
    problem = caught.value.problems[0]
    assert problem.where is not None and (problem.where.file, problem.where.line) == (str(path), line)
    assert found in problem.message and expected in (problem.expected or "")


def broken(tmp_path: Path, name: str, content: bytes) -> str:
    path = tmp_path / name
    path.write_bytes(content)
    return str(path)


def test_a_file_that_is_not_what_its_name_says(tmp_path: Path) -> None:
    """Broken archives, other formats, nothing at all: one message each, with the file."""
    whole = gzip.compress(lines(ROWS * 500).encode())
    flipped = whole[:200] + bytes([whole[200] ^ 255]) + whole[201:]
    cases = [
        (local.JsonLinesFiles, broken(tmp_path, "half.jsonl.gz", whole[: len(whole) // 2]), "packed as `.gz`"),
        (local.JsonLinesFiles, broken(tmp_path, "flipped.jsonl.gz", flipped), "flipped.jsonl.gz"),
        (local.JsonLinesFiles, broken(tmp_path, "plain.jsonl.gz", b"{}\n"), "Not a gzipped file"),
        (local.JsonLinesFiles, broken(tmp_path, "plain.jsonl.xz", b"{}\n"), "can't be read as JSON lines, packed"),
        (local.JsonLinesFiles, broken(tmp_path, "plain.jsonl.bz2", b"{}\n"), "can't be read as JSON lines, packed"),
        (local.JsonLinesFiles, broken(tmp_path, "binary.jsonl", b"\x89PNG\xff\xfe"), "can't be read as JSON lines"),
        (local.JsonLinesFiles, broken(tmp_path, "empty.jsonl", b""), "has no rows"),
        (local.JsonLinesFiles, broken(tmp_path, "blank.jsonl", b"\n\n"), "has no rows"),
        (local.JsonFiles, broken(tmp_path, "one.json", b'{"a": 1}'), "holds dict"),
        (local.JsonFiles, broken(tmp_path, "lines.json", b"{}\n{}\n"), "no JSON"),
        (local.CsvFiles, broken(tmp_path, "ragged.csv", b"a,b\n1,2\n1,2,3\n"), "ragged.csv:3"),
        (local.ParquetFiles, broken(tmp_path, "text.parquet", b"hello"), "can't be read as Parquet"),
        (local.ArrowFiles, broken(tmp_path, "text.arrow", b"hello there"), "can't be read as Arrow"),
        (local.ArrowFiles, broken(tmp_path, "empty.arrow", b""), "empty.arrow"),
        (local.JsonLinesFiles, str(tmp_path / "none.jsonl"), "there is no file"),
        (local.JsonLinesFiles, str(tmp_path), "is a folder"),
    ]
    for kind, path, message in cases:
        with pytest.raises(DataError) as caught:
            load(kind, path=path)
        assert message in str(caught.value), (path, str(caught.value))
        assert Path(path).name in str(caught.value)


def test_columns_of_different_types(tmp_path: Path) -> None:
    """Within a block and far apart: both rows are named where they can be; numbers fit together, and nulls with all."""
    path = tmp_path / "a.jsonl"
    path.write_text(lines([{"text": "a", "n": 1}, {"text": "b", "n": "x"}]))
    with pytest.raises(DataError, match=r"a.jsonl:2: the column `n` holds a str, but a int in .*a.jsonl:1"):
        load(local.JsonLinesFiles, path=str(path))
    path.write_text(lines([{"text": "a", "n": 1}] * 1000 + [{"text": "b", "n": "x"}]))
    with pytest.raises(DataError, match="do not all have the same columns"):
        load(local.JsonLinesFiles, path=str(path))
    path.write_text(
        lines([{"text": "a", "n": None}] * 1000 + [{"text": "b", "n": 1}] * 1000 + [{"text": "c", "n": 1.5}])
    )
    rows = load(local.JsonLinesFiles, path=str(path))
    assert rows["n"] == [None] * 1000 + [1.0] * 1000 + [1.5] and len(set(rows["origin"])) == 2001


def test_values_that_no_column_holds(tmp_path: Path) -> None:
    """Half of a character, as where a text was cut, and a number beyond 64 bits: the row is named."""
    path = tmp_path / "a.jsonl"
    half = [{"role": "user", "content": "cut \ud83d"}]
    for bad in ({"messages": half}, {"messages": [{**half[0], "channel": half[0]["content"], "content": "a"}]}):
        path.write_text(lines([*ROWS, bad]))
        with pytest.raises(DataError, match=r"a.jsonl:3: the column `messages` holds a value .* surrogates"):
            load(local.JsonLinesFiles, path=str(path))
    for value in ("cut \ud83d", 2**70):
        path.write_text(lines([{"text": "a", "n": value}] * 2))
        with pytest.raises(DataError, match=r"a.jsonl:1: the column `n` holds a value that can't be stored"):
            load(local.JsonLinesFiles, path=str(path))


def test_turns_with_dates(tmp_path: Path) -> None:
    """Tables have values that JSON has not, such as the time of a turn: a template sees them as text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    turns = [{"role": "user", "content": "a", "timestamp": datetime(2024, 5, 1, 12, 30), "raw": b"x"}]
    pq.write_table(pa.table({"messages": [turns]}), tmp_path / "a.parquet")
    ((turn,),) = said(load(local.ParquetFiles, path=str(tmp_path / "a.parquet")))
    assert turn == {"role": "user", "content": "a", "timestamp": "2024-05-01 12:30:00", "raw": "b'x'"}


@given(count=st.integers(1, 30), wanted=st.integers(1, 90), seed=st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_samples(count: int, wanted: int, seed: int) -> None:
    """`sample_count` rows in their order, each as often as the others or once more; `sample_ratio` likewise."""
    source = tasks.Tasks(tasks.Tasks.Config(count=count, tasks=["add"], sample_count=wanted, sample_seed=seed))
    found = source.load(RUN, "train")["origin"]
    numbers = [int(origin.rpartition(":")[2]) for origin in found]
    often = [numbers.count(n) for n in range(1, count + 1)]
    assert len(numbers) == wanted and max(often) - min(often) <= 1
    ratio = tasks.Tasks(tasks.Tasks.Config(count=count, tasks=["add"], sample_ratio=wanted / count, sample_seed=seed))
    assert ratio.load(RUN, "train")["origin"] == found


def test_drawn_rows_keep_their_numbers(tmp_path: Path) -> None:
    """Those of a data set too, whatever is made of its rows; and a message names the row as it stands there."""
    rows = [{"user": f"{at}", "assistant": "a"} for at in range(1, 41)]
    folder = str(tmp_path / "d")
    Dataset.from_list(rows).save_to_disk(folder)
    for kind, keys in (
        (huggingface.HuggingFaceInstruct, {}), (huggingface.HuggingFaceSource, {}),
        (huggingface.HuggingFaceCausal, {"column": "user"}),
    ):  # fmt: skip
        drawn = load(kind, name_or_path=folder, sample_count=5, **keys)
        column: Any = next((drawn[name] for name in ("text", "user") if name in drawn.column_names), None)
        numbers = list(column) if column is not None else [one[0]["content"] for one in said(drawn)]
        assert drawn["origin"] == [f"{folder}:{number}" for number in numbers] and numbers[0] != "1"
        twice = load(kind, name_or_path=folder, sample_ratio=2, **keys)["origin"]
        assert sorted(twice) == sorted([f"{folder}:{at}" for at in range(1, 41)] * 2)
    Dataset.from_list([*rows, {"user": None, "assistant": "a"}]).save_to_disk(str(tmp_path / "e"))
    with pytest.raises(DataError, match=r"e:41:1: `messages\[0\].content` is missing"):
        load(huggingface.HuggingFaceInstruct, name_or_path=str(tmp_path / "e"), sample_count=40, sample_seed=7)


def test_both_ways_to_sample_are_too_many() -> None:
    """An error, whoever checks it first."""
    with pytest.raises((DataError, ValidationError), match="sample_ratio"):
        load(tasks.Tasks, count=5, sample_count=2, sample_ratio=0.5)


def test_a_saved_data_set(tmp_path: Path) -> None:
    """`save_to_disk`, with and without splits, and a part of one; names of splits may be mapped."""
    plain = Dataset.from_dict({"text": [str(at) for at in range(20)]})
    plain.save_to_disk(str(tmp_path / "plain"))
    DatasetDict({"train": plain, "test_x": plain.select(range(3))}).save_to_disk(str(tmp_path / "splits"))
    kind = huggingface.HuggingFaceCausal
    assert load(kind, name_or_path=str(tmp_path / "plain"))["text"] == plain["text"]
    assert load(kind, name_or_path=f"{tmp_path / 'splits'}:train[10:12]")["text"] == ["10", "11"]
    assert load(kind, name_or_path=f"{tmp_path / 'splits'}:train[:-18]")["text"] == ["0", "1"]
    mapped = {"name_or_path": str(tmp_path / "splits"), "split_mapping": {"eval": "test_x"}}
    assert load(kind, "eval", **mapped)["text"] == ["0", "1", "2"]
    with pytest.raises(DataError, match=r"it has the splits \['test_x', 'train'\]"):
        load(kind, name_or_path=f"{tmp_path / 'splits'}:validation")
    with pytest.raises(DataError, match="is no split"):
        load(kind, name_or_path=f"{tmp_path / 'splits'}:train[10")


def test_a_folder_of_data_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `datasets.load_dataset` reads it; without network an unknown name is one clear message."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text(lines([{"a": "x"}, {"a": "y"}, {"a": "z"}]))
    kind = huggingface.HuggingFaceCausal
    assert load(kind, name_or_path=f"{folder}:train[1:]")["text"] == ["y", "z"]
    with pytest.raises(DataError, match=r"has no column `text`.*\n.*'a', 'b'"):
        (folder / "train.jsonl").write_text(lines([{"a": "x", "b": "y"}]))
        load(kind, name_or_path=str(folder))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="the data set `nobody/nothing-of-that-name`, split `train`, can't be loaded"):
        load(kind, name_or_path="nobody/nothing-of-that-name")
    with pytest.raises(DataError, match="is a file"):
        load(kind, name_or_path=str(folder / "train.jsonl"))


CHAT = {
    "conversations": [
        {"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"},
        {"from": "human", "value": "q2"}, {"from": "gpt", "value": "a2"},
    ]
}  # fmt: skip
ROLES = {
    "system": "conversations.from.system",
    "user": "conversations.from.human",
    "assistant": "conversations.from.gpt",
}


@pytest.mark.parametrize(
    ("row", "keys", "wanted"),
    [
        (CHAT, {"role_mapping": ROLES}, ["system s", "user q", "assistant a", "user q2", "assistant a2"]),
        (
            {"question": "q", "answer": "a"},
            {"role_mapping": {"user": "question", "assistant": "answer"}},
            ["user q", "assistant a"],
        ),
        ({"prompt": "q", "completion": "a"}, {}, ["user q", "assistant a"]),
        ({"user": "q", "assistant": "a"}, {}, ["user q", "assistant a"]),
        (
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
            {},
            ["user q", "assistant a"],
        ),
        (
            {"messages": [{"role": "user", "content": "q"}], "answer": "a"},
            {"role_mapping": {"user": "messages.role.user", "assistant": "answer"}},
            ["user q", "assistant a"],
        ),
        (
            {"turns": [{"role": "user", "content": "no", "body": "q"}]},
            {"role_mapping": {"user": "turns.role.user"}, "content_key": "body"},
            ["user q"],
        ),
    ],
)
def test_columns_as_conversations(tmp_path: Path, row: dict[str, Any], keys: dict[str, Any], wanted: list[str]) -> None:
    """Mapped columns and lists, in the order in which turns stand."""
    Dataset.from_list([row]).save_to_disk(str(tmp_path / "d"))
    rows = load(huggingface.HuggingFaceInstruct, name_or_path=str(tmp_path / "d"), **keys)
    assert [f"{one['role']} {one['content']}" for one in said(rows)[0]] == wanted
    assert rows["origin"] == [f"{tmp_path / 'd'}:1"]


def test_columns_that_are_no_conversation(tmp_path: Path) -> None:
    """The columns are listed; a role that nobody knows is named with its row."""
    folder = str(tmp_path / "d")
    Dataset.from_list([{"a": "x"}]).save_to_disk(folder)
    with pytest.raises(DataError, match=r"it has \['a'\].*\n.*role_mapping"):
        load(huggingface.HuggingFaceInstruct, name_or_path=folder)
    with pytest.raises(DataError, match=r"there is no column `b`"):
        load(huggingface.HuggingFaceInstruct, name_or_path=folder, role_mapping={"user": "b"})
    Dataset.from_list([CHAT, {"conversations": [{"from": "bot", "value": "x"}]}]).save_to_disk(str(tmp_path / "e"))
    with pytest.raises(DataError, match=r'e:2:1: `messages\[0\].role` is "bot"'):
        load(huggingface.HuggingFaceInstruct, name_or_path=str(tmp_path / "e"), role_mapping=ROLES)


def test_turns_that_are_none(tmp_path: Path) -> None:
    """A list that is null, and one of texts or numbers: the row is named."""
    for at, (turns, found) in enumerate({"missing": None, '"[]"': "[]", "turn 0 is list": [[1]]}.items()):
        Dataset.from_list([{"conversations": found}]).save_to_disk(str(tmp_path / f"{at}"))
        with pytest.raises(DataError, match=rf"{at}:1:1: .*{re.escape(turns)}"):
            load(huggingface.HuggingFaceInstruct, name_or_path=str(tmp_path / f"{at}"), role_mapping=ROLES)


def test_data_files_that_are_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `datasets` found is one message; arguments that it does not take, or that ptrain can't, are too."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(DataError, match=r"can't be loaded: .*JSON"):
        load(huggingface.HuggingFaceCausal, name_or_path=str(tmp_path / "d"))
    with pytest.raises(DataError, match=r"can't be loaded: .*unexpected keyword argument 'no_such_key'"):
        load(huggingface.HuggingFaceCausal, name_or_path="json", kwargs={"data_dir": str(tmp_path), "no_such_key": 1})
    for wrong in ("split", "streaming"):
        with pytest.raises(ValidationError, match=f"`{wrong}` "):
            load(huggingface.HuggingFaceCausal, name_or_path="json", kwargs={wrong: True})


def test_tasks() -> None:
    """Generated rows, the same ones each time; another split or an unknown task is an error."""
    rows = load(tasks.Tasks, count=20, seed=3)
    assert len(rows) == 20 and said(rows) == said(load(tasks.Tasks, count=20, seed=3))
    assert said(rows) != said(load(tasks.Tasks, "eval", count=20, seed=3))
    with pytest.raises(DataError, match="no split `test`"):
        load(tasks.Tasks, "test")
    with pytest.raises(DataError, match="unknown task 'ad'"):
        load(tasks.Tasks, tasks=["ad"])


def test_rows_of_a_plugin_join_those_of_core(tmp_path: Path) -> None:
    """A source that gives plain objects need not know the columns of a conversation; its bad rows are named."""
    (tmp_path / "rows.jsonl").write_text(lines(ROWS))
    ours = load(local.JsonLinesFiles, path=str(tmp_path / "rows.jsonl"))
    plain = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    theirs = canonical(Dataset.from_list([{"messages": plain, "origin": one} for one in (None, "b.txt")]), "mine")
    assert said(joined([ours, theirs])) == [*said(ours), plain, plain]
    assert theirs["origin"] == ["mine:1", "b.txt"]
    assert canonical(ours, "ours") is ours
    with pytest.raises(DataError, match=r"mine:2:1: `messages\[0\].role` is \"usr\""):
        canonical(Dataset.from_list([{"messages": plain}, {"messages": [{"role": "usr", "content": "hi"}]}]), "mine")
    text = Dataset.from_list([{"prompt": "a", "completion": "b"}])
    assert canonical(text, "mine") is text


def test_sources_are_read_without_torch_or_datasets() -> None:
    """`ptrain check` validates their sections."""
    code = (
        "import sys\n"
        "import ptrain.data.sources.local, ptrain.data.sources.huggingface, ptrain.data.sources.tasks\n"
        "import ptrain.data.tokenizers\n"
        "heavy = {'torch', 'datasets', 'transformers', 'pyarrow', 'numpy', 'tokenizers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
