"""The commands, end to end, on a text small enough to be learnt by heart: what they write, refuse, resume and say."""

from __future__ import annotations

import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import functional_lm
from functional_lm import keys, seal, tree
from functional_lm.__main__ import COMMANDS
from functional_lm.cli import main
from functional_lm.model import config as model_config
from functional_lm.text import dataset
from functional_lm.training import checkpoint, optimizer, schedule
from functional_lm.training import step as training

FLAGS = {
    "compile": "false", "dtype": "float32", "device": "cpu", "d_model": 32, "n_layers": 2, "n_heads": 2, "d_ff": 64,
    "max_len": 32, "vocab_size": 320, "batch_size": 4, "steps": 12, "warmup_steps": 3, "learning_rate": 0.01,
    "dropout": 0.1, "gradient_accumulation_steps": 2, "eval_every": 5, "save_every": 4, "keep": 0, "sample_tokens": 8,
    "val_fraction": 0.2, "eval_batches": 2,
}  # fmt: skip
ARCHITECTURE = ("d_model", "n_layers", "n_heads", "d_ff", "max_len", "dropout")
Files = dict[str, bytes]


def command(verb: str, **flags: Any) -> int:
    """A command as a person types it, in this process."""
    words = [word for name, value in flags.items() if value is not None for word in (f"--{name}", str(value))]
    return main(COMMANDS, [verb, *words])


def pretrain(**flags: Any) -> int:
    return command("pretrain", **{**FLAGS, **flags})


def contents(path: Path) -> Files:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in lines(run) if "loss" in row]


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """What a refused command said."""
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1, said
    assert said[0].startswith("error: ")
    return said[0]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"line {i}: {i * i % 97} foxes jump over {i % 13} lazy dogs.\n" for i in range(100)))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """An uninterrupted run with dropout, accumulation and validation in between; not to be changed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert pretrain(data=text, out=out) == 0
    return out


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(run, tmp_path / "copy")


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


# Resuming -------------------------------------------------------------------------------------------------------------


def cut_back(folder: Path, step: int) -> None:
    """As if the process had died behind this step's checkpoint, at the moment when more lines had been written."""
    for path in checkpoint.listing(folder / "checkpoints"):
        if path.name > checkpoint.name(step):
            shutil.rmtree(path)
    for name in ("model.safetensors", "summary.json", "loss.png"):
        (folder / name).unlink()


def equal_runs(one: Path, other: Path) -> None:
    ours, theirs = contents(one), contents(other)
    same = ("model.safetensors", "config.json", "tokenizer.model")
    last = tuple(f"checkpoints/step-00000012/{name}" for name in (*same, "training.safetensors", "training.json"))
    assert all(ours[name] == theirs[name] for name in same + last)
    assert losses(one) == losses(other)
    for name in ("val_loss", "val_bits_per_byte", "val_tokens", "tokens", "steps"):
        assert read(one / "summary.json")[name] == read(other / "summary.json")[name]


@pytest.mark.parametrize("step", [4, 8, 12])
def test_resumed_is_uninterrupted_bit_for_bit(run: Path, copy: Path, text: Path, step: int) -> None:
    """With dropout and accumulation."""
    cut_back(copy, step)
    assert pretrain(data=text, out=copy) == 0
    equal_runs(copy, run)


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
    other = {"data": tmp_path / "tokens.bin", "tokenizer": tmp_path / "others", "out": tmp_path / "run"}
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

WRITING = {"compile": "false", "dtype": "float32", "device": "cpu", "max_tokens": 12}


def written(capsys: pytest.CaptureFixture[str], model: Path, **flags: Any) -> str:
    capsys.readouterr()
    assert command("generate", **{**WRITING, "model": model, **flags}) == 0
    return capsys.readouterr().out


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


# Text of other kinds ------------------------------------------------------------------------------------------------


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
