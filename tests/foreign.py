"""Folders as other programs write them, for the tests of coming in and going out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from strategies import weights

from functional_lm import folder, tree
from functional_lm.model.config import ModelConfig
from functional_lm.text import tokenizer as tokenizers
from functional_lm.text.tokenizer import Tokenizer

TEXT = "A folder is a promise: what went in comes out.\n"
CONFIG = {"vocab_size": 290, "d_model": 16, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ff": 24, "max_len": 64}


@pytest.fixture(scope="session")
def hf() -> Any:
    """transformers, imported once: it takes some seconds."""
    reason = "transformers is not installed (pip install 'functional_lm[hf]')"
    transformers = pytest.importorskip("transformers", reason=reason)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


@pytest.fixture(scope="session")
def bpe() -> Tokenizer:
    return tokenizers.train([TEXT * 20], vocab_size=290)


def save(path: Path, config: ModelConfig, tokenizer: Tokenizer, seed: int = 0) -> tree.Tree:
    params = weights(config, seed)
    folder.save(path, params, config, tokenizer)
    return params


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a folder's config.json as another program would, which knows nothing of ours."""
    values = json.loads((path / "config.json").read_text())
    values.pop("functional_lm", None)
    (path / "config.json").write_text(json.dumps({**values, **changes}))


@pytest.fixture
def llama(tmp_path: Path, bpe: Tokenizer) -> Path:
    """A small Llama as another program would have written it."""
    save(tmp_path / "llama", ModelConfig(**CONFIG, tie_embeddings=False), bpe)
    edit(tmp_path / "llama")
    return tmp_path / "llama"
