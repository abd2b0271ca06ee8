"""Going on with a run: bit for bit as if nothing had happened, or a refusal in one line."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
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
    copy,
    cut_back,
    equal_runs,
    lines,
    losses,
    one_line,
    pretrain,
    read,
    run,
    text,
)

import functional_lm
from functional_lm import seal, tree
from functional_lm.text import dataset
from functional_lm.training import checkpoint, scaler

__all__ = ["copy", "run", "text"]  # fixtures


# Resuming -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [4, 8, 12])
def test_resumed_is_uninterrupted_bit_for_bit(run: Path, copy: Path, text: Path, step: int) -> None:
    """With dropout and accumulation."""
    cut_back(copy, step)
    assert pretrain(data=text, out=copy) == 0
    equal_runs(copy, run)


def test_a_loss_scale_is_resumed_with_what_it_has_been_through(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float16 with a mean of the weights, dropout, accumulation and validations, gradients having overflowed."""
    monkeypatch.setattr(scaler, "START", 2.0**13)
    monkeypatch.setattr(scaler, "INTERVAL", 2)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    half = {"data": text, "dtype": "float16", "ema_decay": 0.9, "eval_every": 3, "sample_tokens": 0}
    assert pretrain(**half, out=whole) == 0
    shutil.copytree(whole, parts)
    cut_back(parts, 4)
    assert pretrain(**half, out=parts) == 0
    equal_runs(parts, whole)
    told, again = ([row | {"tokens_per_second": 0} for row in lines(folder)] for folder in (whole, parts))
    assert told == again  # skipped steps and their places in the data too
    skipped = [row["step"] for row in told if "skipped" in row]
    assert skipped[0] <= 4 < skipped[-1]
    state = tree.load(whole / "checkpoints" / "step-00000012" / "training.safetensors")
    assert int(state["skipped"]) == len(skipped)
    assert state["ema"].keys() == {"model"}


def test_stopped_by_ctrl_c_and_called_again_is_uninterrupted(
    run: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the middle of a step between two checkpoints: the step is finished, saved, and the exit code tells."""
    plain, at = dataset.batch, 2 * 6 + 1

    @functools.wraps(plain)
    def interrupting(view: Any, number: int, *rest: Any) -> Any:
        if number == at:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(view, number, *rest)

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(dataset, "batch", interrupting)
        assert pretrain(data=text, out=out) == 130
    assert checkpoint.listing(out / "checkpoints")[-1].name == "step-00000007"
    assert not (out / "model.safetensors").exists()
    said = capsys.readouterr()
    assert "the same command goes on from" in said.out
    assert "Traceback" not in said.err
    assert pretrain(data=text, out=out) == 0
    equal_runs(out, run)


def test_a_crash_between_steps_leaves_a_run_that_goes_on(
    run: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Behind step 6, whose lines in metrics.jsonl are made again."""
    plain = dataset.batch

    def failing(view: Any, number: int, *rest: Any) -> Any:
        if number == 12:
            raise OSError(5, "Input/output error", "text.bin")
        return plain(view, number, *rest)

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(dataset, "batch", failing)
        assert pretrain(data=text, out=out) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "error: text.bin: Input/output error"
    assert losses(out)[-1][0] == 6
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')  # what a crash cuts off
    assert pretrain(data=text, out=out) == 0
    equal_runs(out, run)


def test_a_finished_run_is_left_as_it_is(run: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(run)
    assert pretrain(data=text, out=run) == 0
    assert "is trained already: 12 steps, validation loss" in capsys.readouterr().out
    assert contents(run) == before


def test_more_steps_go_on_from_the_end(run: Path, copy: Path, text: Path) -> None:
    assert pretrain(data=text, out=copy, steps=14) == 0
    assert losses(copy)[:12] == losses(run)
    assert [step for step, _ in losses(copy)[12:]] == [13, 14]
    assert read(copy / "summary.json")["steps"] == 14


def test_a_new_learning_rate_is_refused_or_taken_and_the_past_is_kept(
    run: Path, copy: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut_back(copy, 8)
    changed, before = {"learning_rate": 0.001, "weight_decay": 0.5}, contents(copy)
    assert pretrain(data=text, out=copy, **changed) == 2
    differences = (
        "(--learning_rate was 0.01, is 0.001; --weight_decay was 0.1, is 0.5); --override goes on all the same"
    )
    assert differences in one_line(capsys)
    assert contents(copy) == before
    assert pretrain(data=text, out=copy, **changed, override=True) == 0
    assert "going on as another run: --learning_rate was 0.01, is 0.001; " in capsys.readouterr().out
    before, after = ([row["learning_rate"] for row in lines(folder) if "loss" in row] for folder in (run, copy))
    assert after[:8] == before[:8]
    assert after[8:] == pytest.approx([rate / 10 for rate in before[8:]], rel=1e-5)
    state = tree.load(copy / "checkpoints" / "step-00000012" / "training.safetensors")
    assert float(state["numbers"]["weight_decay"]) == 0.5


def test_a_named_checkpoint_starts_a_run_of_its_own(run: Path, text: Path, tmp_path: Path) -> None:
    assert pretrain(data=text, out=tmp_path / "run", resume=run / "checkpoints" / "step-00000008") == 0
    assert losses(tmp_path / "run") == losses(run)[8:]
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("name", "value"), [("compile", True), ("threads", 2), ("dtype", "bfloat16")])
def test_steps_whose_bits_differ_are_not_mixed_unseen(
    copy: Path, text: Path, capsys: pytest.CaptureFixture[str], name: str, value: Any
) -> None:
    """As if the run had begun with compiled steps, in other threads, in another precision."""
    path = copy / "checkpoints" / "step-00000012"
    notes = checkpoint.notes(path)
    now = notes["run"]["options"][name]
    notes["run"]["options"][name] = value
    seal.seal(path, checkpoint.NOTES, notes.pop("format"), {k: v for k, v in notes.items() if k != "files"})
    assert pretrain(data=text, out=copy, steps=13) == 2
    assert f"belongs to another run (--{name} was {value}, is {now})" in one_line(capsys)
    assert pretrain(data=text, out=copy, steps=13, override=True) == 0
    assert f"going on as another run: --{name} was {value}, is {now}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("d_model", 64, "its tensors have other shapes"),
        ("n_kv_heads", 1, "its tensors have other shapes"),
        ("tie_embeddings", "false", "its tensors have other shapes"),
        ("seeds", "1,2", "its tensors have other shapes"),
        ("optimizer", "sgd", "its state is made for it"),
        ("ema_decay", 0.9, "its state has a mean of the weights, or none"),
        ("dtype", "float16", "its state has a loss scale, or none"),
        ("vocab_size", 330, "the run has its tokenizer"),
        ("tokenizer_type", "char", "the run has its tokenizer"),
    ],
)
def test_what_a_checkpoint_is_made_for_is_refused_overridden_or_not(
    run: Path, text: Path, capsys: pytest.CaptureFixture[str], name: str, value: Any, why: str
) -> None:
    before = contents(run)
    for override in (False, True):
        assert pretrain(data=text, out=run, steps=14, **{"override": override, name: value}) == 2
        said = one_line(capsys)
        assert f"and nothing overrides --{name} ({why}); choose another --out, or --overwrite the run" in said
    assert contents(run) == before


