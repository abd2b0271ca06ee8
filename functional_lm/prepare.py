"""`python -m functional_lm prepare` and `train-tokenizer`: text into tokens, once, for many runs."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from functional_lm import console
from functional_lm.cli import Command, main
from functional_lm.errors import UsageError
from functional_lm.options import REQUIRED, option

if TYPE_CHECKING:
    from functional_lm.text.download import Downloads
    from functional_lm.text.prepare import Summary
    from functional_lm.text.tokenizer import Tokenizer

SOURCES = "files, folders, globs, http(s) addresses, stdlib, commas between; SRC=2 weighs twice"
KINDS = ("bpe", "unigram", "char", "bytes", "wordchar")


def max_download() -> Any:
    return option(4_000_000_000, "most bytes of a file that an address names", low=1, group="Addresses")


def download_folder() -> Any:
    return option(None, "where downloads are kept; ~/.cache/functional_lm/downloads if not given", group="Addresses")


@dataclass(frozen=True)
class TokenizerFlags:
    """Flags of `train-tokenizer`."""

    out: str = option(REQUIRED, "folder to write the tokenizer to", aliases=("output_dir",))
    data: str | None = option(None, f"text to learn from (bytes need none): {SOURCES}", aliases=("data_path",))
    tokenizer_type: str = option("bpe", "kind of tokenizer", choices=KINDS)
    vocab_size: int = option(4096, "tokens: exactly of bpe, unigram; at most of char, wordchar", low=8, high=1_000_000)
    overwrite: bool = option(False, "replace a tokenizer that is there")
    max_download: int = max_download()
    download_folder: str | None = download_folder()


@dataclass(frozen=True)
class PrepareFlags:
    """Flags of `prepare`."""

    data: str = option(REQUIRED, f"text to encode: {SOURCES}", aliases=("data_path",))
    out: str = option(REQUIRED, "dataset to write: NAME for NAME.bin and NAME.index")
    tokenizer: str = option(REQUIRED, "tokenizer file or folder", aliases=("tokenizer_path",))
    deduplicate: bool = option(True, "drop documents that equal an earlier one")
    threads: int | None = option(None, "processes that encode; all cores if not given", low=1, high=1024)
    overwrite: bool = option(False, "replace a dataset of something else that is there")
    max_download: int = max_download()
    download_folder: str | None = download_folder()


def downloads(options: Any) -> Downloads:
    """How addresses are got, from the flags that say so."""
    from functional_lm.text.download import Downloads

    return Downloads(options.max_download, Path(options.download_folder) if options.download_folder else None)


def run_tokenizer(options: TokenizerFlags) -> int:
    from functional_lm.text import corpus, prepare, tokenizer

    if options.data is None and options.tokenizer_type != "bytes":
        raise UsageError(f"--data is required: a {options.tokenizer_type} tokenizer learns from text")
    _check_tokenizer_place(options)
    found = corpus.find(options.data, downloads(options)) if options.data is not None else None
    with console.announced(f"making a {options.tokenizer_type} tokenizer"):
        if found is None:
            made = tokenizer.train((), options.tokenizer_type)
        else:
            made = prepare.train_tokenizer(found, options.tokenizer_type, options.vocab_size)
    _save_tokenizer(made, Path(options.out))
    console.say(f"the tokenizer is in {options.out}: {made.vocab_size} tokens, digest {made.digest[:12]}")
    return 0


def _check_tokenizer_place(options: TokenizerFlags) -> None:
    """Nobody's model gets another tokenizer by mistake."""
    from functional_lm import files
    from functional_lm.text.interface import MODEL_FILES

    out = Path(options.out)
    files.sweep_beside(out)
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file; name a folder")
    for name in ("model.safetensors", "config.json", *MODEL_FILES):
        if (out / name).exists() and (not options.overwrite or name not in MODEL_FILES):
            what, remedy = ("tokenizer", ", or --overwrite it") if name in MODEL_FILES else ("model", "")
            raise UsageError(f"--out {out} holds a {what} already ({name}); choose another folder{remedy}")


def _save_tokenizer(made: Tokenizer, out: Path) -> None:
    """All of its files, or none; into a folder that holds something else each by itself."""
    from functional_lm import files
    from functional_lm.text.interface import MODEL_FILES

    own = {*MODEL_FILES, "tokenizer_config.json"}
    if out.is_dir() and any(path.name not in own for path in out.iterdir()):
        made.save(out)
        return
    with files.writing_folder(out) as temporary:
        made.save(temporary)


def run_prepare(options: PrepareFlags) -> int:
    from functional_lm.text import corpus, prepare, storage, tokenizer

    if Path(options.out).name in ("", ".."):
        raise UsageError(f"--out {options.out} names no dataset; give it a name, such as {Path(options.out) / 'text'}")
    loaded = tokenizer.load(options.tokenizer)
    found = corpus.find(options.data, downloads(options))
    if not options.overwrite and not prepare.is_own(found, options.out, loaded, options.deduplicate):
        name = storage.name_of(options.out)
        raise UsageError(f"--out {name}.bin is a dataset of something else; choose another name, or --overwrite it")
    made = prepare.prepare(found, options.out, loaded, options.threads, deduplicate=options.deduplicate)
    console.say(describe(made) + (" (made earlier from the same files, kept)" if made.reused else ""))
    name = storage.name_of(options.out)
    console.say(f"the dataset is {name}.bin with {name}.index")
    console.say(f"train on it with --data {name}.bin --tokenizer {options.tokenizer}")
    return 0


def describe(made: Summary) -> str:
    left_out = [
        f"{console.count(number)} {what}"
        for number, what in ((made.duplicates, "duplicates dropped"), (made.passed_over, "left out by their weight"))
        if number
    ]
    return ", ".join(
        [
            f"{console.count(made.bytes)} bytes in {console.count(made.documents)} documents are "
            f"{console.count(made.tokens)} tokens of {made.bytes / made.tokens:.2f} bytes",
            *left_out,
        ]
    )


TRAIN_TOKENIZER = Command("train-tokenizer", "learn a vocabulary from text", TokenizerFlags, run_tokenizer)
PREPARE = Command("prepare", "encode text as a memory-mapped dataset", PrepareFlags, run_prepare)

if __name__ == "__main__":
    sys.exit(main((TRAIN_TOKENIZER, PREPARE), prog="python -m functional_lm.prepare"))
