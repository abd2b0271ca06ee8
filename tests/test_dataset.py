"""A dataset is what was written, a view covers each token once, an epoch each window once, and a batch is pure."""

from __future__ import annotations

import io
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from functional_lm.errors import DataError, UsageError
from functional_lm.text import dataset, storage
from functional_lm.text.dataset import Dataset, View

VOCABULARY, DELIMITER, DIGEST = 50, 1, "ab" * 32
DOCUMENT = st.lists(st.integers(0, VOCABULARY - 1), max_size=30)
DOCUMENTS = st.lists(DOCUMENT, min_size=1, max_size=12)
FRACTION = st.floats(0, 1, exclude_max=True)
SEED = st.integers(0, 2**31)


def write(path: Path, documents: list[Any]) -> Dataset:
    with dataset.writing(path, VOCABULARY, DELIMITER, DIGEST) as writer:
        for document in documents:
            writer.append(np.array(document) if document else np.zeros(0, np.int32))
    return dataset.open_dataset(path)


def numbered(lengths: list[int]) -> Dataset:
    """A dataset in memory whose tokens are their own places, so that every token is told from every other."""
    offsets = np.cumsum([0, *lengths])
    tokens = np.arange(offsets[-1], dtype=np.int32)
    copies = np.ones(len(lengths), np.int32)
    return Dataset(Path("memory"), tokens, offsets, copies, int(offsets[-1]), DELIMITER, DIGEST, "")


LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=12)
NUMBERED = LENGTHS.map(numbered)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("dataset")


# Files ------------------------------------------------------------------------------------------------------------


@given(documents=DOCUMENTS)
@settings(max_examples=30)
def test_what_is_read_is_what_was_written(folder: Path, documents: list[list[int]]) -> None:
    opened = write(folder / "same", documents)
    dataset.verify(opened)
    assert [opened.document(i).tolist() for i in range(opened.documents)] == documents
    assert opened.tokens.tolist() == [token for document in documents for token in [DELIMITER, *document]]
    assert (opened.vocab_size, opened.delimiter, opened.tokenizer_digest) == (VOCABULARY, DELIMITER, DIGEST)
    assert not opened.tokens.flags.writeable


def test_the_bytes_on_disk(tmp_path: Path) -> None:
    opened = write(tmp_path / "v1.5", [[7, 8], [], [9]])
    assert (tmp_path / "v1.5.bin").read_bytes() == np.array([1, 7, 8, 1, 1, 9], "<i4").tobytes()
    index = (tmp_path / "v1.5.index").read_bytes()
    assert index[:8] == b"FLMINDEX"
    assert np.frombuffer(index[8:16], "<u4").tolist() == [2, 1]
    assert np.frombuffer(index[16:64], "<u8").tolist() == [VOCABULARY, DELIMITER, 3, 6, 1 << 20, 1]
    assert index[64:96].hex() == DIGEST
    assert opened.digest == index[128:144].hex()
    assert np.frombuffer(index[160:192], "<i8").tolist() == [0, 3, 4, 6]
    assert np.frombuffer(index[192:], "<i4").tolist() == [1, 1, 1]
    assert {path.name for path in tmp_path.iterdir()} == {"v1.5.bin", "v1.5.index"}
    for name in ("v1.5", "v1.5.bin", "v1.5.index"):
        assert dataset.open_dataset(tmp_path / name).digest == opened.digest


def test_blocks_of_checksums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "BLOCK_TOKENS", 4)
    for total in (3, 4, 5, 8, 13):
        opened = write(tmp_path / "blocks", [list(range(total - 1))])
        dataset.verify(opened)
        raw = bytearray((tmp_path / "blocks.bin").read_bytes())
        raw[-1] ^= 1
        (tmp_path / "blocks.bin").write_bytes(raw)
        with pytest.raises(DataError, match=f"damaged in block {(total - 1) // 4} "):
            dataset.verify(dataset.open_dataset(tmp_path / "blocks"))