def test_a_field_that_changes_no_tensor_may_be_overridden(copy: Path, text: Path) -> None:
    """A width that is given now and was derived before; heads that divide the same matrices in another way."""
    assert pretrain(data=text, out=copy, steps=13, override=True, head_dim=16) == 0
    assert pretrain(data=text, out=copy, steps=14, override=True, head_dim=8, n_heads=4) == 0


# Refusals -------------------------------------------------------------------------------------------------------------


def filled(flags: dict[str, Any], run: Path) -> dict[str, str]:
    return {name: str(value).replace("{run}", str(run)) for name, value in flags.items()}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"resume": "never"}, "already holds a run"),
        ({"seed": 1}, "--seed was 1337, is 1"),
        ({"d_model": 64}, "--d_model was 32, is 64"),
        ({"dropout": 0.2}, "--dropout was 0.1, is 0.2"),
        ({"n_kv_heads": 1}, "--n_kv_heads was not given, is 1"),
        ({"batch_size": 8}, "--batch_size was 4, is 8"),
        ({"gradient_accumulation_steps": 1}, "--gradient_accumulation_steps was 2, is 1"),
        ({"dtype": "bfloat16"}, "--dtype was float32, is bfloat16"),
        ({"block_size": 16}, "--block_size was 32, is 16"),
        ({"val_fraction": 0.1}, "--val_fraction was 0.2, is 0.1"),
        ({"resume": "nowhere"}, "--resume nowhere is no checkpoint"),
        ({"resume": "{run}/checkpoints/step-00000004"}, "holds a run up to step-00000012"),
        ({"overwrite": True, "resume": "{run}/checkpoints/step-00000004"}, "give one of them"),
        ({"overwrite": True, "data": "{run}/data/text.bin", "tokenizer": "{run}"}, "would remove --tokenizer"),
        ({"overwrite": True, "data": "{run}/README.md"}, "would remove --data"),
    ],
)
def test_another_run_is_not_written_into_this_one(
    run: Path, text: Path, capsys: pytest.CaptureFixture[str], flags: dict[str, Any], message: str
) -> None:
    before = contents(run)
    assert pretrain(**{"data": text, "out": run, **filled(flags, run)}) == 2
    assert message in one_line(capsys)
    assert contents(run) == before


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        ({"data": "missing.txt"}, 1, "missing.txt"),
        ({"data": "missing.txt", "tokenizer": "{run}"}, 1, "missing.txt"),
        ({"data": "missing.bin", "tokenizer": "{run}"}, 1, "no dataset at missing"),
        ({"data": "ready.bin"}, 2, "give the --tokenizer that made them"),
        ({"model": "missing"}, 2, "--d_model cannot change"),
        ({"preset": "nano", "config": "x.json"}, 2, "--preset and --config both name an architecture"),
        ({"config": "missing.json"}, 1, "no configuration at missing.json"),
        ({"tokenizer": "missing"}, 1, "no tokenizer at missing"),
        ({"min_learning_rate": 0.02}, 2, "--min_learning_rate 0.02 is above --learning_rate 0.01"),
        ({"block_size": 33}, 2, "--block_size 33 is longer than the model's --max_len 32"),
        ({"n_heads": 3}, 2, "d_model 32 is not a multiple of n_heads 3"),
        ({"vocab_size": 270}, 2, "vocab_size 270"),
        ({"vocab_size": 4096}, 2, "vocab_size 4096 is more than this text supports; give "),
        ({"steps": 0}, 2, "--steps is 0"),
        ({"learning_rate": "nan"}, 2, "--learning_rate is nan"),
        ({"learning_rat": 0.1}, 2, "did you mean --learning_rate?"),
        ({"compile": "perhaps"}, 2, "--compile is 'perhaps'"),
    ],
)
def test_a_wrong_call_is_refused_in_one_line_before_anything_is_written(
    run: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: dict[str, Any],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert pretrain(**{"data": text, "out": "run", **filled(flags, run)}) == code
    assert message in one_line(capsys)
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_originals_keys_gives_architecture_and_vocabulary(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a resumed run compares the numbers that they came to, given or not."""
    values = {name: FLAGS[name] for name in ARCHITECTURE} | {"vocab_size": 310, "use_rope": False, "device": "cpu"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    flags = {**dict.fromkeys(ARCHITECTURE), "data": text, "config": tmp_path / "config.json", "out": tmp_path / "run"}
    quick = {"steps": 1, "eval_every": 0, "sample_tokens": 0}
    assert pretrain(**flags, **quick, vocab_size=None) == 0
    assert read(tmp_path / "run" / "run.json")["options"]["vocab_size"] == 310
    trained = functional_lm.load(tmp_path / "run").config
    assert (trained.vocab_size, trained.positions, trained.d_model) == (310, "learned", 32)
    assert "a step needs about " in capsys.readouterr().out
    for given in (None, 310):
        assert pretrain(**flags, **quick, vocab_size=given) == 0
        assert "is trained already" in capsys.readouterr().out
    assert pretrain(**flags, **quick, vocab_size=320) == 2
    assert "--vocab_size was 310, is 320" in one_line(capsys)


def test_overwrite_replaces_a_run_and_nothing_else(
    copy: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / "left over").touch()
    words = shutil.copytree(copy, tmp_path / "words")
    assert pretrain(data="missing.txt", tokenizer=words, out=copy, overwrite=True) == 1
    assert (copy / "left over").exists()  # refused before anything was removed
    assert pretrain(data=text, out=copy, overwrite=True, steps=2, seed=5, sample_tokens=0) == 0
    assert not (copy / "left over").exists()
    assert [step for step, _ in losses(copy)] == [1, 2]
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").touch()
    capsys.readouterr()
    assert pretrain(data=text, out=tmp_path / "letters", overwrite=True) == 2
    assert "holds something else" in one_line(capsys)
    assert (tmp_path / "letters" / "dear.txt").exists()


def test_a_model_without_checkpoints_is_not_written_over(
    copy: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(copy / "checkpoints")
    before = contents(copy)
    assert pretrain(data=text, out=copy) == 2
    assert "already holds a model" in one_line(capsys)
    assert contents(copy) == before


def test_a_text_shorter_than_a_block_is_refused(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "short.txt").write_text("short")
    assert command("train-tokenizer", data=text, out=tmp_path / "words", vocab_size=320) == 0
    capsys.readouterr()
    flags = {"data": tmp_path / "short.txt", "tokenizer": tmp_path / "words", "out": tmp_path / "run"}
    assert pretrain(**flags) == 1
    assert "too few for one block: block_size 32 needs 33" in one_line(capsys)


# The real thing -------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_the_command_compiled_by_inductor_in_a_process_of_its_own(text: Path, run: Path, tmp_path: Path) -> None:
    """Train, go on, generate: as a person does it. Close to the eager run, though not bit for bit."""

    def python(module: str, **flags: Any) -> subprocess.CompletedProcess[str]:
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        done = subprocess.run([sys.executable, "-m", module, *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done

    out = tmp_path / "run"
    flags = {**FLAGS, "data": text, "out": out, "compile": "true"}
    said = python("functional_lm.train", **flags).stdout
    assert "compiling the training step ... " in said
    assert read(out / "summary.json")["compile_seconds"] > 0
    eager, compiled = (torch.tensor([loss for _, loss in losses(folder)]) for folder in (run, out))
    torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-3)
    assert read(out / "summary.json")["val_loss"] == pytest.approx(read(run / "summary.json")["val_loss"], rel=1e-3)
    resumed = shutil.copytree(out, tmp_path / "resumed")
    cut_back(resumed, 8)
    python("functional_lm.train", **{**flags, "out": resumed})
    equal_runs(resumed, out)
    writing = {**WRITING, "compile": "true", "model": out, "prompt": "line 7: ", "seed": 3}
    assert python("functional_lm.generate", **writing).stdout.startswith("line 7: ")
