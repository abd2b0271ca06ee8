"""Weights as pickles, which could run code and are never opened: one refusal, with the way to convert them."""

from __future__ import annotations

from pathlib import Path

from functional_lm.errors import DataError

SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
ADAPTER = "adapter_model"
CONVERSIONS = {
    True: "peft's PeftModel.from_pretrained(BASE, FOLDER).save_pretrained(OTHER) writes safetensors",
    False: (
        "transformers' AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(OTHER, safe_serialization=True) "
        "writes safetensors, which `python -m functional_lm import --from OTHER --out DIR` brings in"
    ),
}


def refuse(path: Path) -> None:
    """Raise DataError for a pickle, and for a folder that holds one and no safetensors; `path` need not exist."""
    if path.is_file():
        found = [path] if _is_pickle(path) else []
    else:
        found = [] if any(path.glob("*.safetensors")) else sorted(filter(_is_pickle, path.glob("*.*")))
    if found:
        conversion = CONVERSIONS[found[0].stem == ADAPTER]
        raise DataError(
            f"{found[0]} is a pickle, which could run code and is never opened; where you trust it, convert it: "
            f"{conversion}"
        )


def _is_pickle(path: Path) -> bool:
    """By its name; the tokens of a dataset, `NAME.bin` beside `NAME.index`, are none."""
    return path.suffix in SUFFIXES and path.is_file() and not path.with_suffix(".index").exists()