@pytest.mark.parametrize("strange", [VOCABULARY, -1, 2**31 - 1])
@pytest.mark.parametrize("place", [0, 3, 4, 12])
def test_ids_that_are_in_no_vocabulary_are_found_behind_sound_digests(
    tmp_path: Path, place: int, strange: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "BLOCK_TOKENS", 4)
    tokens = write(tmp_path / "data", [list(range(12))]).tokens.copy()
    tokens[place] = strange
    digests = b"".join(storage._short_hash(tokens[start : start + 4].tobytes()) for start in range(0, 13, 4))
    rest = digests + (tmp_path / "data.index").read_bytes()[storage.HEADER_BYTES + len(digests) :]
    header = storage._header(tmp_path / "data.index")[0][:-1]
    fields = storage.FIELDS.pack(*header, storage._hash_from(io.BytesIO(rest), 0))
    (tmp_path / "data.bin").write_bytes(tokens.tobytes())
    (tmp_path / "data.index").write_bytes(fields + storage._short_hash(fields) + rest)
    with pytest.raises(DataError, match=f"token {place} is {strange}, outside the vocabulary of {VOCABULARY}"):
        dataset.verify(dataset.open_dataset(tmp_path / "data"))


@given(data=st.data(), suffix=st.sampled_from([".bin", ".index"]))
@settings(max_examples=60)
def test_damage_is_found(folder: Path, data: st.DataObject, suffix: str) -> None:
    write(folder / "damaged", [[5, 6], [7]])
    path = folder / f"damaged{suffix}"
    raw = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(raw) - 1))
    how = data.draw(st.sampled_from(["flipped", "cut", "longer"]))
    if how == "flipped":
        raw[place] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(raw[:place] if how == "cut" else raw + b"\0" * place + b"\0" if how == "longer" else raw)
    if how != "flipped" or (suffix == ".index" and place < storage.HEADER_BYTES):
        with pytest.raises(DataError):
            dataset.open_dataset(folder / "damaged")
    else:
        with pytest.raises(DataError):
            dataset.verify(dataset.open_dataset(folder / "damaged"))


def test_files_of_another_pair_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a", [[5, 6]])
    write(tmp_path / "b", [[5, 7]])
    write(tmp_path / "c", [[5]])
    (tmp_path / "c.bin").replace(tmp_path / "a.bin")
    with pytest.raises(DataError, match="another pair"):
        dataset.open_dataset(tmp_path / "a")
    (tmp_path / "b.bin").replace(tmp_path / "a.bin")
    with pytest.raises(DataError, match="block 0"):
        dataset.verify(dataset.open_dataset(tmp_path / "a"))
    with pytest.raises(DataError, match=r"b\.bin is missing"):
        dataset.open_dataset(tmp_path / "b")
    (tmp_path / "a.index").write_text("an index of another kind", encoding="utf-8")
    with pytest.raises(DataError, match="no dataset index"):
        dataset.open_dataset(tmp_path / "a")


@pytest.mark.parametrize("document", [[VOCABULARY], [-1], [[1, 2]], [1.5]])
def test_a_writer_that_fails_leaves_the_older_pair(tmp_path: Path, document: list[Any]) -> None:
    before = write(tmp_path / "kept", [[5]]).digest
    with pytest.raises(DataError, match=r"outside the vocabulary|row of integers"):
        write(tmp_path / "kept", [[6], document])
    with pytest.raises(DataError, match="at least one document"):
        write(tmp_path / "kept", [])
    assert dataset.open_dataset(tmp_path / "kept").digest == before
    assert {path.name for path in tmp_path.iterdir()} == {"kept.bin", "kept.index"}
    assert write(tmp_path / "kept", [[6]]).digest != before


@given(documents=DOCUMENTS, data=st.data())
@settings(max_examples=30)
def test_parts_of_documents_are_the_documents(folder: Path, documents: list[list[int]], data: st.DataObject) -> None:
    expected = write(folder / "whole", documents)
    parts: list[tuple[list[int], int]] = []  # ids, copies
    for document in documents:
        cut = data.draw(st.integers(0, len(document)))
        parts += [(document[:cut], 1), (document[cut:], 0)]
    with dataset.writing(folder / "parts", VOCABULARY, DELIMITER, DIGEST) as writer:
        while parts:
            count = data.draw(st.integers(1, len(parts)))
            ids = np.array([token for part, _ in parts[:count] for token in part], np.int32)
            lengths, copies = zip(*((len(part), often) for part, often in parts[:count]))
            writer.extend(ids, np.array(lengths), np.array(copies))
            parts = parts[count:]
    assert dataset.open_dataset(folder / "parts").digest == expected.digest


