"""From documents to a tokenizer and to a dataset: corpus, tokenizer and dataset wired together, with progress.

One process reads, drops duplicates and writes; the others encode. What is written is committed now and then, so that
a run that was killed goes on where it stood, and ends with the bytes that an uninterrupted one would have written.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from functional_lm import files, seal
from functional_lm.errors import DataError
from functional_lm.text import corpus, document, readers, storage, tokenizer
from functional_lm.text.corpus import Corpus, Place
from functional_lm.text.document import Document, Segment
from functional_lm.text.selection import DIGEST_BYTES, DigestSet, copies
from functional_lm.text.storage import Dataset, Writer
from functional_lm.text.tokenizer import Tokenizer

RECIPE = 2  # raise it when the same files and tokenizer come to give other tokens
JOB_CHARACTERS = 1 << 20  # what one process encodes at a time
COMMIT_TOKENS = 1 << 23
POOL_BYTES = 32 << 20  # of a smaller corpus the tokens are there before the processes are


@dataclass(frozen=True)
class Summary:
    """What `prepare` made: counts, UTF-8 bytes of the text, seconds that it took, whether an older result was kept."""

    documents: int
    tokens: int
    bytes: int
    seconds: float
    duplicates: int = 0  # documents that were dropped because an equal one came before
    passed_over: int = 0  # documents that their source's weight leaves out
    reused: bool = False


def train_tokenizer(
    source: str | Corpus, kind: str = "bpe", vocab_size: int = 4096, sample_bytes: int = tokenizer.SAMPLE_BYTES
) -> Tokenizer:
    """A tokenizer trained on the documents of `source`. Raises as `corpus.documents` and `tokenizer.train` do."""
    return tokenizer.train(corpus.texts(source), kind, vocab_size, sample_bytes)


def dataset_of(
    source: str | Corpus, out: str | Path, tokenizer: Tokenizer, deduplicate: bool = True, progress: bool = True
) -> tuple[Dataset, Summary]:
    """The dataset to train on: the one that `source` is, where it lies, or what `prepare` makes of it in `out`."""
    found = corpus.find(source)
    if [weight for path, weight in found.parts if readers.is_dataset(path)] != [1.0] or len(found.parts) > 1:
        summary = prepare(found, out, tokenizer, progress=progress, deduplicate=deduplicate)
        return storage.open_dataset(out, tokenizer), summary
    started, data = time.perf_counter(), storage.open_dataset(found.files[0], tokenizer)
    storage.verify(data)
    chunks = (data.tokens[start : start + COMMIT_TOKENS] for start in range(0, len(data.tokens), COMMIT_TOKENS))
    size = sum(int(tokenizer.byte_lengths[chunk].sum()) for chunk in chunks)
    return data, Summary(data.documents, len(data.tokens), size, time.perf_counter() - started, reused=True)


def prepare(
    source: str | Corpus,
    out: str | Path,
    tokenizer: Tokenizer,
    threads: int | None = None,
    progress: bool = True,
    reuse: bool = True,
    deduplicate: bool = True,
) -> Summary:
    """Write the documents of `source` as the dataset `out` (NAME of NAME.bin, NAME.index, NAME.json).

    Streams: memory does not grow with the corpus, but for 24 to 72 bytes a document to know duplicates by. `threads`
    (all cores if None) encode; of a corpus over POOL_BYTES in processes of their own, which import the main module
    (a script needs its `if __name__ == "__main__":`). The result depends neither on them nor on interruptions.

    With `reuse`, a dataset that was made by the same tokenizer from the same files (path, size, modification time) is
    kept (NAME.json remembers that), and one that was begun is gone on with. Raises as `corpus.documents` does, and
    DataError for text that cannot be encoded.
    """
    found = corpus.find(source)
    for path in filter(readers.is_dataset, found.files):
        storage.open_dataset(path, tokenizer)  # refuses one of another tokenizer before any work
    record = Path(f"{storage.name_of(out)}.json")
    inputs = {
        "recipe": RECIPE,
        "files": found.fingerprint,
        "tokenizer": tokenizer.digest,
        "deduplicate": deduplicate,
    }
    if reuse and (kept := _kept(record, inputs, tokenizer)):
        return kept
    started, key = time.perf_counter(), f"{inputs}" if reuse else f"{inputs} {time.time_ns()}"
    with (
        tqdm(total=found.size, unit="B", unit_scale=True, desc="tokens", disable=None if progress else True) as bar,
        storage.writing(out, tokenizer.vocab_size, tokenizer.eos_id, tokenizer.digest, key) as writer,
        _encoder(tokenizer, threads or os.cpu_count() or 1, found.size) as encode,
    ):
        try:
            done = _write(found, writer, tokenizer, encode, deduplicate, bar)
            files.write_json(record, {"source": found.source, **inputs})  # whose files they are that appear now
        except DataError:
            writer.journal.discard()  # what has to change before the next attempt makes it another corpus
            raise
    seconds = time.perf_counter() - started
    summary = Summary(writer.documents, writer.tokens, done.bytes, seconds, done.duplicates, done.passed_over)
    made = storage.open_dataset(out, tokenizer)
    note = {"source": found.source, **inputs, "dataset": made.digest, "summary": asdict(summary)}
    files.write_json(record, {**note, seal.OWN: seal.own(note)})
    return summary


def is_own(found: Corpus, out: str | Path, tokenizer: Tokenizer, deduplicate: bool) -> bool:
    """Whether `prepare` would make anew what it made there before, or would replace nothing."""
    name = storage.name_of(out)
    if not any(Path(f"{name}{suffix}").exists() for suffix in (".bin", ".index")):
        return True
    try:
        earlier = files.read_json(f"{name}.json")
        before = (earlier["source"], earlier["tokenizer"], earlier["deduplicate"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return before == (found.source, tokenizer.digest, deduplicate)


def _kept(record: Path, inputs: dict[str, Any], tokenizer: Tokenizer) -> Summary | None:
    """The summary of an earlier run, if its inputs, its result and its note are still what they were."""
    try:
        earlier = files.read_json(record)
        if earlier.pop(seal.OWN) != seal.own(earlier):
            return None
        found = storage.open_dataset(record.with_suffix(""), tokenizer)
        storage.verify(found)
        same = all(earlier[name] == value for name, value in inputs.items())
        if same and earlier["dataset"] == found.digest:
            return Summary(**{**earlier["summary"], "reused": True})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, DataError):
        pass
    return None


# Documents to parts -------------------------------------------------------------------------------------------------


class State(NamedTuple):
    """Where the work stands: what a resumed run needs to know beside what is written."""

    file: int = 0  # files done
    row: int = 0  # rows of the next file done, the one in work not counted
    parts: int = 0  # parts of the document in work that are done
    duplicates: int = 0
    passed_over: int = 0
    bytes: int = 0  # of text written


class Chosen(NamedTuple):
    """A part of a document on its way to the file."""

    segments: list[Segment]
    copies: int  # of the document that it begins, 0 if it goes on with one
    digest: bytes  # of that document
    state: State  # behind this part; its `bytes` are not counted yet
    end: int  # bytes of the corpus that are read by then


def _chosen(found: Corpus, start: State, seen: DigestSet | None, final: list[State]) -> Iterator[Chosen]:
    """The parts of the documents that are taken; the state behind the last document is appended to `final`."""
    state = start
    for entry in corpus.entries(found, Place(start.file, start.row)):
        here = state._replace(file=entry.place.file, row=entry.place.row - 1)
        skip, state = here.parts, here._replace(row=entry.place.row, parts=0)
        name, often = b"", int(entry.weight)
        if seen is not None or often != entry.weight:
            name = document.digest(entry.document)
            often = copies(name, entry.weight)
        if not skip:  # a document in work was decided on before
            if not often:
                state = state._replace(passed_over=state.passed_over + 1)
                continue
            if seen is not None and not seen.add(name):
                state = state._replace(duplicates=state.duplicates + 1)
                continue
        place = entry.start
        for number, (segments, size, last) in enumerate(_parts(entry.document)):
            place = entry.end if last else min(entry.end, place + size)
            if number >= skip:
                behind = state if last else here._replace(parts=number + 1)
                yield Chosen(segments, 0 if number else often, name, behind, place)
    final.append(state)


def _parts(whole: Document) -> Iterator[tuple[list[Segment], int, bool]]:
    """Segments of a document in lists of JOB_CHARACTERS, the size of each, and whether it is the last."""
    segments: list[Segment] = []
    size = 0
    for segment in whole:
        if size >= JOB_CHARACTERS:
            yield segments, size, False
            segments, size = [], 0
        segments.append(segment)
        size += _size(segment)
    yield segments, size, True


def _size(segment: Segment) -> int:
    return len(segment.ids) if isinstance(segment, document.Encoded) else len(segment)


def _jobs(parts: Iterable[Chosen]) -> Iterator[list[Chosen]]:
    """Parts in lists of some JOB_CHARACTERS."""
    job: list[Chosen] = []
    held = 0
    for part in parts:
        job.append(part)
        held += sum(map(_size, part.segments))
        if held >= JOB_CHARACTERS:
            yield job
            job, held = [], 0
    if job:
        yield job


# Parts to tokens ----------------------------------------------------------------------------------------------------

Encoding = tuple[NDArray[np.int32], NDArray[np.int64]]
Encode = Callable[[Iterator[list[Chosen]]], Iterator[tuple[list[Chosen], Encoding]]]


def _write(
    found: Corpus, writer: Writer, tokenizer: Tokenizer, encode: Encode, deduplicate: bool, bar: tqdm[Any]
) -> State:
    """Read, encode and write from where the writer stands; returns the state at the end."""
    state = State(*(writer.journal.memory or ()))
    digests = writer.journal.open("names")
    seen = DigestSet() if deduplicate else None
    digests.seek(0)
    while seen is not None and (name := digests.read(DIGEST_BYTES)):
        seen.add(name)
    final: list[State] = []
    size, committed = state.bytes, writer.tokens
    for job, (ids, lengths) in encode(_jobs(_chosen(found, state, seen, final))):
        often = np.array([part.copies for part in job])
        writer.extend(ids, lengths, often)
        size += int(tokenizer.byte_lengths[ids].sum())
        if seen is not None:
            digests.write(b"".join(part.digest for part in job if part.copies))
        bar.update(job[-1].end - bar.n)
        if writer.tokens - committed >= COMMIT_TOKENS:
            writer.journal.commit(job[-1].state._replace(bytes=size))
            committed = writer.tokens
    if not writer.documents:
        raise DataError(f"the weights of {found.source!r} leave none of its documents; give larger ones")
    return final[-1]._replace(bytes=size)


@contextmanager
def _encoder(tokenizer: Tokenizer, workers: int, size: int) -> Iterator[Encode]:
    """A function from jobs to jobs and their ids, in order: here, or in processes for a corpus that is worth them."""
    if workers == 1 or size < POOL_BYTES:
        yield lambda jobs: ((job, _encode(tokenizer, job, workers)) for job in jobs)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of torch's threads
    with ProcessPoolExecutor(workers, context, _begin, (tokenizer,)) as pool:
        try:
            yield lambda jobs: _in_order(pool, jobs, 2 * workers)
        except BrokenProcessPool as error:
            raise DataError(
                "a process that encodes has died: out of memory, or the script that prepares the data lacks its "
                "`if __name__ == '__main__':`"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _in_order(
    pool: ProcessPoolExecutor, jobs: Iterator[list[Chosen]], ahead: int
) -> Iterator[tuple[list[Chosen], Encoding]]:
    """Each job with its ids; `ahead` of them are in work or done, and no more."""
    waiting: deque[Any] = deque()
    for job in jobs:
        waiting.append((job, pool.submit(_encode_here, [part.segments for part in job])))
        if len(waiting) == ahead:
            job, future = waiting.popleft()
            yield job, future.result()
    for job, future in waiting:
        yield job, future.result()


def _encode(tokenizer: Tokenizer, job: list[Chosen], threads: int) -> Encoding:
    return document.encode(tokenizer, [part.segments for part in job], threads)


# In the other processes -----------------------------------------------------------------------------------------------

_TOKENIZERS: list[Tokenizer] = []  # of this process, which encodes with the one it was started for


def _begin(tokenizer: Tokenizer) -> None:
    """Ctrl-C is the parent's to handle, and without a parent there is nothing to do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    sentinel = parent.sentinel

    def watch() -> None:
        connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    _TOKENIZERS.append(tokenizer)


def _encode_here(parts: Sequence[Sequence[Segment]]) -> Encoding:
    return document.encode(_TOKENIZERS[0], parts)
