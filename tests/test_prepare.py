"""What `prepare` writes is a function of documents, weights and tokenizer; no process and no kill changes a byte."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import functional_lm
from functional_lm import files
from functional_lm import prepare as commands
from functional_lm.cli import main_single
from functional_lm.errors import DataError
from functional_lm.text import corpus, dataset, prepare, readers, selection, tokenizer
from functional_lm.text.selection import DigestSet
from functional_lm.text.tokenizer import Tokenizer

CODE = Path(dataset.__file__).read_text(encoding="utf-8")
WORDS = CODE.split()


@pytest.fixture(autouse=True, scope="module")
def _unsynced() -> Iterator[None]:
    """No waiting for the disk: a killed process, unlike a power cut, loses nothing that was written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return tokenizer.train([CODE], vocab_size=400)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prepare")


def rows(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def written(path: Path, tokens: Tokenizer) -> list[str]:
    made = dataset.open_dataset(path, tokens)
    dataset.verify(made)
    return [tokens.decode(made.document(i)) for i in range(made.documents)]


def copies_of(path: Path, tokens: Tokenizer) -> dict[str, int]:
    return dict(zip(written(path, tokens), dataset.open_dataset(path).copies.tolist()))


# What is written --------------------------------------------------------------------------------------------------


def test_prepare_writes_the_documents(bpe: Tokenizer, tmp_path: Path) -> None:
    texts = ["def f():\n\treturn '\u2581'\r\n", "é\n" * 50, "\0"]
    summary = prepare.prepare(str(rows(tmp_path / "a.jsonl", [*texts, ""])), tmp_path / "out/a", bpe)
    assert written(tmp_path / "out/a", bpe) == texts
    opened = dataset.open_dataset(tmp_path / "out/a", bpe)
    assert (summary.documents, summary.tokens) == (3, len(opened.tokens))
    assert summary.bytes == sum(len(text.encode()) for text in texts)
    assert summary.bytes == dataset.predicted_bytes(dataset.view(opened), bpe.byte_lengths)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a.bin", "a.index", "a.json"}


@pytest.mark.parametrize("kind", tokenizer.TRAINERS)
def test_a_chat_is_written_with_real_markers(tmp_path: Path, kind: str) -> None:
    tokens = tokenizer.train([CODE], kind, 400)
    row = {"messages": [{"role": "user", "content": "<|end|>"}, {"role": "assistant", "content": "yes"}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row), encoding="utf-8")
    prepare.prepare(f"{tmp_path}/a.jsonl", tmp_path / "chat", tokens)
    made = dataset.open_dataset(tmp_path / "chat", tokens)
    user, assistant, end = (tokens.special_ids[name] for name in ("<|user|>", "<|assistant|>", "<|end|>"))
    expected = [user, *tokens.encode("<|end|>"), end, assistant, *tokens.encode("yes"), end]
    assert made.tokens.tolist() == [tokens.eos_id, *expected]


@given(
    sources=st.lists(
        st.tuples(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=9), st.sampled_from([None, 1, 2, 3])),
        min_size=1,
        max_size=3,
    ),
    deduplicate=st.booleans(),
)
@settings(max_examples=40)
def test_documents_are_taken_once_and_seen_by_weight(
    bpe: Tokenizer, folder: Path, sources: list[tuple[list[str], int | None]], deduplicate: bool
) -> None:
    expected: list[tuple[str, int]] = []
    items = []
    for number, (texts, weight) in enumerate(sources):
        path = rows(folder / f"{number}.jsonl", texts)
        items.append(str(path) if weight is None else f"{path}={weight}")
        for text in texts:
            if not deduplicate or text not in dict(expected):
                expected.append((text, weight or 1))
    summary = prepare.prepare(",".join(items), folder / "mixed", bpe, reuse=False, deduplicate=deduplicate)
    assert written(folder / "mixed", bpe) == [text for text, _ in expected]
    assert dataset.open_dataset(folder / "mixed").copies.tolist() == [often for _, often in expected]
    assert summary.duplicates == sum(len(texts) for texts, _ in sources) - len(expected)
    train, validation = dataset.split(dataset.open_dataset(folder / "mixed"), 0.0, 1)
    assert len(train) == sum(often * (1 + len(bpe.encode(text))) for text, often in expected)
    assert len(validation) == 0


