"""A source names files, and the documents are what lies in them, byte for byte; what is no text is refused by name."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from functional_lm.errors import DataError, UsageError
from functional_lm.text import corpus, dataset, download, readers
from functional_lm.text.document import text_of

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("corpus")


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(source: object) -> list[str]:
    """The documents of a source, as text."""
    return ["".join(text_of([document])) for document in corpus.documents(str(source))]


# What is read -----------------------------------------------------------------------------------------------------


@given(text=TEXT | st.sampled_from(["a\r\nb\rc\n", "\0", "\u2028\x85\x0b\x0c", " \n "]))
def test_a_file_is_one_document_byte_for_byte(folder: Path, text: str) -> None:
    assert read(write(folder / "any.txt", text)) == [text.removeprefix("\ufeff")] or text == "\ufeff"


@given(texts=st.lists(TEXT, min_size=1), field=st.sampled_from(["text", "content"]), escaped=st.booleans())
def test_json_lines_hold_a_document_each(folder: Path, texts: list[str], field: str, escaped: bool) -> None:
    lines = [json.dumps({"id": 1, field: text}, ensure_ascii=escaped) for text in texts]
    assert read(write(folder / "any.jsonl", "\r\n".join(lines) + "\n\n")) == texts


def test_a_byte_order_mark_is_taken_off_the_start_alone(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.txt", "\ufeff\ufeffa\ufeff")) == ["\ufeffa\ufeff"]
    assert read(write(tmp_path / "a.jsonl", '\ufeff{"text": "\ufeffa"}\n')) == ["\ufeffa"]


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path: Path) -> None:
    for name in ("b.md", "a/z.txt", "a/b/c.txt", "c.jsonl"):
        write(tmp_path / name, json.dumps({"text": name}) if name.endswith("jsonl") else name)
    for name in ("empty.txt", ".hidden", ".git/config", ".tmp-1-a.txt"):
        write(tmp_path / name, "" if name == "empty.txt" else name)
    assert read(tmp_path) == ["a/b/c.txt", "a/z.txt", "b.md", "c.jsonl"]


def test_a_list_keeps_its_order_and_a_glob_is_sorted(tmp_path: Path) -> None:
    for name in ("3.md", "1.md", "sub/2.md", "x.txt", "a,b.txt"):
        write(tmp_path / name, name)
    assert read(f"{tmp_path}/x.txt, {tmp_path}/*.md") == ["x.txt", "1.md", "3.md"]
    assert read(f"{tmp_path}/**/*.md") == ["1.md", "3.md", "sub/2.md"]
    assert read(f"{tmp_path}/a,b.txt") == ["a,b.txt"]


def test_documents_are_read_one_at_a_time(tmp_path: Path) -> None:
    write(tmp_path / "1.txt", "first")
    second = write(tmp_path / "2.txt", "second")
    documents = corpus.documents(str(tmp_path))
    assert next(documents) == ("first",)
    second.unlink()
    with pytest.raises(DataError, match=r"2\.txt"):
        next(documents)


def test_the_standard_library_comes_without_its_tests() -> None:
    paths = corpus.find("stdlib").files
    names = {path.name for path in paths}
    assert {"os.py", "ast.py", "dataclasses.py"} <= names
    folders = {part for path in paths for part in path.relative_to(Path(json.__file__).parents[1]).parts[:-1]}
    assert not folders & corpus.STDLIB_SKIPPED
    assert paths == sorted(paths, key=Path.as_posix)
    assert corpus.find("stdlib").size > 3_000_000
    first = next(p for p in paths if p.stat().st_size)
    assert "".join(text_of([next(corpus.documents("stdlib"))])).encode() == first.read_bytes()


def test_the_fingerprint_follows_files_and_weights(tmp_path: Path) -> None:
    def fingerprint(source: object) -> str:
        return corpus.find(str(source)).fingerprint

    path = write(tmp_path / "a.txt", "one")
    before = fingerprint(tmp_path)
    assert fingerprint(path) == before == fingerprint(tmp_path)
    weighted = fingerprint(f"{path}=2")
    write(path, "three")
    changed = fingerprint(tmp_path)
    write(tmp_path / "b.txt", "two")
    assert len({before, weighted, changed, fingerprint(tmp_path)}) == 4


@pytest.mark.parametrize("text", ["", "=2", "=0.25", "=.5", "=3."])
def test_an_item_may_have_a_weight(tmp_path: Path, text: str) -> None:
    write(tmp_path / "b" / "1.txt", "one")
    write(tmp_path / "b" / "2.txt", "two")
    found = corpus.find(f"{write(tmp_path / 'a.txt', 'a')}, {tmp_path}/b{text}")
    assert [weight for _, weight in found.parts] == [1.0, *[float(text[1:] or 1)] * 2]
    assert read(found.source) == ["a", "one", "two"]  # each once: what is made of a weight is the dataset's to say


def test_a_file_may_have_a_name_like_a_weight(tmp_path: Path) -> None:
    write(tmp_path / "a", "not this")
    assert read(write(tmp_path / "a=2", "this")) == ["this"]


@pytest.mark.parametrize(
    ("item", "address", "weight"),
    [
        ("https://h/a.txt=2", "https://h/a.txt", 2),
        ("https://h/a?dl=1", "https://h/a?dl=1", 1),
        ("https://h/a?x=0&dl=1", "https://h/a?x=0&dl=1", 1),
        ("https://h/a?x&dl=1=0.5", "https://h/a?x&dl=1", 0.5),
        (f"https://h/a#sha256={'1' * 64}", f"https://h/a#sha256={'1' * 64}", 1),
        (f"https://h/a?b=1#sha256={'1' * 64}=3", f"https://h/a?b=1#sha256={'1' * 64}", 3),
    ],
)
def test_a_weight_is_told_from_the_end_of_an_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, item: str, address: str, weight: float
) -> None:
    asked: list[str] = []

    def fetch(address: str, downloads: download.Downloads) -> Path:
        asked.append(address)
        return write(tmp_path / "fetched.txt", "text")

    monkeypatch.setattr(download, "fetch", fetch)
    assert corpus.find(item).parts == ((tmp_path / "fetched.txt", weight),)
    assert asked == [address]


def test_the_companions_of_a_dataset_are_no_documents(tmp_path: Path) -> None:
    with dataset.writing(tmp_path / "v1.5", 10, 1, "ab" * 32) as writer:
        writer.append([5])
    write(tmp_path / "v1.5.json", "{}")
    write(tmp_path / "other.json", "[]")
    for source in (tmp_path, f"{tmp_path}/*"):
        assert [path.name for path in corpus.find(str(source)).files] == ["other.json", "v1.5.bin"]


@given(lengths=st.lists(st.integers(0, 3), min_size=1, max_size=4), data=st.data())
def test_reading_goes_on_from_any_place(folder: Path, lengths: list[int], data: st.DataObject) -> None:
    for number, length in enumerate(lengths):
        rows = [{"text": f"{number} {row}" if row != 1 else ""} for row in range(length)]
        write(folder / "places" / f"{number}.jsonl", "\n".join(map(json.dumps, rows)) + "\n\n")
    found = corpus.find(f"{folder}/places/[{''.join(map(str, range(len(lengths))))}].jsonl")
    if not any(lengths):
        return
    everything = list(corpus.entries(found))
    assert [entry.end for entry in everything] == sorted(entry.end for entry in everything)
    assert everything[-1].end <= found.size
    number = data.draw(st.integers(0, len(everything) - 1))
    assert list(corpus.entries(found, everything[number].place)) == everything[number + 1 :]


def test_a_long_text_is_read_in_segments_of_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "SEGMENT_BYTES", 10)
    for text in ("ä\n" * 20, "\ufeffa\r\nb\n" + "x" * 35 + "\n\nend", "x" * 40, "\n" * 25):
        (found,) = corpus.documents(str(write(tmp_path / "a.txt", text)))
        first, second = list(found), list(found)
        assert first == second
        assert "".join(map(str, first)) == text.removeprefix("\ufeff")
        assert all(str(segment).endswith("\n") for segment in first[:-1])
    with pytest.raises(DataError, match=r"a\.txt: byte 32 \(0xff\)"):
        read(write(tmp_path / "a.txt", b"\xef\xbb\xbfabcdefg\n" + b"\n" * 21 + b"\xff"))


# What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["", "  ", "{0},", "{0},,{0}", "{0}=0", "{0}=1001", "https://", "http://h:x/a"])
def test_a_source_that_says_nothing_is_a_wrong_usage(tmp_path: Path, source: str) -> None:
    with pytest.raises(UsageError):
        corpus.documents(source.format(write(tmp_path / "a.txt", "a")))


@pytest.mark.parametrize(
    "name", ["missing.txt", "missing.txt=2", "no/such/folder", "*.nothing", "empty.txt", "hollow", "x" * 300]
)
def test_what_is_not_there_is_refused_before_anything_is_read(tmp_path: Path, name: str) -> None:
    write(tmp_path / "empty.txt", "")
    (tmp_path / "hollow").mkdir()
    with pytest.raises(DataError, match=name[:8].replace("*", r"\*")):
        corpus.documents(f"{tmp_path}/{name}")


def test_files_that_are_all_empty_are_no_documents(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "")
    write(tmp_path / "b.jsonl", '\n{"text": ""}\n')
    with pytest.raises(DataError, match="all of its 2 files are empty"):
        read(tmp_path)


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.txt: byte 7 \(0xff\)"):
        read(write(tmp_path / "a.txt", b"\xef\xbb\xbfabc\n\xff\xfe"))
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: byte 22 \(0xe9\)"):
        read(write(tmp_path / "a.jsonl", b'{"text":"a"}\n{"text":"\xe9"}\n'))


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{'text': 1}", "not JSON"),
        ('{"text": "cut', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('["text"]', "a JSON object was expected, not a list"),
        ('{"body": "x", "id": 1}', r"no field 'text' or field 'content' or .* among \['body', 'id'\]"),
        ('{"text": 3}', "field 'text' is not text"),
        ('{"text": null}', "field 'text' is not text"),
        (r'{"text": "\ud83d"}', "field 'text' is not text"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, complaint: str) -> None:
    if line.startswith("[[") and sys.version_info >= (3, 14):
        pytest.skip("the parser of this Python has no limit of depth")
    with pytest.raises(DataError, match=rf"a\.jsonl, line 3: {complaint}"):
        read(write(tmp_path / "a.jsonl", '{"text": "fine"}\n\n' + line + "\n"))
