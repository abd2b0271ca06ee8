"""From documents to a tokenizer and to a dataset: corpus, tokenizer and dataset wired together, with progress."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from functional_lm import files
from functional_lm.errors import DataError
from functional_lm.text import corpus, dataset, tokenizer
from functional_lm.text.tokenizer import Tokenizer

RECIPE = 1  # raise it when the same files and tokenizer come to give other tokens
BATCH_CHARACTERS = 4 << 20


@dataclass(frozen=True)
class Summary:
    """What `prepare` made: counts, UTF-8 bytes of the text, seconds that it took, whether an older result was kept."""

    documents: int
    tokens: int
    bytes: int
    seconds: float
    reused: bool = False


def train_tokenizer(
    source: str, kind: str = "bpe", vocab_size: int = 4096, sample_bytes: int = tokenizer.SAMPLE_BYTES
) -> Tokenizer:
    """A tokenizer trained on the documents of `source`. Raises as `corpus.documents` and `tokenizer.train` do."""
    return tokenizer.train(corpus.documents(source), kind, vocab_size, sample_bytes)


def prepare(
    source: str,
    out: str | Path,
    tokenizer: Tokenizer,
    threads: int | None = None,
    progress: bool = True,
    reuse: bool = True,
) -> Summary:
    """Write the documents of `source` as the dataset `out` (NAME of NAME.bin, NAME.index, NAME.json).

    Streams: memory does not grow with the corpus, only with its largest document. With `reuse`, a dataset that was
    made by the same tokenizer from the same files (path, size, modification time) is kept; NAME.json remembers that.
    Raises as `corpus.documents` does, and DataError for text that cannot be encoded.
    """
    documents = corpus.documents(source)
    record = Path(f"{dataset.name_of(out)}.json")
    inputs = {"recipe": RECIPE, "files": corpus.fingerprint(source), "tokenizer": tokenizer.digest}
    if reuse and (kept := _kept(record, inputs, tokenizer)):
        return kept
    started, size = time.perf_counter(), 0
    with (
        tqdm(total=corpus.size(source), unit="B", unit_scale=True, desc="tokens", disable=_hidden(progress)) as bar,
        dataset.writing(out, tokenizer.vocab_size, tokenizer.eos_id, tokenizer.digest) as writer,
    ):
        for texts in _batches(documents):
            for ids in tokenizer.encode_batch(texts, threads or os.cpu_count() or 1):
                writer.append(ids)
                bytes_ = int(tokenizer.byte_lengths[ids].sum())
                size += bytes_
                bar.update(bytes_)
        bar.total = bar.n  # JSONL has more bytes than its documents
    summary = Summary(writer.documents, writer.tokens, size, time.perf_counter() - started)
    made = dataset.open_dataset(out, tokenizer)
    files.write_json(record, {"source": source, **inputs, "dataset": made.digest, "summary": asdict(summary)})
    return summary


def _hidden(progress: bool) -> bool | None:
    """tqdm's `disable`: None hides the bar where no terminal shows it."""
    return None if progress else True


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """Documents in lists of some BATCH_CHARACTERS, enough for every thread to have work."""
    texts: list[str] = []
    held = 0
    for document in documents:
        texts.append(document)
        held += len(document)
        if held >= BATCH_CHARACTERS:
            yield texts
            texts, held = [], 0
    if texts:
        yield texts


def _kept(record: Path, inputs: dict[str, Any], tokenizer: Tokenizer) -> Summary | None:
    """The summary of an earlier run, if its inputs and its result are still what they were."""
    try:
        earlier = files.read_json(record)
        found = dataset.open_dataset(record.with_suffix(""), tokenizer)
        same = all(earlier[name] == value for name, value in inputs.items())
        if same and earlier["dataset"] == found.digest:
            return Summary(**{**earlier["summary"], "reused": True})
    except (OSError, ValueError, KeyError, TypeError, DataError):
        pass
    return None
