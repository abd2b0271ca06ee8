"""`improve`: a model that learns from its best answers, keeps what it was where they do not help, and goes on."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from strategies import assert_close, weights

from functional_lm import files, folder, improve, keys, tree
from functional_lm.cli import main_single
from functional_lm.evolution import improvement
from functional_lm.model import transformer
from functional_lm.model.config import ModelConfig
from functional_lm.text import chat, conversations, supervised
from functional_lm.text import tokenizer as tokenizers
from functional_lm.training import optimizer, schedule, step

PAIRS = [(a, b) for a in range(6) for b in range(6)]


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sums of two digits, and a model that has seen more wrong answers (the digits side by side) than right ones."""
    place = tmp_path_factory.mktemp("improve")
    rows = [{"prompt": f"{a}+{b}", "response": str(a + b)} for a, b in PAIRS]
    (place / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "sum_scores.py").write_text(
        "def fails(texts, rows):\n    raise ValueError('on purpose')\n"
        "def nan(texts, rows):\n    return [float('nan')] * len(texts)\n"
        "def worse(texts, rows):\n"
        "    return [(1.0 if len(texts) > 20 else -1.0) * (text.strip() != row['response'])"
        " for text, row in zip(texts, rows)]\n"
    )
    tokenizer = tokenizers.train(["0123456789+"], "char", 300)
    config = ModelConfig(tokenizer.vocab_size, d_model=32, n_layers=1, n_heads=2, max_len=16)
    functions = step.training(config, optimizer.adamw(), schedule.constant(5), numbers={"learning_rate": 0.01})
    state = functions.init(transformer.init(config, keys.key(0)), keys.key(1))
    seen = [(row["prompt"], row["response"] if i % 5 < 2 else row["prompt"].replace("+", ""))
            for i in range(5) for row in rows]  # fmt: skip
    data = [
        conversations.Conversation((chat.turn("user", prompt), chat.turn("assistant", said)), "")
        for prompt, said in seen
    ]
    packed = supervised.pack(supervised.samples(tokenizer, data, 12), 12, packing=False)
    for number in range(240):
        batch = supervised.batch(packed, number, 32, 0)
        state, _ = functions.train_step(state, {name: torch.from_numpy(array) for name, array in batch.items()})
    folder.save(place / "model", state.params, config, tokenizer)
    bare = tokenizers.train(["0123456789+"], "char", 300)
    folder.save(place / "other", transformer.init(config, keys.key(5)), config, bare)
    return place


