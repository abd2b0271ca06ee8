"""The README is true: its snippets run as printed, in order, and its tables of flags are those of the commands."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from functional_lm import folder, keys
from functional_lm.model import transformer
from functional_lm.model.config import ModelConfig
from functional_lm.text import tokenizer as tokenizers

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
sys.path.insert(0, str(ROOT / "tools"))


def test_snippets_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = tokenizers.train([(ROOT / "functional_lm" / "tree.py").read_text(encoding="utf-8")], "bpe", 400)
    config = ModelConfig(vocab_size=tokenizer.vocab_size, d_model=16, n_layers=2, n_heads=2, max_len=32)
    folder.save(tmp_path / "runs" / "train", transformer.init(config, keys.key(0)), config, tokenizer)
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(snippets) >= 6
    names: dict[str, object] = {}
    for number, snippet in enumerate(snippets):
        exec(compile(snippet, f"README snippet {number}", "exec"), names)
    printed = capsys.readouterr().out
    assert "nats a token" in printed
    assert "ensemble logits [4, 2, 12," in printed


def test_tables_of_flags_are_current() -> None:
    import readme

    assert readme.BLOCK.search(README), "the README has no table of flags"
    assert readme.renewed(README) == README, "run python tools/readme.py"
