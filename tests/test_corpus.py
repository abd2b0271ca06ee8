"""A source names files, and the documents are what lies in them, byte for byte; what is no text is refused by name."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from functional_lm.errors import DataError, UsageError
from functional_lm.text import corpus

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("corpus")


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(source: object) -> list[str]:
    return list(corpus.documents(str(source)))


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
    assert next(documents) == "first"
    second.unlink()
    with pytest.raises(DataError, match=r"2\.txt"):
        next(documents)


def test_the_standard_library_comes_without_its_tests() -> None:
    paths = corpus.files("stdlib")
    names = {path.name for path in paths}
    assert {"os.py", "ast.py", "dataclasses.py"} <= names
    folders = {part for path in paths for part in path.relative_to(Path(json.__file__).parents[1]).parts[:-1]}
    assert not folders & corpus.STDLIB_SKIPPED
    assert paths == sorted(paths, key=Path.as_posix)
    assert corpus.size("stdlib") > 3_000_000
    assert next(corpus.documents("stdlib")).encode() == next(p for p in paths if p.stat().st_size).read_bytes()


def test_the_fingerprint_follows_the_files(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "one")
    before = corpus.fingerprint(str(tmp_path))
    assert corpus.fingerprint(str(path)) == before == corpus.fingerprint(str(tmp_path))
    write(path, "three")
    changed = corpus.fingerprint(str(tmp_path))
    write(tmp_path / "b.txt", "two")
    assert len({before, changed, corpus.fingerprint(str(tmp_path))}) == 3


# What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["", "  ", "{0},", "{0},,{0}"])
def test_a_source_that_says_nothing_is_a_wrong_usage(tmp_path: Path, source: str) -> None:
    with pytest.raises(UsageError):
        corpus.documents(source.format(write(tmp_path / "a.txt", "a")))


@pytest.mark.parametrize("name", ["missing.txt", "no/such/folder", "*.nothing", "empty.txt", "hollow", "x" * 300])
def test_what_is_not_there_is_refused_before_anything_is_read(tmp_path: Path, name: str) -> None:
    write(tmp_path / "empty.txt", "")
    (tmp_path / "hollow").mkdir()
    with pytest.raises(DataError, match=name[:8].replace("*", r"\*")):
        corpus.documents(f"{tmp_path}/{name}")


def test_files_that_are_all_empty_are_no_documents(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "")
    write(tmp_path / "b.jsonl", '\n{"text": ""}\n')
    with pytest.raises(DataError, match="2 files, all empty"):
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
        ('["text"]', "a JSON object was expected, not list"),
        ('{"body": "x", "id": 1}', r"no field 'text' or 'content' among \['body', 'id'\]"),
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