def test_a_fraction_takes_a_share_that_grows(bpe: Tokenizer, tmp_path: Path) -> None:
    texts = [f"document {i}" for i in range(1000)]
    path = rows(tmp_path / "a.jsonl", texts)
    chosen: list[dict[str, int]] = []
    for weight in (0.1, 0.5, 0.9, 1.5):
        summary = prepare.prepare(f"{path}={weight}", tmp_path / "part", bpe, deduplicate=weight != 0.5)
        chosen.append(copies_of(tmp_path / "part", bpe))
        share = sum(chosen[-1].values()) / 1000
        assert abs(share - weight) < 4 * (0.25 / 1000) ** 0.5
        assert summary.passed_over == 1000 - len(chosen[-1])
    for smaller, larger in pairwise(chosen):
        assert all(smaller[text] <= larger[text] for text in smaller)
    rows(tmp_path / "b.jsonl", texts[::-1] + ["more"])
    prepare.prepare(f"{tmp_path}/b.jsonl=0.5", tmp_path / "other", bpe)
    assert {text for text in copies_of(tmp_path / "other", bpe) if text != "more"} == set(chosen[1])


def test_weights_that_leave_nothing_are_refused(bpe: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="leave none of its documents"):
        prepare.prepare(f"{rows(tmp_path / 'a.jsonl', ['a'])}=0.0001", tmp_path / "none", bpe)


def test_a_dataset_is_a_source_for_the_same_tokenizer(bpe: Tokenizer, tmp_path: Path) -> None:
    rows(tmp_path / "a.jsonl", ["a", "b" * 30])
    prepare.prepare(f"{tmp_path}/a.jsonl=2", tmp_path / "first", bpe)
    rows(tmp_path / "b.jsonl", ["b", "a"])
    prepare.prepare(f"{tmp_path}/first.bin=1.0,{tmp_path}/b.jsonl", tmp_path / "second", bpe, deduplicate=False)
    assert written(tmp_path / "second", bpe) == ["a", "b" * 30, "b", "a"]
    assert dataset.open_dataset(tmp_path / "second").copies.tolist() == [2, 2, 1, 1]
    other = tokenizer.train((), "bytes")
    for source in (f"{tmp_path}/first.bin", f"{tmp_path}/b.jsonl,{tmp_path}/first.bin"):
        with pytest.raises(DataError, match="was made with another tokenizer"):
            prepare.prepare(source, tmp_path / "third", other)
    data, summary = prepare.dataset_of(f"{tmp_path}/first.bin", tmp_path / "unused", bpe)
    assert (data.path, summary.documents, summary.bytes) == (tmp_path / "first", 2, 31)
    data, summary = prepare.dataset_of(f"{tmp_path}/first.bin=2", tmp_path / "used", bpe)
    assert (data.path, data.copies.tolist()) == (tmp_path / "used", [4, 4])


def test_a_dataset_is_made_again_when_anything_changed(bpe: Tokenizer, tmp_path: Path) -> None:
    text, out = tmp_path / "a.txt", tmp_path / "out"

    def reused(source: str = str(text), tokens: Tokenizer = bpe, **options: Any) -> bool:
        return prepare.prepare(source, out, tokens, **options).reused

    text.write_text("some text", encoding="utf-8")
    assert [reused(), reused(), reused(reuse=False)] == [False, True, False]
    assert [reused(deduplicate=False), reused()] == [False, False]
    assert [reused(f"{text}=2"), reused(f"{text}=2.0"), reused()] == [False, True, False]
    text.write_text("another text", encoding="utf-8")
    assert [reused(), reused()] == [False, True]
    other = tokenizer.train([CODE], vocab_size=420)
    with pytest.raises(DataError, match="another tokenizer"):
        dataset.open_dataset(out, other)
    assert not reused(tokens=other)
    (tmp_path / "out.bin").write_bytes(b"")
    assert not reused(tokens=other)
    dataset.verify(dataset.open_dataset(out, other))


