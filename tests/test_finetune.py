"""`finetune`, `lora-finetune` and `dpo`, end to end on conversations small enough to be learnt by heart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import command, contents, lines, losses, one_line, read

import functional_lm as flm
from functional_lm import folder, keys, tree
from functional_lm.errors import DataError
from functional_lm.model import lora, transformer
from functional_lm.model.config import ModelConfig
from functional_lm.text import chat, conversations
from functional_lm.text import tokenizer as tokenizers
from functional_lm.text.simple import ByteTokenizer

CONFIG = ModelConfig(vocab_size=262, d_model=32, n_layers=2, n_heads=2, d_ff=64, max_len=48, tie_embeddings=False)
FLAGS = {
    "compile": "false", "dtype": "float32", "device": "cpu", "batch_size": 4, "steps": 12, "warmup_steps": 2,
    "eval_every": 5, "save_every": 4, "keep": 0, "sample_tokens": 6, "eval_batches": 2, "val_fraction": 0.2,
}  # fmt: skip
ROWS = [
    {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}!"}]} for i in range(20)
]
PAIRS = [{"prompt": f"{i}?", "chosen": "yes", "rejected": "no"} for i in range(20)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "base"
    folder.save(path, transformer.init(CONFIG, keys.key(0)), CONFIG, ByteTokenizer())
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    (path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    return path


def adapt(verb: str, base: Path, data: Path, out: Path, /, **flags: Any) -> int:
    file = data / ("pairs.jsonl" if verb == "dpo" else "chats.jsonl")
    return command(verb, **{**FLAGS, "model": base, "data": file, "out": out, **flags})


def test_the_whole_model_learns_the_answers(base: Path, data: Path, tmp_path: Path) -> None:
    before = contents(base)
    assert adapt("finetune", base, data, tmp_path / "run", steps=60, learning_rate=0.01, eval_every=0) == 0
    assert contents(base) == before
    found = losses(tmp_path / "run")
    assert found[-1][1] < 0.3 * found[0][1]
    params, config, tokenizer = flm.load(tmp_path / "run")
    prompt = chat.prompt(tokenizer, [chat.turn("user", "3?")])
    end = transformer.forward(params, torch.tensor([[*prompt, *tokenizer.encode("3!")]]), config)[0, -1].argmax()
    assert int(end) == tokenizer.special_ids["<|end|>"]
    assert read(tmp_path / "run" / "summary.json")["val_tokens"] == sum(len(f"{i}!") + 1 for i in _validation())


def _validation() -> list[int]:
    from functional_lm.text import supervised
    from functional_lm.text.conversations import Conversation

    rows = [Conversation((chat.turn("user", str(i)),), "") for i in range(20)]
    return [int(one.turns[0].content) for one in supervised.split(rows, 0.2, 1337)[1]]


@pytest.mark.parametrize(
    "flags", [{}, {"dora": "true"}, {"rslora": "true", "lora_dropout": 0.1, "lora_targets": "all-linear,lm_head"}]
)
def test_an_adapter_is_all_that_is_trained_and_kept(
    base: Path, data: Path, tmp_path: Path, flags: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    before, run = contents(base), tmp_path / "run"
    assert adapt("lora-finetune", base, data, run, learning_rate=0.02, steps=30, **flags) == 0
    assert contents(base) == before
    assert losses(run)[-1][1] < losses(run)[0][1]
    assert not (run / "model.safetensors").exists()
    adapter = flm.load_adapter(run, flm.load(base).params)
    trained, _ = lora.split(adapter)
    stored = tree.load(run / "checkpoints" / "step-00000030" / "training.safetensors")
    assert tree.flatten(stored["params"]).keys() == tree.flatten(trained).keys()
    assert tree.size(stored["optimizer"]) == 2 * tree.size(trained)
    capsys.readouterr()
    words = {"model": base, "adapter": run, "prompt": "3?", "max_tokens": 5, "compile": "false", "temperature": 0}
    assert command("generate", **words) == 0
    changed = capsys.readouterr().out
    assert command("generate", **{**words, "adapter": None}) == 0
    assert changed != capsys.readouterr().out


@pytest.mark.parametrize("verb", ["finetune", "lora-finetune", "dpo"])
def test_a_resumed_run_is_an_uninterrupted_one(verb: str, base: Path, data: Path, tmp_path: Path) -> None:
    more = {"lora_dropout": 0.2, "gradient_accumulation_steps": 2, "ema_decay": 0.9} if verb != "finetune" else {}
    constant = {"schedule": "constant", **more}  # another schedule depends on the length
    for name, lengths in (("a", (12,)), ("b", (4, 12))):
        for steps in lengths:
            assert adapt(verb, base, data, tmp_path / name, steps=steps, **constant) == 0
    state = [tree.load(tmp_path / name / "checkpoints/step-00000012/training.safetensors") for name in ("a", "b")]
    for one in state:
        one.pop("numbers")
    assert tree.digest(state[0]) == tree.digest(state[1])


def test_preferences_are_learned(base: Path, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert adapt("dpo", base, data, run, steps=40, learning_rate=0.01, schedule="constant") == 0
    found = losses(run)
    assert found[0][1] == pytest.approx(0.6931, abs=1e-3)
    assert found[-1][1] < 0.2
    summary = read(run / "summary.json")
    assert summary["val_loss"] < 0.3
    assert (summary["val_tokens"], summary["val_bits_per_byte"]) == (4, None)


def test_patience_keeps_the_best_adapter(base: Path, data: Path, tmp_path: Path) -> None:
    flags = {"patience": 2, "eval_every": 1, "learning_rate": 1.0, "warmup_steps": 0, "steps": 40}
    assert adapt("lora-finetune", base, data, tmp_path / "run", **flags) == 0
    best = read(tmp_path / "run" / "summary.json")["best_step"]
    values = {row["step"]: row["val_loss"] for row in lines(tmp_path / "run") if "val_loss" in row}
    assert best < 40
    assert read(tmp_path / "run" / "summary.json")["val_loss"] == pytest.approx(min(values.values()), rel=1e-4)


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verb", "flags", "message"),
    [
        ("lora-finetune", {"lora_rank": 0}, "--lora_rank is 0; it has to be between 1 and 4096"),
        ("lora-finetune", {"lora_targets": "w_proj"}, "the target 'w_proj' matches nothing"),
        ("lora-finetune", {"lora_targets": "embed_tokens", "dora": "true"}, "leave it out"),
        ("finetune", {"block_size": 64}, "--block_size 64 is longer than the model's max_len 48"),
        ("finetune", {"block_size": 4}, "fits into a row of 4 tokens; give a larger --block_size"),
        ("finetune", {"model": "nowhere"}, "nowhere"),
        ("finetune", {"data": "nowhere.jsonl"}, "nowhere.jsonl"),
        ("finetune", {"epochs": 1}, "--steps and --epochs both give the length"),
        ("dpo", {"data": "CHATS"}, "line 1: no field 'prompt'"),
        ("finetune", {"data": "PAIRS"}, "line 1: no field 'prompt' with 'response'"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(
    base: Path, data: Path, tmp_path: Path, verb: str, flags: dict[str, Any], message: str, capsys: Any
) -> None:
    names = {"CHATS": data / "chats.jsonl", "PAIRS": data / "pairs.jsonl"}
    given = {name: names.get(value, value) for name, value in flags.items()}
    assert adapt(verb, base, data, tmp_path / "run", **given) in (1, 2)
    assert message in one_line(capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("verb", ["finetune", "dpo"])
def test_what_is_wrong_with_the_validation_part_is_said_to_be_so(
    verb: str, base: Path, tmp_path: Path, capsys: Any
) -> None:
    """Every tenth row is too long: of one row for validation there is a seed that draws such a one."""
    rows = [{"prompt": f"{i}?", "response": "a" * (90 if i == 0 else 1)} for i in range(10)]
    pairs = [{**row, "chosen": row["response"], "rejected": "no"} for row in rows]
    name = {"finetune": "chats.jsonl", "dpo": "pairs.jsonl"}[verb]
    (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in (rows if verb == "finetune" else pairs)))
    seed = next(seed for seed in range(99) if _kept(10, 0.1, seed) == [0])
    out = tmp_path / "out"
    assert adapt(verb, base, tmp_path, out, val_fraction=0.1, seed=seed) == 1
    error = capsys.readouterr().err
    assert "of what is kept for validation, none of the 1 " in error
    assert error.endswith("give a larger --block_size, or another --val_fraction\n")
    assert not out.exists()


def _kept(count: int, fraction: float, seed: int) -> list[int]:
    """The numbers of the rows that are kept for validation."""
    from functional_lm.text import supervised
    from functional_lm.text.conversations import Conversation

    rows = [Conversation((), str(i)) for i in range(count)]
    return [int(row.where) for row in supervised.split(rows, fraction, seed)[1]]


def test_a_vocabulary_without_markers_is_refused() -> None:
    made = tokenizers.train(["x"], "bytes")
    conversations.require_markers(made, "m")
    object.__setattr__(made, "special_ids", {"<|endoftext|>": 1})
    with pytest.raises(DataError, match=r"has no <\|system\|>, <\|user\|>, <\|assistant\|>, <\|end\|>"):
        conversations.require_markers(made, "m")


def test_another_adapter_is_not_written_over(base: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    assert adapt("lora-finetune", base, data, tmp_path / "run", steps=4) == 0
    capsys.readouterr()
    assert adapt("lora-finetune", base, data, tmp_path / "run", steps=8, lora_rank=4) == 2
    assert "--lora_rank was 16, is 4" in one_line(capsys)
    assert (
        adapt("lora-finetune", base, data, tmp_path / "run", steps=8, lora_targets="q_proj,k_proj,v_proj,o_proj") == 0
    )


def test_an_adapter_of_a_quantised_base(base: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    """QLoRA: the base is stored in 4 bits and stays as it is; what is written generates with it."""
    small = tmp_path / "int4"
    assert command("quantize", model=base, out=small, bits=4, group_size=8) == 0
    before = contents(small)
    assert adapt("lora-finetune", small, data, tmp_path / "run", steps=12, lora_targets="all-linear") == 0
    values = [loss for _, loss in losses(tmp_path / "run")]
    assert values[-1] < values[0]
    assert contents(small) == before
    capsys.readouterr()
    flags = {"prompt": "x", "max_tokens": 4, "compile": "false", "dtype": "float32", "temperature": 0}
    assert command("generate", model=small, adapter=tmp_path / "run", **flags) == 0
    assert capsys.readouterr().out.startswith("x")
    assert adapt("finetune", small, data, tmp_path / "whole", steps=2) == 1
    assert "quantised" in one_line(capsys)


def test_adapters_are_merged_into_their_base(base: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    """One by itself, and one as a difference among others."""
    assert adapt("lora-finetune", base, data, tmp_path / "one", steps=8, learning_rate=0.02) == 0
    assert command("merge", models=tmp_path / "one", base=base, out=tmp_path / "merged") == 0
    whole = flm.load(base).params
    expected = lora.merge(whole, flm.load_adapter(tmp_path / "one", whole))
    assert tree.digest(flm.load(tmp_path / "merged").params) == tree.digest(expected)
    many = {"models": f"{tmp_path / 'one'},{base}", "base": base, "method": "task_arithmetic", "weights": "0.5,1"}
    assert command("merge", **many, out=tmp_path / "half") == 0
    for halved, plain, full in zip(*map(tree.leaves, (flm.load(tmp_path / "half").params, whole, expected))):
        torch.testing.assert_close(halved, (plain + full) / 2)
    capsys.readouterr()
    assert command("merge", models=tmp_path / "one", out=tmp_path / "none") == 2
    assert "is an adapter; give the model it was trained on as --base" in one_line(capsys)
