"""Every format gives its documents, packed or not; what is damaged or cut off is named, never half read."""

from __future__ import annotations

import gzip
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from functional_lm.errors import DataError
from functional_lm.text import corpus, dataset, document, json_list, readers
from functional_lm.text.document import Encoded, Segment, Special

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
ROWS = st.lists(TEXT, min_size=1, max_size=8)
DIGEST = "ab" * 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("readers")


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(path: Path) -> list[tuple[Segment, ...]]:
    return [tuple(found) for found in corpus.documents(str(path))]


def texts(path: Path) -> list[str]:
    return ["".join(document.text_of([found])) for found in corpus.documents(str(path))]


def rows_as(suffix: str, rows: list[dict[str, Any]]) -> bytes:
    """Rows in the format of a suffix."""
    if suffix == ".json":
        return json.dumps(rows, ensure_ascii=False, indent=1).encode()
    if suffix == ".parquet":
        sink = io.BytesIO()
        parquet.write_table(pa.Table.from_pylist(rows), sink, row_group_size=3)
        return sink.getvalue()
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
}


# What is read -----------------------------------------------------------------------------------------------------


@given(rows=ROWS, suffix=st.sampled_from([".jsonl", ".ndjson", ".json", ".parquet", ".txt", ".md"]), data=st.data())
def test_every_format_gives_the_same_documents(folder: Path, rows: list[str], suffix: str, data: st.DataObject) -> None:
    packing = data.draw(st.sampled_from([name for name in PACKERS if suffix != ".parquet" or not name]))
    plain = "\n".join(rows).encode() if suffix in (".txt", ".md") else rows_as(suffix, [{"text": row} for row in rows])
    path = write(
        folder / f"any{suffix.upper() if data.draw(st.booleans()) else suffix}{packing}", PACKERS[packing](plain)
    )
    expected = ["\n".join(rows).removeprefix("\ufeff")] if suffix in (".txt", ".md") else rows
    assert texts(path) == expected or expected == [""]


@given(rows=ROWS, suffix=st.sampled_from([".jsonl", ".json", ".parquet"]), skip=st.integers(0, 9))
@settings(max_examples=50)
def test_rows_can_be_passed_over(folder: Path, rows: list[str], suffix: str, skip: int) -> None:
    path = write(folder / f"skip{suffix}", rows_as(suffix, [{"text": row} for row in rows]))
    found = [found for found, _ in readers.read(path, skip) if any(found)]
    assert found == [(row,) for row in rows[skip:]]


SAID = [("user", "Hi <|end|>"), ("assistant", "Hello")]
CHATS: list[dict[str, Any]] = [
    {"prompt": "Hi <|end|>", "response": "Hello", "id": 3},
    {"messages": [{"role": role, "content": text} for role, text in SAID]},
    {"conversation": [{"role": role, "content": text} for role, text in SAID], "language": "English"},
    {"conversations": [{"from": "human", "value": SAID[0][1]}, {"from": "gpt", "value": SAID[1][1]}]},
    {"conversations": [{"role": role, "content": text} for role, text in SAID]},
]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("row", CHATS, ids=lambda row: next(iter(row)))
def test_every_spelling_of_a_chat_is_the_same_chat(tmp_path: Path, suffix: str, row: dict[str, Any]) -> None:
    user, assistant, end = Special("<|user|>"), Special("<|assistant|>"), Special("<|end|>")
    expected = (user, "Hi <|end|>", end, assistant, "Hello", end)
    assert read(write(tmp_path / f"chat{suffix}", rows_as(suffix, [row]))) == [expected]


def test_several_frames_and_members_are_one_file(tmp_path: Path) -> None:
    parts = [b'{"text": "a"}\n{"te', b'xt": "b"}\n', b""]
    for suffix, pack in list(PACKERS.items())[1:]:
        assert texts(write(tmp_path / f"a.jsonl{suffix}", b"".join(map(pack, parts)))) == ["a", "b"]


@given(
    rows=st.lists(st.dictionaries(TEXT, TEXT | st.integers() | st.lists(TEXT), max_size=3)), chunk=st.integers(1, 40)
)
@settings(max_examples=100)
def test_a_json_list_is_read_in_pieces_of_any_size(folder: Path, rows: list[dict[str, Any]], chunk: int) -> None:
    rows = [{**row, "text": "x"} for row in rows]
    raw = json.dumps(rows, ensure_ascii=False, indent=2).encode("utf-8-sig")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_list, "CHUNK_BYTES", chunk)
        assert list(json_list.elements(Path("any.json"), io.BytesIO(raw))) == rows


