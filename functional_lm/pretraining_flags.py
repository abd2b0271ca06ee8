"""The flags of `pretrain`: what it learns from, what it begins with, how many models it trains. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from functional_lm.model import config as model_config
from functional_lm.options import option
from functional_lm.prepare import KINDS, SOURCES, download_folder, max_download
from functional_lm.training_flags import TrainingFlags

DEFAULT_OUT = "runs/train"


@dataclass(frozen=True)
class SourceFlags:
    """What `pretrain` learns from, what it begins with, and how many models it trains."""

    data: str = option("stdlib", f"text to learn: {SOURCES}; or tokens: NAME.bin", aliases=("data_path",))
    use_lmsys_dataset: str | None = option(
        None, "LMSYS-Chat-1M, a file or folder: learned beside --data, alone if that is not given"
    )
    out: str = option(DEFAULT_OUT, "run folder to write", aliases=("output_dir",))
    model: str | None = option(None, "model folder to go on from", aliases=("model_path",), group="Model")
    preset: str | None = option(None, "named architecture", choices=tuple(model_config.PRESETS), group="Model")
    config: str | None = option(None, "architecture from a JSON file", group="Model")
    tokenizer: str | None = option(None, "tokenizer file or folder to use", aliases=("tokenizer_path",), group="Text")
    tokenizer_type: str = option("bpe", "kind of tokenizer to train", choices=KINDS, group="Text")
    vocab_size: int | None = option(
        None, "vocabulary of a tokenizer trained here; the preset's if not given", low=8, high=1_000_000, group="Text"
    )
    val_fraction: float = option(0.05, "share of the tokens kept for validation", low=0, below=1, group="Text")
    deduplicate: bool = option(True, "drop documents that equal an earlier one", group="Text")
    packing: bool = option(True, "rows side by side over all text; false: (a part of) one document a row", group="Text")
    document_masking: bool = option(False, "packed documents do not attend to each other", group="Text")
    max_download: int = max_download()
    download_folder: str | None = download_folder()


@dataclass(frozen=True)
class PopulationFlags:
    """Several trainings in one compiled step."""

    population: int | None = option(None, "models to train at once in one compiled step", low=1, group="Population")
    seeds: tuple[int, ...] | None = option(
        None, "a seed for each; --seed and those after it if not given", low=0, group="Population"
    )
    learning_rates: tuple[float, ...] | None = option(None, "a peak rate for each", above=0, group="Population")
    weight_decays: tuple[float, ...] | None = option(None, "a decay for each", low=0, group="Population")


@dataclass(frozen=True)
class TrainOptions(PopulationFlags, TrainingFlags, SourceFlags):
    """Flags of `pretrain`; any field of the model configuration is a flag too."""