@given(
    documents=DOCUMENTS,
    commits=st.sets(st.integers(1, 12)),
    kills=st.lists(st.integers(1, 12), max_size=4),
    size=st.integers(1, 9),
)
@settings(max_examples=50)
def test_a_writer_that_was_killed_goes_on(
    folder: Path, documents: list[list[int]], commits: set[int], kills: list[int], size: int
) -> None:
    whole, killed = folder / "whole", folder / "killed"

    def attempt(last: int) -> None:
        with dataset.writing(killed, VOCABULARY, DELIMITER, DIGEST, "these") as writer:
            for number in range(writer.journal.memory or 0, len(documents)):
                writer.append(np.array(documents[number], np.int32))
                if number + 1 in commits:
                    writer.journal.commit(number + 1)
                if number + 1 == last:
                    raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "BLOCK_TOKENS", size)
        write(whole, documents)
        for last in kills:
            with suppress(KeyboardInterrupt):
                attempt(last)
        attempt(-1)
    for suffix in (".bin", ".index"):
        assert Path(f"{killed}{suffix}").read_bytes() == Path(f"{whole}{suffix}").read_bytes()
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


# Views ------------------------------------------------------------------------------------------------------------


def contents(view: View) -> NDArray[np.int32]:
    return dataset.read(view, 0, len(view))


@given(data=NUMBERED, fraction=FRACTION, seed=SEED)
def test_the_two_views_cover_every_token_once(data: Dataset, fraction: float, seed: int) -> None:
    train, validation = dataset.split(data, fraction, seed)
    both = np.concatenate([contents(train), contents(validation)])
    assert np.array_equal(np.sort(both), data.tokens)
    assert len(train) == int(len(both) * (1 - fraction))


@given(data=NUMBERED, fraction=FRACTION, seed=SEED)
def test_all_documents_but_one_stay_whole(data: Dataset, fraction: float, seed: int) -> None:
    train, validation = dataset.split(data, fraction, seed)
    both = np.concatenate([contents(train), contents(validation)])
    breaks = np.flatnonzero(np.diff(both) != 1) + 1  # each of them, and the border, is where a document starts
    assert set(both[breaks]) <= set(data.offsets.tolist())
    assert len(train.ends) + len(validation.ends) - data.documents in (0, 1)
    again, _ = dataset.split(data, fraction, seed)
    assert np.array_equal(contents(train), contents(again))


def test_one_document_is_cut_and_many_are_shuffled() -> None:
    train, validation = dataset.split(numbered([1000]), 0.1, 0)
    assert np.array_equal(contents(train), np.arange(900))
    assert np.array_equal(contents(validation), np.arange(900, 1000))
    orders = {tuple(contents(dataset.split(numbered([1] * 20), 0.5, seed)[0])) for seed in range(5)}
    assert len(orders) == 5


@given(data=NUMBERED, fraction=FRACTION, seed=SEED, draw=st.data())
def test_copies_are_seen_in_training_and_measured_once(
    data: Dataset, fraction: float, seed: int, draw: st.DataObject
) -> None:
    copies = np.array([draw.draw(st.integers(1, 3)) for _ in range(data.documents)], np.int32)
    train, validation = dataset.split(replace(data, copies=copies), fraction, seed)
    once, same = dataset.split(data, fraction, seed)
    assert np.array_equal(contents(validation), contents(same))
    document_of = np.searchsorted(data.offsets, contents(once), side="right") - 1
    assert Counter(contents(train).tolist()) == Counter(
        dict(zip(contents(once).tolist(), copies[document_of].tolist()))
    )


@given(data=NUMBERED)
def test_the_plain_view_is_the_file(data: Dataset) -> None:
    assert np.array_equal(contents(dataset.view(data)), data.tokens)


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 7.0, float("nan")])
def test_a_fraction_that_leaves_nothing_is_refused(fraction: float) -> None:
    with pytest.raises(UsageError, match="val_fraction"):
        dataset.split(numbered([10]), fraction, 0)


# Order and batches --------------------------------------------------------------------------------------------------


@st.composite
def views(draw: st.DrawFn) -> tuple[View, int]:
    """A view that is long enough for the block size that comes with it."""
    data = draw(NUMBERED)
    view = draw(st.sampled_from([dataset.view(data), *dataset.split(data, draw(FRACTION), draw(SEED))]))
    if len(view) < 2:
        view = dataset.view(numbered([draw(st.integers(2, 40))]))
    return view, draw(st.integers(1, len(view) - 1))


