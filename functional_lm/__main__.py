"""`python -m functional_lm VERB`: every command by its verb."""

from __future__ import annotations

import sys

from functional_lm import architecture, generate, interchange, merge, prepare, quantize, train
from functional_lm.cli import main

COMMANDS = (
    prepare.TRAIN_TOKENIZER,
    prepare.PREPARE,
    architecture.CREATE_CONFIG,
    architecture.INSPECT,
    train.COMMAND,
    generate.COMMAND,
    merge.COMMAND,
    quantize.COMMAND,
    interchange.IMPORT,
    interchange.EXPORT,
)

if __name__ == "__main__":
    sys.exit(main(COMMANDS))
