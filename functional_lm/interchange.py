"""`python -m functional_lm import` and `export`: models of other programs in, and ours out to them."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path

from functional_lm import console
from functional_lm.cli import Command, main
from functional_lm.errors import UsageError
from functional_lm.options import REQUIRED, option

# Format: "module:function", called as function(model folder, folder to write), for gguf with the type behind them; it
# returns words for what it wrote.
FORMATS = {
    "hf": "functional_lm.interop.hugging_face:export",
    "gpt2": "functional_lm.interop.hugging_face:export_gpt2",
    "gguf": "functional_lm.interop.gguf:export",
}
GGUF_TYPES = ("f32", "f16", "bf16", "q8_0")
# What a tokenizer is to other programs; a kind that they do not have comes without.
TRANSLATED = ("tokenizer.json", "tokenizer.model")


@dataclass(frozen=True)
class ImportFlags:
    """Flags of `import`."""

    source: str = option(REQUIRED, "Hugging Face folder to read: config.json, safetensors, tokenizer", typed="from")
    out: str = option(REQUIRED, "model folder to write", aliases=("output_dir",))


@dataclass(frozen=True)
class ExportFlags:
    """Flags of `export`."""

    model: str = option(REQUIRED, "model folder", aliases=("model_path",))
    out: str = option(REQUIRED, "folder to write, or a file NAME.gguf", aliases=("output_dir",))
    format: str = option(
        "hf",
        "hf: the family of Hugging Face's that computes the same; gpt2: that one; gguf: llama.cpp's file",
        choices=tuple(FORMATS),
    )
    gguf_type: str | None = option(None, "type of the matrices in a gguf; f16 if not given", choices=GGUF_TYPES)


def run_import(options: ImportFlags) -> int:
    from functional_lm.interop import hugging_face
    from functional_lm.model.account import parameters

    config = hugging_face.import_folder(options.source, options.out)
    console.say(f"the model is in {options.out}: {console.count(parameters(config))} parameters")
    return 0


def run_export(options: ExportFlags) -> int:
    if options.gguf_type is not None and options.format != "gguf":
        raise UsageError(f"--gguf_type {options.gguf_type} belongs to --format gguf, not {options.format}")
    module, _, name = FORMATS[options.format].partition(":")
    more = (options.gguf_type or "f16",) if options.format == "gguf" else ()
    written = getattr(importlib.import_module(module), name)(options.model, options.out, *more)
    if options.format != "gguf" and not any((Path(options.out) / name).is_file() for name in TRANSLATED):
        console.note("the tokenizer has no form that others read; its own file lies beside the model")
    console.say(f"the model is in {options.out}, as a {written}")
    return 0


IMPORT = Command(
    "import", "bring a model in from a Hugging Face folder", ImportFlags, run_import, positional=("source",)
)
EXPORT = Command("export", "write a model for another program", ExportFlags, run_export)

if __name__ == "__main__":
    sys.exit(main((IMPORT, EXPORT), prog="python -m functional_lm.interchange"))