@given(case=views(), seed=SEED, epoch=st.integers(0, 5000))
def test_an_epoch_visits_every_window_once(case: tuple[View, int], seed: int, epoch: int) -> None:
    view, block_size = case
    starts = np.sort(dataset.order(view, block_size, seed, epoch))
    assert 0 <= starts[0] < block_size
    assert np.array_equal(starts, starts[0] + block_size * np.arange(len(starts)))
    assert starts[-1] + block_size < len(view)  # the last target exists
    assert len(view) - len(starts) * block_size < 2 * block_size + 1  # and hardly anything is left over


@given(case=views(), seed=SEED, batch_size=st.integers(1, 5), step=st.integers(0, 50))
def test_a_batch_is_pure_and_two_are_one_of_twice_the_size(
    case: tuple[View, int], seed: int, batch_size: int, step: int
) -> None:
    view, block_size = case
    double = dataset.batch(view, step, 2 * batch_size, block_size, seed)
    dataset._draws.cache_clear()
    halves = [dataset.batch(view, 2 * step + half, batch_size, block_size, seed) for half in (0, 1)]
    for name, whole in double.items():
        assert whole.shape == (2 * batch_size, block_size)
        assert whole.flags.c_contiguous
        assert np.array_equal(whole, np.concatenate([half[name] for half in halves]))


@given(case=views(), seed=SEED, step=st.integers(0, 50))
def test_targets_are_the_next_tokens_of_the_view(case: tuple[View, int], seed: int, step: int) -> None:
    view, block_size = case
    batch, all_tokens = dataset.batch(view, step, 3, block_size, seed), contents(view)
    place = {token: i for i, token in enumerate(all_tokens.tolist())}
    for tokens, targets in zip(batch["tokens"].tolist(), batch["targets"].tolist()):
        start = place[tokens[0]]
        assert [*tokens, targets[-1]] == all_tokens[start : start + block_size + 1].tolist()
        assert targets[:-1] == tokens[1:]


@given(case=views(), seed=SEED)
def test_document_numbers_change_where_documents_start(case: tuple[View, int], seed: int) -> None:
    view, block_size = case
    batch = dataset.batch(view, 0, 3, block_size, seed)
    assert batch["documents"].dtype == np.int32
    changed = np.diff(batch["documents"], axis=1) != 0
    known = [*view.dataset.offsets.tolist(), int(contents(view)[0])]
    assert np.array_equal(changed, np.isin(batch["tokens"][:, 1:], known))


def test_epochs_differ_and_seeds_differ() -> None:
    view = dataset.view(numbered([1000]))
    orders = {tuple(dataset.order(view, 10, seed, epoch)) for seed in range(3) for epoch in range(30)}
    assert len(orders) == 90
    assert len({int(dataset.order(view, 10, 0, epoch).min()) for epoch in range(100)}) == 10  # every shift occurs


@given(length=st.integers(1, 10), fraction=FRACTION, missing=st.integers(0, 10))
def test_a_view_without_a_window_is_refused(length: int, fraction: float, missing: int) -> None:
    view = dataset.split(numbered([length]), fraction, 0)[0]
    block_size = max(1, len(view) + missing)
    with pytest.raises(DataError, match=f"{len(view)} tokens are too few .* needs {block_size + 1}"):
        dataset.batch(view, 0, 1, block_size, 0)
    with pytest.raises(UsageError, match="block_size is 0"):
        dataset.batch(view, 0, 1, 0, 0)


# Unpacked rows ----------------------------------------------------------------------------------------------------

ROWS = st.tuples(NUMBERED, FRACTION, SEED, st.integers(1, 12))


def rows_case(case: tuple[Dataset, float, int, int]) -> tuple[View, int, Counter[tuple[int, int]]]:
    """A view with rows, a block size, and the (token, target) pairs that it holds."""
    data, fraction, seed, block_size = case
    data = replace(data, copies=(data.tokens[data.offsets[:-1]] % 3 + 1).astype(np.int32))
    view = dataset.split(data, fraction, seed)[0]
    pairs: Counter[tuple[int, int]] = Counter()
    for start, end in zip([0, *view.ends[:-1].tolist()], view.ends.tolist()):
        tokens = dataset.read(view, start, end).tolist()
        ends = [DELIMITER] if tokens[-1] + 1 in data.offsets.tolist() else []
        pairs.update(zip(tokens, tokens[1:] + ends))
    assume(pairs)
    return view, block_size, pairs


def learned(batch: dataset.Batch) -> Counter[tuple[int, int]]:
    known = batch["targets"] != dataset.IGNORED
    return Counter(zip(batch["tokens"][known].tolist(), batch["targets"][known].tolist()))


