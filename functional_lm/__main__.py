"""`python -m functional_lm VERB`: every command by its verb."""

from __future__ import annotations

import sys

from functional_lm import (
    architecture,
    chat,
    evolve,
    finetune,
    generate,
    improve,
    interchange,
    merge,
    prepare,
    quantize,
    serve,
    train,
)
from functional_lm.cli import main

COMMANDS = (
    prepare.TRAIN_TOKENIZER,
    prepare.PREPARE,
    architecture.CREATE_CONFIG,
    architecture.INSPECT,
    train.COMMAND,
    finetune.FINETUNE,
    finetune.LORA,
    finetune.DPO,
    generate.COMMAND,
    chat.COMMAND,
    evolve.COMMAND,
    improve.COMMAND,
    merge.COMMAND,
    quantize.COMMAND,
    interchange.IMPORT,
    interchange.EXPORT,
    serve.COMMAND,
)

if __name__ == "__main__":
    sys.exit(main(COMMANDS))
