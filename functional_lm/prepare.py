"""`python -m functional_lm prepare` and `train-tokenizer`: text into tokens, once, for many runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from functional_lm import console
from functional_lm.cli import Command
from functional_lm.options import REQUIRED, option

if TYPE_CHECKING:
    from functional_lm.text.prepare import Summary

SOURCES = "files, folders, globs, .jsonl, or stdlib; several with commas"
KINDS = ("bpe",)


@dataclass(frozen=True)
class TokenizerFlags:
    """Flags of `train-tokenizer`."""

    data: str = option(REQUIRED, f"text to learn from: {SOURCES}", aliases=("data_path",))
    out: str = option(REQUIRED, "folder to write the tokenizer to", aliases=("output_dir",))
    tokenizer_type: str = option("bpe", "kind of tokenizer", choices=KINDS)
    vocab_size: int = option(4096, "tokens in the vocabulary", low=8, high=1_000_000)


@dataclass(frozen=True)
class PrepareFlags:
    """Flags of `prepare`."""

    data: str = option(REQUIRED, f"text to encode: {SOURCES}", aliases=("data_path",))
    out: str = option(REQUIRED, "dataset to write: NAME for NAME.bin and NAME.index")
    tokenizer: str = option(REQUIRED, "tokenizer file or folder", aliases=("tokenizer_path",))


def run_tokenizer(options: TokenizerFlags) -> int:
    from functional_lm.text import prepare

    with console.announced(f"training a {options.tokenizer_type} tokenizer of {options.vocab_size}"):
        tokenizer = prepare.train_tokenizer(options.data, options.tokenizer_type, options.vocab_size)
    tokenizer.save(Path(options.out))
    console.say(f"the tokenizer is in {options.out}: {tokenizer.vocab_size} tokens, digest {tokenizer.digest[:12]}")
    return 0


def run_prepare(options: PrepareFlags) -> int:
    from functional_lm.text import prepare, tokenizer

    made = prepare.prepare(options.data, options.out, tokenizer.load(options.tokenizer))
    console.say(describe(made) + (" (made earlier from the same files, kept)" if made.reused else ""))
    console.say(f"the dataset is {options.out}.bin with {options.out}.index; train on it with --data {options.out}.bin")
    return 0


def describe(made: Summary) -> str:
    return (
        f"{console.count(made.bytes)} bytes in {console.count(made.documents)} documents are "
        f"{console.count(made.tokens)} tokens of {made.bytes / made.tokens:.2f} bytes"
    )


TRAIN_TOKENIZER = Command("train-tokenizer", "learn a vocabulary from text", TokenizerFlags, run_tokenizer)
PREPARE = Command("prepare", "encode text as a memory-mapped dataset", PrepareFlags, run_prepare)