@pytest.mark.parametrize("change", [{"tokens": "x"}, {"bytes": 0}, {"documents": 7}])
def test_a_note_that_is_not_as_it_was_written_is_not_believed(
    change: dict[str, Any], bpe: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("some text", encoding="utf-8")
    first = prepare.prepare(str(tmp_path / "a.txt"), tmp_path / "out", bpe)
    note = files.read_json(tmp_path / "out.json")
    note["summary"] |= change
    files.write_json(tmp_path / "out.json", note)
    again = prepare.prepare(str(tmp_path / "a.txt"), tmp_path / "out", bpe)
    assert dataclasses.replace(again, seconds=first.seconds) == first
    assert prepare.prepare(str(tmp_path / "a.txt"), tmp_path / "out", bpe).reused


def test_prepare_that_fails_leaves_nothing(bpe: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "COMMIT_TOKENS", 1)
    monkeypatch.setattr(prepare, "JOB_CHARACTERS", 1)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n\xff')
    with pytest.raises(DataError, match="not UTF-8"):
        prepare.prepare(str(tmp_path / "a.jsonl"), tmp_path / "out/a", bpe)
    assert not list((tmp_path / "out").iterdir())


def test_two_do_not_write_one_dataset(bpe: Tokenizer, tmp_path: Path) -> None:
    rows(tmp_path / "a.jsonl", ["a"])
    with dataset.writing(tmp_path / "out", 10, 1, "ab" * 32) as writer:
        writer.append(np.array([5]))
        with pytest.raises(DataError, match="another process is writing"):
            prepare.prepare(f"{tmp_path}/a.jsonl", tmp_path / "out", bpe)
    assert not prepare.prepare(f"{tmp_path}/a.jsonl", tmp_path / "out", bpe).reused


# Kills and processes ------------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


def _killing(after: int) -> Callable[..., None]:
    """`Writer.extend` that works so many times."""
    extend, calls = dataset.Writer.extend, itertools.count()

    def killing(writer: Any, *arguments: Any) -> None:
        if next(calls) == after:
            raise Killed
        extend(writer, *arguments)

    return killing


TEXTS = st.lists(st.lists(st.sampled_from(WORDS), max_size=9).map(" \n".join), min_size=1, max_size=9)


@given(
    files=st.lists(TEXTS, min_size=1, max_size=3),
    long=st.lists(st.sampled_from(WORDS), max_size=60).map("\n".join),
    weights=st.lists(st.sampled_from(["", "=2", "=0.6"]), min_size=4, max_size=4),
    kills=st.lists(st.integers(1, 25), min_size=1, max_size=4),
    job=st.integers(1, 40),
)
@settings(max_examples=40)
def test_a_prepare_that_was_killed_writes_the_same_bytes(
    bpe: Tokenizer, folder: Path, files: list[list[str]], long: str, weights: list[str], kills: list[int], job: int
) -> None:
    paths = [rows(folder / f"killed-{number}.jsonl", ["kept", *texts]) for number, texts in enumerate(files)]
    (folder / "long.txt").write_text(long + "\nend\n", encoding="utf-8")
    source = ",".join(f"{path}{weight}" for path, weight in zip([folder / "long.txt", *paths], weights))
    source += f",{rows(folder / 'last.jsonl', ['last'])}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "SEGMENT_BYTES", 30)
        patch.setattr(prepare, "JOB_CHARACTERS", job)
        expected = prepare.prepare(source, folder / "through", bpe, reuse=False)
        patch.setattr(prepare, "COMMIT_TOKENS", 1)
        (folder / "again.json").unlink(missing_ok=True)
        committed = 0
        for kill in kills:
            with pytest.MonkeyPatch.context() as killing:
                killing.setattr(dataset.Writer, "extend", _killing(kill))
                try:
                    prepare.prepare(source, folder / "again", bpe, progress=False)
                except Killed:
                    note = json.loads((folder / ".part-again" / "journal.json").read_text(encoding="utf-8"))
                    assert note["lengths"]["tokens"] > committed  # nothing is done twice
                    committed = note["lengths"]["tokens"]
        summary = prepare.prepare(source, folder / "again", bpe, progress=False)
    for suffix in (".bin", ".index"):
        assert (folder / f"again{suffix}").read_bytes() == (folder / f"through{suffix}").read_bytes()
    counts = ("documents", "tokens", "bytes", "duplicates", "passed_over")
    assert [getattr(summary, name) for name in counts] == [getattr(expected, name) for name in counts]
    assert not (folder / ".part-again").exists()


@pytest.mark.parametrize("kind", ["bpe", "wordchar"])
def test_processes_write_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    tokens = tokenizer.train([CODE], kind, 400)
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=draw.randrange(1, 200))) for _ in range(100)]
    path = rows(tmp_path / "a.jsonl", texts)
    prepare.prepare(str(path), tmp_path / "one", tokens, threads=1)
    monkeypatch.setattr(prepare, "JOB_CHARACTERS", 5000)
    monkeypatch.setattr(prepare, "POOL_BYTES", 0)
    prepare.prepare(str(path), tmp_path / "two", tokens, threads=2)
    for suffix in (".bin", ".index"):
        assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"two{suffix}").read_bytes()


SLOW = """
import sys, time
from functional_lm.text import prepare, storage, tokenizer
prepare.JOB_CHARACTERS, prepare.COMMIT_TOKENS, prepare.POOL_BYTES = 2000, 1, 0
extend = storage.Writer.extend
def slowly(*arguments):
    extend(*arguments)
    time.sleep(0.02)
storage.Writer.extend = slowly
if __name__ == "__main__":
    prepare.prepare(sys.argv[1], sys.argv[2], tokenizer.load(sys.argv[3]), threads=2)
"""


