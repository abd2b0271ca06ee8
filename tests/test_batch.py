"""`generate --prompts`: many prompts at once say what each says alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from functional_lm import batch, folder, keys, tree
from functional_lm.errors import DataError, UsageError
from functional_lm.generate import COMMAND, GenerateFlags, run
from functional_lm.inference import generate as tokens
from functional_lm.inference import text as writing
from functional_lm.inference.generate import GenerateOptions
from functional_lm.model import transformer
from functional_lm.model.config import ModelConfig
from functional_lm.text import tokenizer as tokenizers

TOKENIZER = tokenizers.train((), "bytes")
CONFIG = ModelConfig(vocab_size=TOKENIZER.vocab_size, d_model=16, n_layers=1, n_heads=2, max_len=64)
PARAMS = tree.map(lambda leaf: 3 * leaf, transformer.init(CONFIG, keys.key(0)))
ROWS: list[Any] = [
    "The quick",
    {"prompt": "The quick", "temperature": 0, "id": {"any": "thing"}},
    {"prompt": "", "seed": 9, "max_tokens": 3},
    {"prompt": "brown fox", "top_k": 4, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2},
    {"prompt": "naïve 日本", "stop": ["e", "a"], "seed": 2},
]


def alone(row: Any) -> str:
    """The same by the plain loop, one prompt at a time."""
    row = {"prompt": row} if isinstance(row, str) else row
    own = {name: value for name, value in row.items() if name not in ("prompt", "stop", "id")}
    how = GenerateOptions(**{"max_tokens": 12, "seed": 5, "stop_ids": (TOKENIZER.eos_id,), **own})
    pieces = writing.stream(PARAMS, tokens.decoder(CONFIG, compile=False), TOKENIZER, row["prompt"], how)
    return "".join(writing.until(pieces, row.get("stop", ())))


def test_rows_say_what_each_says_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder.save(tmp_path / "model", PARAMS, CONFIG, TOKENIZER)
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join([*(json.dumps(row) for row in ROWS), "", " "]), encoding="utf-8")
    how = {"model": str(tmp_path / "model"), "max_tokens": 12, "seed": 5, "compile": False, "dtype": "float32"}
    assert run(GenerateFlags(**how, prompts=str(file), slots=2)) == 0
    printed = capsys.readouterr()
    made = [json.loads(line) for line in printed.out.splitlines()]
    assert [row["text"] for row in made] == [alone(row) for row in ROWS]
    assert made[1]["id"] == {"any": "thing"}
    assert made[4]["finish_reason"] == "stop" or not set("ea") & set(made[4]["text"])
    assert "5 prompts" in printed.err
    lines = tmp_path / "rows.txt"
    lines.write_text("The quick\n\nbrown fox\n", encoding="utf-8")
    run(GenerateFlags(**how, prompts=str(lines)))
    made = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["prompt"], row["text"]) for row in made] == [
        (text, alone(text)) for text in ("The quick", "brown fox")
    ]


def test_a_text_may_outgrow_the_context(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder.save(tmp_path / "model", PARAMS, CONFIG, TOKENIZER)
    rows = [{"prompt": "x" * 70, "max_tokens": 40, "seed": 5}, {"prompt": "fox", "max_tokens": 90, "seed": 5}]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    how = {"model": str(tmp_path / "model"), "max_tokens": 12, "seed": 5, "compile": False, "dtype": "float32"}
    assert run(GenerateFlags(**how, prompts=str(file))) == 0
    printed = capsys.readouterr()
    assert [json.loads(line)["text"] for line in printed.out.splitlines()] == [alone(row) for row in rows]
    assert "of a prompt of 70 tokens the model reads the last 64" in printed.err
    for row in rows:
        assert run(GenerateFlags(**{**how, "prompt": row["prompt"], "max_tokens": row["max_tokens"]})) == 0
        assert capsys.readouterr().out == f"{row['prompt']}{alone(row)}\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "line 1 is no JSON"),
        ('"x"\n[1]', "line 2 is no text"),
        ('{"text": "x"}', "no object with a prompt"),
        ('{"prompt": "x", "k": 1}', "'k' is not known"),
        ('{"prompt": "x", "temperature": -1}', "temperature is -1"),
        ('{"prompt": "x", "max_tokens": true}', "max_tokens is True"),
        ('{"prompt": "x", "top_p": NaN}', "top_p is nan"),
        ('{"prompt": "x", "stop": [""]}', "stop is"),
        ('{"prompt": "x", "seed": -1}', "seed is -1"),
        ("[" * 9000, "is no JSON"),
        ("", "holds no prompt"),
    ],
)
def test_a_wrong_row_is_named_before_any_work(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(text)
    with pytest.raises(UsageError, match=words):
        run(GenerateFlags(model=str(tmp_path / "nowhere"), prompts=str(file)))


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read"):
        batch.read(str(tmp_path / "nowhere"), GenerateFlags(model="x"))
    with pytest.raises(UsageError, match="give either"):
        run(GenerateFlags(model="x", prompt="a", prompts="b"))
    assert COMMAND.name == "generate"
