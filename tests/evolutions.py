"""What tests of the command share: a small world, a call, and what is left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from functional_lm import evolve, folder, keys, tree
from functional_lm.cli import main_single
from functional_lm.model import transformer
from functional_lm.model.config import ModelConfig
from functional_lm.text import tokenizer as tokenizers

WORDS = "the cat sat on the mat and the dog sat on the log " * 30
EAGER = ["--compile", "false", "--dtype", "float32"]


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model, a text and questions."""
    place = tmp_path_factory.mktemp("evolve")
    (place / "text.txt").write_text(WORDS)
    rows = [{"prompt": f"the {a} ", "response": "sat"} for a in ("cat", "dog") for _ in range(8)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = tokenizers.train([WORDS], "char", 280)
    config = ModelConfig(vocab_size=tokenizer.vocab_size, d_model=16, n_layers=1, n_heads=2, max_len=32)
    folder.save(place / "model", transformer.init(config, keys.key(0)), config, tokenizer)
    (place / "scores.py").write_text(
        "import pathlib, sys, time\n"
        "def sat(texts, rows):\n    return [float('s' in text) + float('a' in text) for text in texts]\n"
        "def letters(texts, rows):\n    return [sum(map(ord, text)) / 1000 for text in texts]\n"
        "def fails(texts, rows):\n    raise ValueError('on purpose')\n"
        "def leaves(texts, rows):\n    sys.exit(0)\n"
        "def nothing(texts, rows):\n    print(end='')\n"
        "def nested(texts, rows):\n    return [[float(len(text))] for text in texts]\n"
        "def sleeps(texts, rows):\n    time.sleep(60)\n"
        "def goes_on(texts, rows):\n"
        "    while True:\n        try:\n            time.sleep(60)\n        except Exception:\n            pass\n"
        "def waits(texts, rows):\n    raise TimeoutError('timed out')\n"
        "def nan(texts, rows):\n    return [float('nan')] * len(texts)\n"
        "def later(texts, rows):\n"
        "    if pathlib.Path('broken').exists():\n        raise ValueError('broken by now')\n"
        "    return [float(len(text)) for text in texts]\n"
    )
    return place


@pytest.fixture
def at(there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(there)
    return tmp_path


def call(*arguments: str) -> int:
    return main_single(evolve.COMMAND, [*map(str, arguments)])


def evolved(out: Path, *more: str, data: str = "text.txt") -> int:
    usual = ["--model", "model", "--data", data, "--block_size", "16", "--batch_size", "4"]
    usual += ["--population", "4", "--generations", "3", *EAGER]
    kept = [word for flag, word in zip(usual[::2], usual[1::2]) if flag not in more for word in (flag, word)]
    return call("--out", out, *kept, *more)


def weights_of(run: Path) -> str:
    name = "model.safetensors" if (run / "model.safetensors").exists() else "adapter_model.safetensors"
    return tree.digest(tree.load(run / name))


def contents(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}