@given(case=ROWS, epoch=st.integers(0, 100), batch_size=st.integers(1, 4))
def test_an_unpacked_epoch_learns_every_token_once(
    case: tuple[Dataset, float, int, int], epoch: int, batch_size: int
) -> None:
    view, block_size, pairs = rows_case(case)
    count = dataset.windows_per_epoch(view, block_size, packing=False)
    starts = dataset.order(view, block_size, 7, epoch, packing=False)
    assert len(set(starts.tolist())) == len(starts) == count
    batches = [dataset.batch(view, epoch * count + row, 1, block_size, 7, packing=False) for row in range(count)]
    assert sum(map(learned, batches), Counter()) == pairs
    firsts = [int(batch["tokens"][0, 0]) for batch in batches]
    assert firsts == [int(dataset.read(view, start, start + 1)[0]) for start in starts.tolist()]
    measured = list(dataset.windows(view, block_size, batch_size, packing=False)) if len(view) > 1 else []
    assert not measured or sum(map(learned, measured), Counter()) == pairs
    assert {batch["tokens"].shape for batch in measured} <= {(batch_size, block_size)}


@given(case=ROWS, step=st.integers(0, 30), batch_size=st.integers(1, 4))
def test_an_unpacked_batch_is_pure_and_a_row_is_of_one_document(
    case: tuple[Dataset, float, int, int], step: int, batch_size: int
) -> None:
    view, block_size, _ = rows_case(case)
    double = dataset.batch(view, step, 2 * batch_size, block_size, 3, packing=False)
    dataset._draws.cache_clear()
    dataset._rows.cache_clear()
    halves = [dataset.batch(view, 2 * step + half, batch_size, block_size, 3, packing=False) for half in (0, 1)]
    for name, whole in double.items():
        assert whole.shape == (2 * batch_size, block_size)
        assert whole.flags.c_contiguous
        assert np.array_equal(whole, np.concatenate([half[name] for half in halves]))
    assert (np.diff(double["documents"], axis=1) == 0).all()
    for tokens, targets in zip(double["tokens"], double["targets"]):
        length = int((targets != dataset.IGNORED).sum())
        assert 0 < length <= block_size
        assert (np.diff(tokens[:length]) == 1).all()  # neighbours in the file, none of them a later document's start
        assert not set(tokens[1:length].tolist()) & set(view.dataset.offsets.tolist())
        assert (targets[length:] == dataset.IGNORED).all()


def test_documents_as_rows(tmp_path: Path) -> None:
    data = write(tmp_path / "rows", [[7, 8, 9], [], [5]])
    (rows,) = dataset.windows(dataset.view(data), 3, 5, packing=False)
    none = dataset.IGNORED
    assert rows["tokens"].tolist() == [[1, 7, 8], [9, 1, 1], [1, 1, 1], [1, 5, 1], [1, 7, 8]]
    assert rows["targets"].tolist() == [[7, 8, 9], [1, none, none], [1, none, none], [5, 1, none], [none] * 3]
    assert rows["documents"].tolist() == [[0] * 3, [0] * 3, [1] * 3, [2] * 3, [0] * 3]


# Validation -------------------------------------------------------------------------------------------------------


@given(case=views(), batch_size=st.integers(1, 4))
def test_windows_predict_every_token_but_the_first_once(case: tuple[View, int], batch_size: int) -> None:
    view, block_size = case
    batches = list(dataset.windows(view, block_size, batch_size))
    assert {batch[name].shape for batch in batches for name in batch} == {(batch_size, block_size)}
    targets = np.concatenate([batch["targets"].ravel() for batch in batches])
    assert np.array_equal(targets[targets != dataset.IGNORED], contents(view)[1:])
    tokens = np.concatenate([batch["tokens"].ravel() for batch in batches])
    assert np.array_equal(tokens[: len(view) - 1], contents(view)[:-1])


@given(case=views())
def test_predicted_bytes_are_those_of_the_targets(case: tuple[View, int]) -> None:
    view, block_size = case
    lengths = (np.arange(view.dataset.vocab_size, dtype=np.int32) * 7) % 5
    targets = np.concatenate([batch["targets"].ravel() for batch in dataset.windows(view, block_size)])
    assert dataset.predicted_bytes(view, lengths) == lengths[targets[targets != dataset.IGNORED]].sum()


def test_nothing_to_predict_is_refused() -> None:
    with pytest.raises(DataError, match="1 tokens hold nothing to predict"):
        next(dataset.windows(dataset.view(numbered([1])), 8))