def test_a_process_that_is_killed_leaves_no_others_and_is_gone_on_with(tmp_path: Path) -> None:
    tokens = tokenizer.train((), "bytes")
    tokens.save(tmp_path / "tokenizer")
    source = str(rows(tmp_path / "a.jsonl", [f"{i} {CODE[:500]}" for i in range(400)]))
    prepare.prepare(source, tmp_path / "through", tokens)
    (tmp_path / "slow.py").write_text(SLOW, encoding="utf-8")
    root = str(Path(functional_lm.__file__).parents[1])
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "slow.py"), source, str(tmp_path / "again"), str(tmp_path / "tokenizer")],
        env={**os.environ, "PYTHONPATH": root},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    journal = tmp_path / ".part-again" / "journal.json"
    try:
        deadline = time.monotonic() + 60
        while not journal.exists() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.01)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "again.bin").exists()
    while time.monotonic() < deadline:  # the others notice it by themselves
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.01)
    else:
        pytest.fail("processes are left over")
    held = json.loads(journal.read_text(encoding="utf-8"))["lengths"]["tokens"]
    prepare.prepare(source, tmp_path / "again", tokens)
    for suffix in (".bin", ".index"):
        assert (tmp_path / f"again{suffix}").read_bytes() == (tmp_path / f"through{suffix}").read_bytes()
    assert 0 < held < (tmp_path / "again.bin").stat().st_size


# Selection ------------------------------------------------------------------------------------------------------------


@given(
    names=st.lists(
        st.binary(min_size=16, max_size=16).filter(any) | st.integers(1, 50).map(lambda i: i.to_bytes(16, "big"))
    )
)
def test_a_digest_set_is_a_set(names: list[bytes]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "FEWEST_SLOTS", 2)
        ours, theirs = DigestSet(), set()
        for name in names:
            assert ours.add(name) == (name not in theirs)
            theirs.add(name)
        assert len(ours) == len(theirs)


@given(name=st.binary(min_size=16, max_size=16), weight=st.floats(0, 10), more=st.floats(0, 10))
def test_copies_follow_the_weight(name: bytes, weight: float, more: float) -> None:
    assert int(weight) <= selection.copies(name, weight) <= int(weight) + (weight != int(weight))
    assert selection.copies(name, weight) <= selection.copies(name, max(weight, more))


def test_copies_average_to_the_weight() -> None:
    draw = random.Random(0)
    for weight in (0.25, 1.75):
        counts = Counter(selection.copies(draw.randbytes(16), weight) for _ in range(10_000))
        assert abs(sum(often * count for often, count in counts.items()) / 10_000 - weight) < 0.02


# Commands -----------------------------------------------------------------------------------------------------------


def test_the_commands_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, tokens = str(rows(tmp_path / "a.jsonl", ["one two", "two three", "one two"])), str(tmp_path / "tokens")
    assert list(tokenizer.TRAINERS) == list(commands.KINDS)
    make = ["--out", tokens, "--tokenizer_type"]
    assert main_single(commands.TRAIN_TOKENIZER, ["--data", source, "--vocab_size", "300", *make, "wordchar"]) == 0
    assert tokenizer.load(tokens).vocab_size < 300
    assert main_single(commands.TRAIN_TOKENIZER, [*make, "bytes"]) == 2
    assert "holds a tokenizer already" in capsys.readouterr().err
    assert main_single(commands.TRAIN_TOKENIZER, [*make, "bytes", "--overwrite"]) == 0
    out = str(tmp_path / "made")
    assert main_single(commands.PREPARE, ["--data", source, "--tokenizer", tokens, "--out", out]) == 0
    assert "2 documents are 18 tokens of 0.89 bytes, 1 duplicates dropped" in capsys.readouterr().out
    another = ["--data", source, "--tokenizer", tokens, "--out", out, "--nodeduplicate"]
    assert main_single(commands.PREPARE, another) == 2
    assert "is a dataset of something else" in capsys.readouterr().err
    assert main_single(commands.PREPARE, [*another, "--overwrite"]) == 0
    assert "3 documents" in capsys.readouterr().out
    assert main_single(commands.TRAIN_TOKENIZER, [*make, "char"]) == 2
    assert capsys.readouterr().err == "error: --data is required: a char tokenizer learns from text\n"
    assert main_single(commands.PREPARE, ["--data", "http://", "--tokenizer", tokens, "--out", out]) == 2
    assert "is no address" in capsys.readouterr().err
    assert corpus.find(source).size == Path(source).stat().st_size