def test_a_dataset_is_read_as_its_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "SEGMENT_TOKENS", 2)
    with dataset.writing(tmp_path / "made", 50, 1, DIGEST) as writer:
        for ids, copies in (([5, 6, 7], 1), ([], 1), ([8], 3)):
            writer.append(np.array(ids, np.int32), copies)
    found = list(corpus.entries(corpus.find(f"{tmp_path}/made.bin=0.5")))
    assert [entry.weight for entry in found] == [0.5, 1.5]
    pieces = [[segment.ids.tolist() for segment in entry.document if isinstance(segment, Encoded)] for entry in found]
    assert pieces == [[[5, 6], [7]], [[8]]]
    assert [entry.place.row for entry in found] == [1, 3]
    assert found[-1].end == (tmp_path / "made.bin").stat().st_size
    with pytest.raises(DataError, match=r"made\.bin holds tokens, not text; give the --tokenizer"):
        list(corpus.texts(f"{tmp_path}/made.bin"))


# What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_packed_files_that_are_cut_off_or_damaged_are_named(tmp_path: Path, suffix: str) -> None:
    raw = PACKERS[suffix]("".join(f'{{"text": "row {i} {i * i}"}}\n' for i in range(2000)).encode())
    for name in (f"a.jsonl{suffix}", f"b.txt{suffix}"):
        for damaged in (
            raw[:-1],
            raw[: len(raw) // 2],
            raw[:5],
            b"not packed at all",
            raw + b"rest",
            raw[:40] + raw[41:],
        ):
            with pytest.raises(DataError, match=re.escape(name)):
                texts(write(tmp_path / name, damaged))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"text": "a"}', "a JSON list of rows was expected"),
        ("", "a JSON list of rows was expected"),
        ('[{"text": "a"}, {"text": "b"]', "row 2: not JSON"),
        ('[{"text": "a"}, {"text": "b"}', "row 2: not JSON"),
        ('[{"text": "a"}, {"text": "b', "row 2: not JSON"),
        ('[{"text": "a"},', "row 2: not JSON"),
        ('[{"text": "a"} {"text": "b"}]', "row 1: not JSON"),
        ('[{"text": "a"}] {}', "something follows"),
        ('[{"text": "a"}, ["b"]]', "row 2: a JSON object was expected, not a list"),
        ('[{"text": "a"}, {"body": "b"}]', "row 2: no field 'text'"),
        ("[" * 100_000, "row 1: not JSON"),
        ('[{"text": "\xff', r"byte 11 is not UTF-8"),
    ],
)
def test_a_bad_json_list_is_named(tmp_path: Path, text: str, complaint: str) -> None:
    path = write(tmp_path / "a.json", " " if not text else text.encode("latin-1"))
    with pytest.raises(DataError, match=rf"a\.json(: |, ){complaint}"):
        texts(path)


def test_a_mistake_far_from_the_end_is_found_without_reading_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_list, "CHUNK_BYTES", 1000)
    raw = io.BytesIO(b'[{"text": oops}, ' + b" " * 100_000)
    with pytest.raises(DataError, match="row 1: not JSON"):
        list(json_list.elements(Path("a.json"), raw))
    assert raw.tell() == 1000


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"messages": "Hi"}, "it is text, not a list of turns"),
        ({"messages": [{"role": "user", "content": "a"}, "b"]}, "turn 2 is text, not an object"),
        ({"messages": [{"role": "user"}]}, "turn 1 needs texts as 'role' and 'content'"),
        ({"messages": [{"role": "user", "content": None}]}, "turn 1 needs texts"),
        ({"messages": [{"role": "wizard", "content": "a"}]}, "turn 1: unknown role 'wizard'; there are system, user"),
        ({"prompt": "a", "response": None}, "'prompt' with 'response' is not text .it is null"),
        ({"prompt": "a"}, "no field 'text' or .* among"),
    ],
)
def test_a_bad_chat_is_named(tmp_path: Path, row: dict[str, Any], complaint: str) -> None:
    path = write(tmp_path / "a.jsonl", json.dumps({"text": "fine"}) + "\n" + json.dumps(row))
    with pytest.raises(DataError, match=rf"a\.jsonl, line 2: .*{complaint}"):
        texts(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".txt"])
