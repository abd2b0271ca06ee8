"""What a transformer is: one frozen, hashable description from which shapes, files and behaviour follow.

Axes: B batch, T time, D model width, H query heads, K key/value heads, E head width, F feed-forward width,
V vocabulary, L layers.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from functional_lm import pickles
from functional_lm.errors import DataError, UsageError, json_kind
from functional_lm.model.presets import ORIGINAL_KEYS, preset_values, translate
from functional_lm.model.presets import PRESETS as PRESETS
from functional_lm.options import check, option

CHOICES: dict[str, tuple[str, ...]] = {
    "feed_forward": ("swiglu", "gelu", "gelu_erf", "relu", "relu2"),
    "attention": ("auto", "standard", "flash"),
    "positions": ("rope", "sinusoidal", "learned", "none"),
    "norm": ("rmsnorm", "layernorm"),
    "norm_placement": ("pre", "post"),
    "bias": ("none", "qkv", "attention", "all"),
}
# Where a long row of queries on the CPU makes the fused kernel's memory worth its slower backward.
LONG = 1024


@dataclass(frozen=True)
class ModelConfig:
    """The architecture. Numbers left at 0 are derived: `n_kv_heads` = `n_heads`, `head_dim` = D/H, others from D."""

    vocab_size: int = option(32000, "tokens in the vocabulary (V)", low=1, high=100_000_000)
    d_model: int = option(256, "model width (D)", low=1, high=1_000_000)
    n_layers: int = option(6, "transformer blocks (L)", low=1, high=10_000)
    n_heads: int = option(8, "query heads (H)", low=1, high=100_000)
    n_kv_heads: int = option(0, "key/value heads (K), a divisor of n_heads; 0: as many as n_heads", low=0, high=100_000)
    head_dim: int = option(0, "width of a head (E); 0: d_model / n_heads", low=0, high=1_000_000)
    d_ff: int = option(
        0, "feed-forward width (F); 0: 8/3 d_model for swiglu, 4 d_model otherwise", low=0, high=10_000_000
    )
    max_len: int = option(256, "longest sequence the model is made for, tokens", low=1, high=1_000_000_000)
    dropout: float = option(0.0, "probability of dropping an activation while training", low=0, below=1)
    positions: str = option("rope", "how tokens know their place", choices=CHOICES["positions"])
    rope_theta: float = option(10000.0, "base of the rotary frequencies", above=0)
    rotary_fraction: float = option(1.0, "share of each head that is rotated", above=0, high=1)
    rope_scaling: tuple[float, float, float, float] | None = option(
        None, "Llama-3 scaling: factor,low_freq_factor,high_freq_factor,original_max_len"
    )
    norm: str = option("rmsnorm", "kind of normalisation", choices=CHOICES["norm"])
    norm_placement: str = option(
        "pre", "pre: normalise a block's input; post: the sum after it", choices=CHOICES["norm_placement"]
    )
    norm_eps: float = option(1e-5, "added to the variance in a norm", above=0)
    feed_forward: str = option("swiglu", "activation of the feed-forward part", choices=CHOICES["feed_forward"])
    bias: str = option("none", "which projections have a bias", choices=CHOICES["bias"])
    qk_norm: bool = option(False, "RMSNorm on each query and key head")
    attention: str = option(
        "auto",
        "standard vmaps and differentiates twice, flash is the fused kernel, auto goes by device",
        choices=CHOICES["attention"],
    )
    sliding_window: int = option(0, "how many tokens back a token attends; 0: all", low=0)
    parallel_residual: bool = option(False, "attention and feed-forward both read the block's input")
    logit_softcap: float = option(0.0, "logits become c tanh(logits / c); 0: off", low=0)
    tie_embeddings: bool = option(True, "one matrix for embedding and output")
    checkpoint_activations: bool = option(False, "recompute each layer in the backward pass to save memory")
    initializer_range: float = option(
        0.0, "standard deviation of the initial weights; 0: the square root of 2 / (5 d_model)", low=0
    )

    def __post_init__(self) -> None:
        derive = object.__setattr__
        check(self)
        if not self.n_kv_heads:
            derive(self, "n_kv_heads", self.n_heads)
        if not self.head_dim:
            if self.d_model % self.n_heads:
                raise UsageError(
                    f"d_model {self.d_model} is not a multiple of n_heads {self.n_heads}; change one or give head_dim"
                )
            derive(self, "head_dim", self.d_model // self.n_heads)
        if not self.d_ff:
            wide = 4 * self.d_model if self.feed_forward != "swiglu" else math.ceil(8 * self.d_model / 3 / 32) * 32
            derive(self, "d_ff", wide)
        if not self.initializer_range:  # "small init", Nguyen and Salazar, arXiv 1910.05895, section 2.2
            derive(self, "initializer_range", math.sqrt(2 / (5 * self.d_model)))
        if self.rope_scaling is not None:
            derive(self, "rope_scaling", self._scaling(self.rope_scaling))
        self._check()

    def _check(self) -> None:
        """What the limits of the single fields do not say."""
        if self.n_heads % self.n_kv_heads:
            raise UsageError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        if self.positions == "rope" and self.rotary_width < 2:
            raise UsageError(
                f"rotary_fraction {self.rotary_fraction} of head_dim {self.head_dim} is less than one pair; raise one"
            )
        if self.positions == "sinusoidal" and self.d_model % 2:
            raise UsageError(f"d_model {self.d_model} is odd; sinusoidal positions need an even width")
        if self.parallel_residual and self.norm_placement == "post":
            raise UsageError("parallel_residual goes with norm_placement pre, not post")

    @staticmethod
    def _scaling(found: Any) -> tuple[float, ...]:
        """`rope_scaling` as floats. Raises UsageError."""
        numbers = tuple(found) if isinstance(found, (list, tuple)) else ()
        real = all(isinstance(n, (int, float)) and not isinstance(n, bool) and 0 < n < math.inf for n in numbers)
        if len(numbers) != 4 or not real or numbers[1] >= numbers[2]:
            raise UsageError(
                f"rope_scaling is {found!r}; it has to be four positive numbers, the second less than the third"
            )
        return tuple(map(float, numbers))

    @property
    def rotary_width(self) -> int:
        """How many dimensions of a head are rotated; even."""
        return int(self.head_dim * self.rotary_fraction) // 2 * 2

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


NAMES = tuple(f.name for f in dataclasses.fields(ModelConfig))


def from_json(values: dict[str, Any], source: str = "the configuration") -> ModelConfig:
    """The config of a dict with our names; an unknown name is refused with the nearest known one."""
    for name in values:
        if name not in NAMES:
            near = difflib.get_close_matches(name, [*NAMES, *sorted(ORIGINAL_KEYS)], 1)
            raise UsageError(f"{source} has an unknown key {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    try:
        return ModelConfig(**values)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{source} holds a value of the wrong type ({error})") from error


def preset(name: str, **changes: Any) -> ModelConfig:
    """A named architecture with some fields changed."""
    return ModelConfig(**{**preset_values(name), **changes})


# Files -------------------------------------------------------------------------------------------------------------


def read(path: str | Path) -> ModelConfig:
    """The ModelConfig of a configuration file, in any of the forms that `read_values` understands.

    Raises DataError for a `config.json` that another program wrote.
    """
    values = read_values(path)
    if "model_type" in values:
        pickles.refuse(Path(path).parent)
        raise DataError(
            f"{path} describes a {values['model_type']!r} of another program; bring its folder in with "
            f"`python -m functional_lm import --from {Path(path).parent} --out DIR`"
        )
    with _blamed(path):
        return from_json(values, str(path))


@contextmanager
def _blamed(path: str | Path) -> Iterator[None]:
    """What is wrong in a file is no wrong call: a DataError that names the file."""
    try:
        yield
    except UsageError as error:
        named = f"{error}".startswith(str(path))
        raise DataError(f"{error}" if named else f"{path}: {error}") from error


def changed(values: dict[str, Any], changes: Mapping[str, Any], path: str | Path) -> ModelConfig:
    """The ModelConfig of a file's `values` with some of them changed.

    Raises DataError where the file alone cannot be meant either, UsageError where the changes do not go with it.
    """
    try:
        return from_json({**values, **changes}, str(path))
    except UsageError:
        with _blamed(path):
            from_json(values, str(path))
        raise


def read_values(path: str | Path) -> dict[str, Any]:
    """The fields that a configuration file sets, in our names.

    The file is a `config.json` that this project wrote (values under "functional_lm"), or a bare object of our names
    or of the originals' (`presets.translate`). Raises DataError for a missing file, one that is no JSON object, and
    keys that contradict each other.
    """
    values = read_object(path)
    with _blamed(path):
        return translate(_object(values.get("functional_lm", values), path), str(path))


def read_object(path: str | Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises DataError for a missing file or one that holds something else."""
    path = Path(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        if path.name == "config.json":
            pickles.refuse(path.parent)
        adapter = (path.parent / "adapter_config.json").is_file()
        remedy = f": an adapter lies there; `merge --base MODEL --models {path.parent}` makes one of both"
        usual = "; name a model folder" if path.name == "config.json" else "; check the path"
        raise DataError(f"no configuration at {path}{remedy if adapter else usual}") from error
    except NotADirectoryError as error:
        pickles.refuse(path.parent)
        raise DataError(f"{path.parent} is a file; name the folder that it lies in") from error
    except IsADirectoryError as error:
        raise DataError(f"{path} is a folder; name the JSON file in it") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error})") from error
    return _object(values, path)


def _object(values: Any, path: str | Path) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise DataError(f"{path} holds {json_kind(values)}, not an object of settings")
    return values
