"""The commands, end to end, on a text small enough to be learnt by heart: what they write and say."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import (
    ARCHITECTURE,
    FLAGS,
    WRITING,
    command,
    contents,
    lines,
    losses,
    one_line,
    pretrain,
    read,
    run,
    text,
    written,
)

import functional_lm
from functional_lm import keys, tree
from functional_lm.model import config as model_config
from functional_lm.text import dataset
from functional_lm.training import checkpoint, optimizer, schedule
from functional_lm.training import step as training

__all__ = ["run", "text"]  # fixtures


# What a run leaves ----------------------------------------------------------------------------------------------------


def test_a_run_folder_is_a_model_folder_and_its_records(run: Path) -> None:
    written = contents(run)
    model = {"config.json", "model.safetensors", "generation_config.json"}
    model |= {"tokenizer.model", "tokenizer.json", "tokenizer_config.json"}
    records = {"README.md", "metrics.jsonl", "summary.json", "run.json", "training.log", "loss.png"}
    assert model | records | {"data/text.bin", "data/text.index"} <= written.keys()
    assert any(name.startswith("tensorboard/") for name in written)
    steps = [path.name for path in checkpoint.listing(run / "checkpoints")]
    assert steps == ["step-00000004", "step-00000008", "step-00000012"]
    assert all(
        model | {"training.safetensors", "training.json"} == contents(run / "checkpoints" / s).keys() for s in steps
    )
    assert written["model.safetensors"] == written["checkpoints/step-00000012/model.safetensors"]
    assert written["loss.png"].startswith(b"\x89PNG")
    assert all(written.values())
    assert not [name for name in written if ".tmp" in name]


def test_the_summary_is_what_was_measured(run: Path) -> None:
    summary, (params, config, _) = read(run / "summary.json"), functional_lm.load(run)
    assert summary["parameters"] == tree.size(params)
    assert (summary["steps"], summary["tokens"]) == (12, 12 * 4 * 32 * 2)
    assert [summary[name] for name in ("device", "dtype", "seed")] == ["cpu", "float32", 1337]
    assert summary["tokens_per_second"] > 0
    assert summary["wall_seconds"] > 0
    assert summary["compile_seconds"] == 0
    assert summary["peak_memory_bytes"] > 2**20
    # The loss again, window by window, from the files alone.
    view = dataset.split(dataset.open_dataset(run / "data" / "text"), 0.2, 1337)[1]
    nll, count = 0.0, 0
    for batch in dataset.windows(view, 32):
        sums = functional_lm.loss(
            params, {k: torch.from_numpy(v) for k, v in batch.items() if k != "documents"}, config
        )
        nll, count = nll + float(sums[0]), count + int(sums[1]["tokens"])
    assert summary["val_tokens"] == count == len(view) - 1
    assert summary["val_loss"] == pytest.approx(nll / count, rel=1e-5)
    words = functional_lm.load(run).tokenizer.decode_bytes(dataset.read(view, 1, len(view)))
    assert summary["val_bits_per_byte"] == pytest.approx(nll / math.log(2) / len(words), rel=1e-5)


def test_metrics_hold_a_line_for_every_step_and_validation(run: Path) -> None:
    rows = lines(run)
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 13))
    assert all(row.keys() == {"step", "loss", "learning_rate", "grad_norm", "tokens_per_second"} for row in steps)
    assert [row["step"] for row in rows if "val_loss" in row] == [5, 10, 12]
    assert rows[-1]["val_loss"] == read(run / "summary.json")["val_loss"]
    assert steps[0]["loss"] == pytest.approx(math.log(320), rel=0.2)
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.3
    cosine = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 8 / 9))
    assert [steps[i]["learning_rate"] for i in (0, 2, 11)] == pytest.approx([0.01 / 3, 0.01, 0.01 * cosine])
    log = (run / "training.log").read_text()
    assert all(f"step {step} loss " in log for step in range(1, 13))
    assert "sample" in log


def test_run_json_holds_every_flag_resolved(run: Path, text: Path) -> None:
    record = read(run / "run.json")
    for name, value in FLAGS.items():
        where = record["overrides"] if name in ARCHITECTURE else record["options"]
        assert str(where[name]).lower() == str(value), name
    assert record["options"]["data"] == str(text)
    assert record["options"]["block_size"] == 32
    assert model_config.from_json(record["model"]) == functional_lm.load(run).config
    assert record["versions"]["torch"] == torch.__version__


def test_the_same_command_in_another_folder_writes_the_same_model(run: Path, text: Path, tmp_path: Path) -> None:
    assert pretrain(data=text, out=tmp_path / "again", save_every=0, eval_every=0, sample_tokens=0) == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()
    assert losses(tmp_path / "again") == losses(run)
    assert pretrain(data=text, out=tmp_path / "seed", seed=1, save_every=0, eval_every=0, sample_tokens=0) == 0
    assert losses(tmp_path / "seed") != losses(run)


def test_a_run_is_nothing_but_the_public_functions_one_after_the_other(run: Path) -> None:
    """Weights, batches and dropout come from the seed as it says here; equal bit for bit."""
    seed, config = keys.key(1337), functional_lm.load(run).config
    view, _ = dataset.split(dataset.open_dataset(run / "data" / "text"), 0.2, 1337)
    rate = schedule.cosine(3, 0.1)
    functions = training.training(config, optimizer.adamw(), rate, numbers={"learning_rate": 0.01, "total_steps": 12})
    params = functional_lm.init(config, keys.fold_in_name(seed, "init"))
    state = functions.init(params, keys.fold_in_name(seed, "training"))
    for step, loss in losses(run)[:4]:
        total: Any = None
        for i in range(2):
            arrays = dataset.batch(view, 2 * (step - 1) + i, 4, 32, 1337)
            batch = {name: torch.from_numpy(arrays[name]) for name in ("tokens", "targets")}
            part = functions.gradients(state, batch, i)
            total = part if total is None else tree.add(total, part)
        state, report = functions.apply(state, *total)
        assert float(report["loss"]) == loss
    assert tree.digest(state.params) == tree.digest(functional_lm.load(run / "checkpoints" / "step-00000004").params)


def test_only_the_newest_checkpoints_are_kept(text: Path, tmp_path: Path) -> None:
    assert pretrain(data=text, out=tmp_path / "run", steps=5, save_every=1, keep=2, sample_tokens=0) == 0
    assert [p.name[-1] for p in checkpoint.listing(tmp_path / "run" / "checkpoints")] == ["4", "5"]


# Without a validation split -------------------------------------------------------------------------------------------


def test_without_a_validation_split_there_is_no_validation_loss(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {"data": text, "out": tmp_path / "run", "val_fraction": 0, "steps": 2, "eval_every": 1}
    assert pretrain(**flags) == 0
    assert read(tmp_path / "run" / "summary.json")["val_loss"] is None
    rows = [
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [list(row)[:2] for row in rows] == [["step", "loss"]] * 2
    assert "nan" not in capsys.readouterr().out
    assert pretrain(**flags) == 0
    assert "is trained already: 2 steps\n" in capsys.readouterr().out


# Tokens first, going on, Python ---------------------------------------------------------------------------------------


def test_tokenizer_and_dataset_made_beforehand_train_the_same_model(
    run: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`train-tokenizer` and `prepare`, then `pretrain --tokenizer`, from text and from tokens: the same bytes."""
    words, tokens = tmp_path / "words", tmp_path / "tokens"
    assert command("train-tokenizer", data=text, out=words, vocab_size=320) == 0
    assert command("prepare", data=text, out=tokens, tokenizer=words) == 0
    assert (tmp_path / "tokens.bin").read_bytes() == (run / "data" / "text.bin").read_bytes()
    for name, data in (("from text", text), ("from tokens", tmp_path / "tokens.bin")):
        out = tmp_path / name
        assert pretrain(data=data, tokenizer=words, out=out, save_every=0, eval_every=0, sample_tokens=0) == 0
        assert losses(out) == losses(run)
        assert (out / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()
    assert not (tmp_path / "from tokens" / "data").exists()
    assert command("train-tokenizer", data=text, out=tmp_path / "others", vocab_size=330) == 0
    capsys.readouterr()
    other = {
        "data": tmp_path / "tokens.bin",
        "tokenizer": tmp_path / "others",
        "out": tmp_path / "run",
        "vocab_size": None,
    }
    assert pretrain(**other) == 1
    assert "was made with another tokenizer" in one_line(capsys)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_going_on_from_a_model_starts_where_it_ended(run: Path, text: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """Also from a model that was stored in bfloat16: the masters are float32."""
    params, config, tokenizer = functional_lm.load(run)
    functional_lm.save(tmp_path / "model", tree.cast(params, dtype), config, tokenizer)
    before = contents(tmp_path / "model")
    flags = {**FLAGS, **dict.fromkeys(ARCHITECTURE), "vocab_size": None}
    out = tmp_path / "run"
    assert command("pretrain", **{**flags, "data": text, "model": tmp_path / "model", "out": out, "steps": 2}) == 0
    assert contents(tmp_path / "model") == before
    assert losses(out)[0][1] == pytest.approx(losses(run)[-1][1], abs=0.4)
    further, same_config, _ = functional_lm.load(out)
    assert same_config == config
    assert {leaf.dtype for leaf in tree.leaves(further)} == {torch.float32}
    assert 0 < float(tree.norm(tree.subtract(further, params))) < 0.2 * float(tree.norm(params))


def test_load_loss_grad_are_three_lines(run: Path) -> None:
    params, config, tokenizer = functional_lm.load(run)
    ids = torch.tensor([tokenizer.encode("line 1: foxes jump")])
    batch = {"tokens": ids[:, :-1], "targets": ids[:, 1:]}
    grads, sums = torch.func.grad(functional_lm.loss, has_aux=True)(params, batch, config)
    assert tree.flatten(grads).keys() == tree.flatten(params).keys()
    assert all(leaf.isfinite().all() and leaf.any() for leaf in tree.leaves(grads))
    downhill = tree.add(params, tree.scale(grads, -1e-3 / float(tree.norm(grads))))
    assert functional_lm.loss(downhill, batch, config)[0] < sums["nll"]


# Generating -----------------------------------------------------------------------------------------------------------


def test_generate_prints_the_prompt_and_a_continuation_that_its_seed_decides(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = written(capsys, run, prompt="line 7: ", seed=3)
    assert first.startswith("line 7: ")
    assert first.endswith("\n")
    assert len(first) > len("line 7: \n")
    assert written(capsys, run, prompt="line 7: ", seed=3) == first
    assert written(capsys, run, prompt="line 7: ", seed=3, stream="false") == first
    assert written(capsys, run, prompt="line 7: ", seed=4) != first
    assert written(capsys, run, prompt="line 7: ", seed=4, top_k=1) == written(
        capsys, run, prompt="line 7: ", temperature=0
    )


def test_generate_takes_any_prompt_as_text(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Numbers, lists, nothing, and more than the context holds."""
    for prompt in ("123", "[1, 2]", "true", "", "é\U0001f600\n", "foxes " * 60):
        assert written(capsys, run, prompt=prompt, max_tokens=3).startswith(prompt)


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        ({"model": "missing"}, 1, "no model folder at missing"),
        ({"model": None}, 2, "--model is required"),
        ({"temperature": -1}, 2, "--temperature is -1"),
        ({"top_p": 0}, 2, "--top_p is 0"),
        ({"max_tokens": 0}, 2, "--max_tokens is 0"),
    ],
)
def test_generate_refuses_in_one_line(
    run: Path, capsys: pytest.CaptureFixture[str], flags: dict[str, Any], code: int, message: str
) -> None:
    assert command("generate", **{**WRITING, "model": run, **flags}) == code
    assert message in one_line(capsys)


POEM = """A tree that keeps its leaves in line
needs neither class nor secret sign:
one function walks from root to tip,
another mends, and none lets slip.
"""


def test_a_text_is_learnt_by_heart_and_recited(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "poem.txt").write_text(POEM)
    flags = {
        "d_model": 48, "max_len": 128, "block_size": 96, "vocab_size": 300, "val_fraction": 0, "batch_size": 8,
        "steps": 150, "dropout": 0, "gradient_accumulation_steps": 1, "save_every": 0, "sample_tokens": 0,
    }  # fmt: skip
    assert pretrain(data=tmp_path / "poem.txt", out=tmp_path / "run", **flags) == 0
    assert losses(tmp_path / "run")[-1][1] < 0.1
    recited = written(capsys, tmp_path / "run", prompt="A tree", temperature=0, max_tokens=60)
    assert len(recited) > 60
    assert POEM.startswith(recited.rstrip("\n"))


# Text of other kinds --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["unigram", "char", "bytes", "wordchar"])
def test_every_tokenizer_trains_on_rows_of_chats(tmp_path: Path, kind: str) -> None:
    chats = tmp_path / "chats.jsonl"
    turns = [
        [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"{i} is said"}] for i in range(30)
    ]
    chats.write_text("".join(json.dumps({"conversation": conversation}) + "\n" for conversation in turns))
    out = tmp_path / "run"
    flags = {"tokenizer_type": kind, "vocab_size": 280, "packing": "false", "steps": 2, "use-lmsys-dataset": chats}
    assert pretrain(**flags, out=out) == 0
    _, config, tokenizer = functional_lm.load(out)
    assert config.vocab_size == tokenizer.vocab_size <= 280
    assert read(out / "run.json")["options"]["data"] == str(chats)  # and not the standard library, the default
    data = dataset.open_dataset(out / "data" / "text", tokenizer)
    assert data.documents == 30
    view, _ = dataset.split(data, 0.2, 1337)
    rows = dataset.batch(view, 0, 4, 32, 1337, packing=False)
    assert set(rows["tokens"][:, :2].ravel().tolist()) == {tokenizer.bos_id, tokenizer.special_ids["<|user|>"]}


def test_another_packing_is_another_run(run: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pretrain(data=text, out=run, packing="false") == 2
    assert "--packing was True, is False" in one_line(capsys)
    assert pretrain(**{"data": text, "out": run, "use-lmsys-dataset": text}) == 2
    assert f"--data was {text}, is {text},{text}" in one_line(capsys)