@pytest.mark.parametrize("where", [0, 5])
def test_a_row_or_line_that_no_memory_would_hold_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, where: int
) -> None:
    """The others are as long as they may be, and together longer."""
    monkeypatch.setattr(json_list, "LONGEST", 1000)
    monkeypatch.setattr(json_list, "CHUNK_BYTES", 100)
    monkeypatch.setattr(readers, "SEGMENT_BYTES", 100)
    path = tmp_path / f"a{suffix}"
    made = [{"text": "word " * 190} for _ in range(8)]
    path.write_bytes(rows_as(suffix, made))
    texts(path)
    made[where]["text"] *= 3
    path.write_bytes(rows_as(suffix, made))
    with pytest.raises(DataError, match=r"has more than 1000 (bytes|characters); cut it into shorter ones") as raised:
        texts(path)
    if suffix in (".jsonl", ".parquet"):
        assert str(raised.value).startswith(f"{path}, {'line' if suffix == '.jsonl' else 'row'} {where + 1} has")


def test_parquet_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    raw = rows_as(".parquet", [{"text": f"row {i}"} for i in range(100)])
    for damaged in (raw[:-1], raw[:50], b"PAR1", b"text", raw[:20] + b"\xff" * 60 + raw[80:]):
        with pytest.raises(DataError, match=r"a\.parquet is no Parquet file or damaged"):
            texts(write(tmp_path / "a.parquet", damaged))
    with pytest.raises(DataError, match=r"a\.parquet: no field 'text' or .* among \['body', 'id'\]"):
        texts(write(tmp_path / "a.parquet", rows_as(".parquet", [{"id": 1, "body": "x"}])))
    with pytest.raises(DataError, match=r"a\.parquet, row 2: field 'text' is not text"):
        texts(write(tmp_path / "a.parquet", rows_as(".parquet", [{"text": "x"}, {"text": None}])))
    with pytest.raises(DataError, match=r"compressed inside"):
        texts(write(tmp_path / "a.parquet.gz", gzip.compress(raw)))


@pytest.mark.parametrize(("name", "package"), [("a.parquet", "pyarrow"), ("a.jsonl.zst", "zstandard")])
def test_a_missing_package_is_named_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda asked: None)
    with pytest.raises(DataError, match=rf"{name} needs the package {package}; pip install 'functional_lm\[data\]'"):
        corpus.find(str(write(tmp_path / name, "x")))


def test_a_bin_without_its_index_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no dataset at .*a\.index is missing"):
        corpus.find(str(write(tmp_path / "a.bin", b"1234")))


def row(size: int) -> str:
    """A row of so many characters."""
    return json.dumps({"text": "y" * (size - 12)})


@pytest.mark.parametrize(
    ("name", "fits", "too_long", "said"),
    [
        ("a.txt", "x" * 39 + "\n" + "y" * 40, "x\n" + "y" * 41, ": the line at byte 2 has more than 40 bytes"),
        ("a.txt", "y" * 40, "y" * 41 + "\n", ": the line at byte 0 has more than 40 bytes"),
        ("a.jsonl", row(39) + "\n" + row(40), row(20) + "\n" + row(40) + "\n", ", line 2 has more than 40 bytes"),
        ("a.jsonl.gz", row(40), row(4000), ", line 1 has more than 40 bytes"),
        ("a.txt.zst", "y" * 40, "y" * 4000, ": the line at byte 0 has more than 40 bytes"),
        ("a.json", f"[{row(40)}, {row(20)}]", f"[{row(20)}, {row(400)}]", ": a row has more than 40 characters"),
    ],
)
def test_a_line_that_no_memory_would_hold_is_refused(
    name: str, fits: str, too_long: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "SEGMENT_BYTES", 1)
    monkeypatch.setattr(json_list, "CHUNK_BYTES", 1)
    monkeypatch.setattr(json_list, "LONGEST", 40)
    pack = PACKERS[Path(name).suffix if Path(name).suffix in PACKERS else ""]
    assert [tuple(found) for found, _ in readers.read(write(tmp_path / name, pack(fits.encode())))]
    path = write(tmp_path / name, pack(too_long.encode()))
    with pytest.raises(DataError, match=f"^{re.escape(str(path) + said)}; cut it into shorter ones$"):
        [*readers.read(path)]
