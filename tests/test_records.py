"""Records of a run or a dataset that hold what nobody wrote: they are refused in words, or not believed."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from functional_lm import files, improve, run_end, run_folder, sampling_settings, unfinished
from functional_lm.errors import DataError, FunctionalLMError
from functional_lm.evolution import journal as journals
from functional_lm.improve_flags import ImproveFlags
from functional_lm.interop import gguf
from functional_lm.model.config import ModelConfig
from functional_lm.text import byte_pairs, readers
from functional_lm.training_flags import TrainingFlags

DEEP = "[" * 100_000


def generations(folder: Path, fitness: Any) -> Path:
    journal = journals.begin(folder / journals.NAME, {"flags": {}})
    journals.append(journal, journals.entry(0, (1, 2), [0.5], 1.0))
    text = journal.path.read_text()
    journal.path.write_text(text.replace("[0.5]", fitness))
    return journal.path


@pytest.mark.parametrize("fitness", ["[NaN]", "[1e999]", DEEP, "[" * 2000 + "]" * 2000, "5"])
def test_a_journal_that_nobody_wrote_is_refused(tmp_path: Path, fitness: str) -> None:
    with pytest.raises(DataError, match="line 2 is not"):
        journals.read(generations(tmp_path, fitness))


@pytest.mark.parametrize(
    "change",
    [
        {"lengths": []},
        {"lengths": {"a": "x"}},
        {"lengths": {"a": 3}},
        {"lengths": {"../outside": 0}},
        {"memory": [1]},
        {"check": []},
        [],
    ],
)
def test_a_note_of_a_journal_that_nobody_wrote_is_not_believed(tmp_path: Path, change: Any) -> None:
    journal = unfinished.Journal(tmp_path, "k")
    journal.open("a").write(b"held")
    journal.commit([1, {"row": 2}])
    journal.close()
    assert unfinished.Journal(tmp_path, "k").memory == [1, {"row": 2}]
    note = files.read_json(tmp_path / "journal.json")
    files.write_json(tmp_path / "journal.json", {**note, **change} if isinstance(change, dict) else change)
    assert unfinished.Journal(tmp_path, "k").memory is None


def test_another_kind_of_run_is_named_whatever_it_is(tmp_path: Path) -> None:
    for kind in ([], {}, "dancing", 3):
        (tmp_path / "run.json").write_text(json.dumps({"kind": kind}))
        with pytest.raises(FunctionalLMError, match="another kind of run"):
            run_folder.check_free(tmp_path, "training")


SOUND = {"options": {"seed": 1}, "overrides": {}, "budget": {"steps": 1}, "versions": {"torch": "2"}}


@pytest.mark.parametrize(
    "change",
    [{"overrides": [1]}, {"overrides": "x"}, {"versions": "x"}, {"versions": {}}, {"budget": 3}, {"options": []}],
)
def test_a_run_that_nobody_began_is_damaged(tmp_path: Path, change: dict[str, Any]) -> None:
    files.write_json(tmp_path / "run.json", {**SOUND, **change})
    flags = TrainingFlags(override=True)
    with pytest.raises(DataError, match=r"run\.json is damaged"):
        run_folder.checkpoint_to_resume(flags, {}, tmp_path, lambda vocab_size: ModelConfig())


@pytest.mark.parametrize(("told", "shown"), [("low", ""), ([1], ""), (True, ""), (math.pi, ", validation loss 3.1416")])
def test_a_summary_with_something_else_for_a_number(
    told: Any, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from functional_lm import training_flags
    from functional_lm.training import checkpoint

    flags = TrainingFlags(steps=3)
    budget = training_flags.budget(flags)
    monkeypatch.setattr(checkpoint, "notes", lambda path: {"step": 3, "run": {"budget": budget}})
    files.write_json(tmp_path / "summary.json", {"budget": budget, "steps": 3, "val_loss": told, "ended": []})
    assert run_end.is_complete(flags, tmp_path / "step", tmp_path)
    assert f"3 steps{shown}\n" in capsys.readouterr().out


@pytest.mark.parametrize("record", ['{"flags": [], "digest": "a"}', '{"flags": 1, "digest": "a"}', "[]", DEEP])
def test_rounds_that_nobody_began_are_damaged(tmp_path: Path, record: str) -> None:
    (tmp_path / improve.RECORD).write_text(record)
    with pytest.raises(DataError, match=r"improve\.json is damaged"):
        improve._opened(ImproveFlags(model="m", data="d", out=str(tmp_path)), tmp_path, "a", "t", {})


@pytest.mark.parametrize("line", ["[]", "5", DEEP, '{"round": 2}', '{"round": 1}', '{"round": 1, "accepted": "x"}'])
def test_a_round_that_nobody_made_is_refused(tmp_path: Path, line: str) -> None:
    options = ImproveFlags(model="m", data="d", out=str(tmp_path))
    files.write_json(
        tmp_path / improve.RECORD, {"flags": run_folder.as_json(dataclasses.asdict(options)), "digest": "a"}
    )
    (tmp_path / improve.LOG).write_text(line + "\n")
    with pytest.raises(DataError, match="line 1 is not that of round 1"):
        improve._opened(options, tmp_path, "a", "t", {})


@pytest.mark.parametrize("number", ["9" * 400, "-" + "9" * 400, "NaN", "1e999"])
@pytest.mark.parametrize("name", ["temperature", "top_k"])
def test_a_setting_beyond_every_number_is_refused(tmp_path: Path, name: str, number: str) -> None:
    (tmp_path / sampling_settings.NAME).write_text(f'{{"{name}": {number}}}')
    with pytest.raises(DataError, match=f"{name} is .*; it has to be a number from"):
        sampling_settings.of_folder(tmp_path)


def parquet(path: Path, texts: list[bytes]) -> Path:
    """Bytes that are said to be text."""
    import pyarrow
    from pyarrow import parquet

    column = pyarrow.array(texts, pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": column}), path)
    return path


@pytest.mark.parametrize("read", [lambda path: [*readers.read(path)], lambda path: [*readers.rows(path)]])
def test_parquet_with_bytes_that_are_no_text(tmp_path: Path, read: Callable[[Path], object]) -> None:
    assert read(parquet(tmp_path / "sound.parquet", [b"good", b"more"]))
    with pytest.raises(DataError, match=r"no Parquet file or damaged.*utf-8"):
        read(parquet(tmp_path / "text.parquet", [b"good", b"b\xffd"]))


@pytest.mark.parametrize("written", ["[1]", "{", DEEP, '"\xff"', "null"])
def test_settings_of_a_tokenizer_that_are_none(tmp_path: Path, written: str) -> None:
    (tmp_path / "tokenizer_config.json").write_bytes(written.encode("latin-1"))
    with pytest.raises(DataError, match=r"tokenizer_config\.json (is not JSON|holds (null|an? ))"):
        gguf.chat_template(tmp_path)


def test_a_template_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / byte_pairs.TEMPLATE).write_bytes(b"{{ \xff }}")
    with pytest.raises(DataError, match=r"chat_template\.jinja is no UTF-8 text"):
        byte_pairs._settings(tmp_path)