@pytest.fixture
def at(there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(there)
    return tmp_path


def improved(out: Path, *more: str) -> int:
    words = {
        "--model": "model", "--data": "sums.jsonl", "--out": str(out), "--rounds": "2", "--prompts": "25",
        "--samples": "6", "--max_tokens": "4", "--val_fraction": "0.3", "--learning_rate": "0.003", "--epochs": "3",
        "--compile": "false", "--dtype": "float32", "--at_once": "120",
    }  # fmt: skip
    given = [word for flag, value in words.items() if flag not in more for word in (flag, value)]
    return main_single(improve.COMMAND, [*given, *map(str, more)])


def rounds(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]


def digest(out: Path) -> str:
    return tree.digest(folder.load(out).params)


def test_its_own_best_answers_teach_it(at: Path, there: Path) -> None:
    """Exact match on sums that it never saw the answers of rises; what is learned are right answers alone."""
    before = (there / "model" / "model.safetensors").read_bytes()
    assert improved(at / "run", "--rounds", "3") == 0
    log = rounds(at / "run")
    assert [entry["round"] for entry in log] == [1, 2, 3]
    assert any(entry["accepted"] for entry in log)
    assert log[-1]["held_out"] >= log[0]["held_out_before"] + 0.1
    assert all(entry["accepted"] == (entry["held_out_after"] > entry["held_out_before"]) for entry in log)
    kept = [json.loads(line) for line in (at / "run" / "rounds" / "001" / "kept.jsonl").read_text().splitlines()]
    assert len(kept) == log[0]["kept"] > 5
    assert all(eval(row["prompt"]) == int(row["response"]) for row in kept)
    assert digest(at / "run") == next(entry["digest"] for entry in reversed(log) if entry["accepted"])
    assert (there / "model" / "model.safetensors").read_bytes() == before


def test_a_round_that_does_not_help_leaves_the_bytes_as_they_were(
    at: Path, there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It learns wrong answers, which the score praises among samples and blames on held-out rows."""
    assert improved(at / "run", "--score", "sum_scores:worse", "--rounds", "1") == 0
    (entry,) = rounds(at / "run")
    assert entry["kept"] > 0
    assert entry["held_out_after"] < entry["held_out_before"]
    assert not entry["accepted"]
    for name in ("model.safetensors", "config.json", "tokenizer.model", "generation_config.json"):
        if (there / "model" / name).exists():
            assert (at / "run" / name).read_bytes() == (there / "model" / name).read_bytes()
    assert "rejected, the model stays" in capsys.readouterr().out


def test_stopped_and_gone_on_with_it_is_the_same(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert improved(at / "whole") == 0
    assert improved(at / "parts", "--rounds", "1") == 0
    with (at / "parts" / "rounds.jsonl").open("a") as file:
        file.write('{"round": 2, "acc')
    (at / "parts" / "rounds" / "002" / "model").mkdir(parents=True)
    (at / "parts" / "rounds" / "002" / "model" / "junk").touch()
    assert improved(at / "parts") == 0
    assert "from round 2" in capsys.readouterr().out
    assert digest(at / "whole") == digest(at / "parts")
    strip = [{**entry, "seconds": 0} for entry in rounds(at / "whole")]
    assert [{**entry, "seconds": 0} for entry in rounds(at / "parts")] == strip
    assert improved(at / "parts", "--samples", "5", "--at_once", "60") == 2
    assert "(--samples was 6, is 5; --at_once was 120, is 60)" in capsys.readouterr().err
    rows = Path("sums.jsonl").read_text()
    try:
        Path("sums.jsonl").write_text(rows + '{"prompt": "9+9", "response": "18"}\n')
        assert improved(at / "parts") == 2
    finally:
        Path("sums.jsonl").write_text(rows)
    assert "holds other rounds (the text has changed)" in capsys.readouterr().err
    assert improved(at / "parts", "--model", "other", "--override") == 1
    assert f"{at / 'parts'} began with another model" in capsys.readouterr().err
    shutil.rmtree(at / "whole" / "rounds")
    lines = (at / "whole" / "rounds.jsonl").read_text().splitlines()
    (at / "whole" / "rounds.jsonl").write_text(lines[1] + "\n")
    assert improved(at / "whole") == 1
    assert "line 1 is not that of round 1" in capsys.readouterr().err


def test_rounds_under_other_flags_are_measured_anew(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not against what other rows said of the model, even if the first of them was killed."""
    assert improved(at / "run", "--rounds", "1") == 0
    (first,) = rounds(at / "run")
    other = ["--val_fraction", "0.5", "--samples", "5", "--prompts", "10"]
    before = {path: path.read_bytes() for path in sorted(at.rglob("*")) if path.is_file()}
    assert improved(at / "run", *other) == 2
    said = capsys.readouterr().err
    assert (
        "(--prompts was 25, is 10; --samples was 6, is 5; --val_fraction was 0.3, is 0.5); --override goes on" in said
    )
    assert {path: path.read_bytes() for path in sorted(at.rglob("*")) if path.is_file()} == before
    assert improved(at / "run", *other, "--rounds", "1", "--override") == 0
    assert "going on as another run: --prompts was 25, is 10" in capsys.readouterr().out
    assert rounds(at / "run") == [first]
    assert improved(at / "run", *other) == 0
    _, second = rounds(at / "run")
    assert f"exact of 18 held-out rows: {second['held_out_before']:.4f}" in capsys.readouterr().out
    assert second["held_out_before"] != first["held_out"]
    record = files.read_json(at / "run" / "improve.json")
    assert record["since"] == 1
    assert [one["flags"]["samples"] for one in record["earlier"]] == [6]


def test_a_score_that_is_edited_is_another(
    at: Path, there: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its name does not say what it computes."""
    file = there / "edited_scores.py"
    file.write_text("def lengths(texts, rows):\n    return [float(len(text)) for text in texts]\n")
    monkeypatch.syspath_prepend(str(there))
    flags = ["--score", "edited_scores:lengths"]
    assert improved(at / "run", *flags, "--rounds", "1") == 0
    before = {path: path.read_bytes() for path in sorted(at.rglob("*")) if path.is_file()}
    file.write_text(file.read_text() + "# by hand\n")
    capsys.readouterr()
    assert improved(at / "run", *flags) == 2
    assert "holds other rounds (edited_scores:lengths has changed); --override goes on all the same" in (
        capsys.readouterr().err
    )
    assert {path: path.read_bytes() for path in sorted(at.rglob("*")) if path.is_file()} == before
    assert improved(at / "run", *flags, "--rounds", "1", "--override") == 0
    assert improved(at / "run", *flags, "--rounds", "1") == 0
    assert files.read_json(at / "run" / "improve.json")["since"] == 1


def test_where_memory_is_at_its_end_what_needs_less_is_said(
    at: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def greedy(*arguments: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(improve, "_rounds", greedy)
    assert improved(at / "run") == 1
    said = capsys.readouterr().err
    assert said == "error: out of memory with --at_once 120 and --batch_size 8; smaller ones need less\n"


def test_the_models_own_likelihood_and_an_adapter(at: Path) -> None:
    assert improved(at / "run", "--score", "likelihood", "--lora_rank", "4", "--rounds", "1", "--least", "-0.5") == 0
    (entry,) = rounds(at / "run")
    assert entry["score_mean"] < entry["score_kept"] <= 0
    assert entry["held_out_before"] < 0
    assert folder.load(at / "run").config == folder.load("model").config


def test_a_likelihood_is_a_mean_over_its_tokens() -> None:
    config = ModelConfig(vocab_size=12, d_model=8, n_layers=1, n_heads=2, d_ff=8, max_len=8)
    params = weights(config, 0)
    tokens = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    targets = torch.tensor([[-100, 3, 4, 5], [-100, -100, 8, -100]])
    likely = torch.log_softmax(transformer.forward(params, tokens, config), -1)
    expected = [(likely[0, 1, 3] + likely[0, 2, 4] + likely[0, 3, 5]) / 3, likely[1, 2, 8]]
    found = improvement.likelihoods(params, {"tokens": tokens, "targets": targets}, config)
    assert_close(found, torch.stack(expected))


def test_the_first_of_the_best_is_kept() -> None:
    values = [1.0, 3.0, 3.0, math.nan, -1.0, math.nan]
    given = [improvement.Answer({}, str(i), value) for i, value in enumerate(values)]
    assert [one.text for one in improvement.best(given, 3, None)] == ["1", "4"]
    assert [one.text for one in improvement.best(given, 3, 0.0)] == ["1"]
    assert improvement.best([improvement.Answer({}, "x", math.nan)] * 3, 3, None) == []
    assert improvement.best([improvement.Answer({}, " ", 1.0)] * 3, 3, None) == []


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--score", "beauty"], "the fitness 'beauty' is neither known nor of the form module:function"),
        (["--score", "sum_scores:fails"], "the fitness sum_scores:fails raised ValueError: on purpose"),
        (["--max_tokens", "15"], "exceed the model's max_len 16"),
        (["--val_fraction", "0.001"], "--val_fraction 0.001 of 36 rows is none: nothing decides"),
        (["--samples", "0"], "--samples is 0; it has to be between 1 and 1000000"),
        (["--out", "model"], "--out model is the --model, which stays as it is"),
        (["--out", "other"], "other holds something else; choose another --out"),
        (["--model", "nowhere"], "no model folder at nowhere"),
        (["--data", "sum_scores.py"], "sum_scores.py"),
    ],
)
def test_what_cannot_be_meant_is_one_line(
    more: list[str], message: str, at: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert improved(at / "run", *more) in (1, 2)
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_answers_without_a_score_teach_nothing(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert improved(at / "run", "--score", "sum_scores:nan", "--rounds", "1") == 0
    (entry,) = rounds(at / "run")
    assert (entry["kept"], entry["accepted"], entry["score_mean"]) == (0, False, None)
    assert "none is worth learning" in capsys.readouterr().out
    assert files.read_json(at / "run" / "improve.json")["flags"]["score"] == "sum_scores:nan"
