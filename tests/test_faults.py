"""Whatever operation of the disk fails, and however: what evolves, improves and writes models ends as if it had not.

A command's operations are counted in an undisturbed call. Then, each time in a fresh place, number k of them fails:
the process is killed before it or in the middle of it, or an error comes, once or as long as the disk is full. An error
is one line, a kill says nothing; and the same command, called again, ends with the bytes of the undisturbed one.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from faults import CODES, Failing, Killed, operations

from functional_lm import (
    architecture,
    disk,
    evolve,
    files,
    folder,
    improve,
    interchange,
    keys,
    merge,
    prepare,
    quantize,
    run_folder,
    seal,
    tree,
)
from functional_lm.cli import Command, main_single
from functional_lm.errors import DataError, UsageError
from functional_lm.evolution import journal as journals
from functional_lm.evolution import loop
from functional_lm.interop import peft
from functional_lm.model import lora, transformer
from functional_lm.model.config import ModelConfig
from functional_lm.text import tokenizer as tokenizers
from functional_lm.training import record

KINDS = ("crash", "power", "torn", "full", "broken")
WORDS = "the cat sat on the mat and the dog sat on the log " * 3
EAGER = "--compile false --dtype float32"
EVOLVE = (
    "--model model --data text.txt --block_size 8 --batch_size 2 --strategy eggroll --population 2 --generations 2 "
    f"--save_every 1 --keep 1 --rank 1 --val_fraction 0 --out out {EAGER}"
)
IMPROVE = (
    "--model model --data sums.jsonl --rounds 2 --prompts 2 --samples 2 --max_tokens 2 --val_fraction 0.3 --epochs 1 "
    f"--learning_rate 0.01 --batch_size 2 --at_once 8 --score likelihood --out out {EAGER}"
)


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small models and what they are evolved and improved on."""
    place = tmp_path_factory.mktemp("faults")
    (place / "text.txt").write_text(WORDS)
    rows = [{"prompt": f"{a}+{b}", "response": str(a + b)} for a in range(3) for b in range(3)]
    (place / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = tokenizers.train([WORDS + "0123456789+"], "char", 300)
    config = ModelConfig(vocab_size=tokenizer.vocab_size, d_model=8, n_layers=1, n_heads=2, max_len=16)
    for number, name in enumerate(("model", "other")):
        folder.save(place / name, transformer.init(config, keys.key(number)), config, tokenizer)
    return place


@pytest.fixture
def at(there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place of its own; nothing waits for the disk, hardly any time passes, and pictures are not drawn."""
    for path in there.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(disk.os, "fsync", lambda descriptor: None)
    ticks = itertools.count()
    clock = SimpleNamespace(perf_counter=lambda: next(ticks) * 2.0**-24)
    for module in (loop, improve):
        monkeypatch.setattr(module, "time", clock)

    def drawn(name: str) -> Callable[..., None]:
        return lambda out, *more: files.write_with(out / name, lambda path: path.write_bytes(b"a picture") and None)

    monkeypatch.setattr("functional_lm.evolution.record.plot", drawn("fitness.png"))
    monkeypatch.setattr(record, "plot", drawn("loss.png"))
    return tmp_path


class Fault(NamedTuple):
    """What the command with number `passing` of its operations failing made of it."""

    kind: str
    passing: int
    code: int | None  # None: the process was killed


def call(command: Command, words: str) -> int:
    return main_single(command, words.split())


def handled() -> dict[int, Any]:
    """Who handles the signals that commands handle."""
    return {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}


def failed(command: Command, words: str, kind: str, passing: int) -> Fault:
    """A call on a disk that fails; when a process is killed, its threads are."""
    others, code, handlers = set(threading.enumerate()), None, handled()
    with disk.watched_by(Failing(kind, passing)):
        with suppress(Killed):
            code = call(command, words)
        for thread in set(threading.enumerate()) - others:
            thread.join(30)
    assert handled() == handlers, (kind, passing)
    return Fault(kind, passing, code)


def moments(work: Callable[[], Any]) -> list[int]:
    """The numbers of the operations; of many writes to one file in a row those of the first and the last."""
    done = [None, *operations(work), None]
    return [k - 1 for k in range(1, len(done) - 1) if done[k - 1] != done[k] or done[k] != done[k + 1]]


def check_said(fault: Fault, capsys: pytest.CaptureFixture[str]) -> None:
    """One line that names the trouble; nothing of a process that was killed."""
    said = capsys.readouterr().err
    if fault.code is None:
        assert not said, fault
    elif fault.code:
        assert fault.code == 1, fault
        assert said.startswith("error: "), (fault, said)
        assert said.count("\n") == 1, (fault, said)
        assert os.strerror(CODES[fault.kind]) in said, (fault, said)


def listing(root: Path) -> set[str]:
    """What lies there, event files by one name."""
    found = (path for path in root.rglob("*") if not (path.is_symlink() or path.is_dir()))
    return {
        str(path.relative_to(root).parent / "events" if "tfevents" in path.name else path.relative_to(root))
        for path in found
    }


UNFINISHED = r"^\.lock$|^(data/)?\.part-text/|^rounds/\d+/(model|run)/"
TIMED = ("training.log", "learning.log", "events", "README.md")  # say when something was, or how long it took


def contents(root: Path) -> dict[str, Any]:
    """What every file holds that does not tell the time."""
    found = {name: (root / name).read_bytes() for name in listing(root) if Path(name).name not in TIMED}
    return {name: timeless(json.loads(data)) if name.endswith(".json") else data for name, data in found.items()}


def timeless(value: Any) -> Any:
    """JSON without its seconds, and without a digest over them."""
    if isinstance(value, dict):
        return {name: timeless(entry) for name, entry in value.items() if "seconds" not in name and name != seal.OWN}
    return value


def plan(count: Sequence[int], stride: int) -> list[tuple[str, int]]:
    """(kind, k): with each kind every stride-th operation, with every kind others."""
    return [(kind, k) for i, kind in enumerate(KINDS) for k in count[i * stride // len(KINDS) :: stride]]


# Runs that are gone on with -------------------------------------------------------------------------------------------


def whole_run(command: Command, words: str) -> tuple[list[int], set[str], dict[str, Any]]:
    """What an undisturbed run does, and what it leaves."""
    assert call(command, words) == 0
    shutil.rmtree("out")
    when = moments(lambda: call(command, words))
    kept = Path("whole")
    Path("out").rename(kept)
    return when, listing(kept), contents(kept)


def check_known(fault: Fault, found: set[str], names: set[str]) -> None:
    """Nothing but the run's files, earlier checkpoints among them, and unfinished work; after a kill what is swept.

    (And its lock, which is free, where to remove that is what failed.)
    """
    swept = re.compile(UNFINISHED + (r"|\.tmp-" if fault.code is None else ""))
    plain = {re.sub(r"step-\d+", "step-", name) for name in names}
    strange = {name for name in found if re.sub(r"step-\d+", "step-", name) not in plain and not swept.search(name)}
    assert not strange, (fault, strange)


def each_fault(
    command: Command, words: str, stride: int, capsys: pytest.CaptureFixture[str], left: Callable[[Fault], None]
) -> int:
    """How many were tried: each ends as an undisturbed run does, every second one after a fault on the way back too."""
    when, names, expected = whole_run(command, words)
    capsys.readouterr()
    out, tried = Path("out"), 0
    for tried, (kind, k) in enumerate(plan(when, stride)):
        fault = failed(command, words, kind, k)
        check_said(fault, capsys)
        check_known(fault, listing(out), names)
        left(fault)
        if tried % 2:  # once more on the way back
            check_said(failed(command, words, kind, k // 2), capsys)
        assert call(command, words) == 0, (fault, capsys.readouterr().err)
        assert listing(out) == names, fault
        found = contents(out)
        assert [name for name in names if found.get(name) != expected.get(name)] == [], fault
        shutil.rmtree(out)
    return tried


@pytest.mark.parametrize("stride", [pytest.param(1, marks=pytest.mark.long), 40])
def test_an_evolution_ends_as_if_the_disk_had_not_failed(
    stride: int, at: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And of what was left at the fault the journal tells the weights that a run of so many generations ends with."""
    ends: dict[int, bytes] = {}
    for count in (1, 2):
        assert call(evolve.COMMAND, f"{EVOLVE} --generations {count}".replace("--generations 2", "", 1)) == 0
        ends[count] = Path("out/adapter_model.safetensors").read_bytes()
        assert files.read_json("out/summary.json")["kept"] == "centre"  # as of a journal without an end
        shutil.rmtree("out")

    def replayed(fault: Fault) -> None:
        if fault.code is None and Path("out/journal.jsonl").is_file():
            told = len(journals.read("out/journal.jsonl").generations)
            assert call(evolve.COMMAND, "replay out/journal.jsonl --out again") == 0
            if told:
                assert Path("again/adapter_model.safetensors").read_bytes() == ends[told], fault
            shutil.rmtree("again")

    assert each_fault(evolve.COMMAND, EVOLVE, stride, capsys, replayed) > 15


@pytest.mark.parametrize("stride", [pytest.param(4, marks=pytest.mark.long), 120])
def test_rounds_of_improving_end_as_if_the_disk_had_not_failed(
    stride: int, at: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert each_fault(improve.COMMAND, IMPROVE, stride, capsys, lambda fault: None) > 7


@pytest.mark.parametrize("stride", [pytest.param(1, marks=pytest.mark.long), 8])
def test_a_dataset_that_is_prepared_is_the_undisturbed_one(
    stride: int, at: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "--data text.txt --tokenizer model --threads 1 --out out/text"
    assert each_fault(prepare.PREPARE, words, stride, capsys, lambda fault: None) > 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trains", [False, True])
def test_a_run_that_is_overwritten_is_there_until_the_new_one_trains(kind: str, trains: bool, tmp_path: Path) -> None:
    """Whole, whether the new one is refused or cut off, while the old one is set aside, brought back or removed."""
    out = tmp_path / "out"
    names = ("checkpoints/step-00000001/training.json", "metrics.jsonl", "model.safetensors", "run.json", "summary.md")
    new = {"run.json": "new"}

    def begin() -> None:
        shutil.rmtree(out, ignore_errors=True)
        for name in names:
            files.write_text(out / name, f'"old {name}"')

    def overwritten() -> None:
        with run_folder.held(out):
            run_folder.make(out, overwrite=True)
            files.write_text(out / "run.json", '"new"')
            if not trains:
                raise DataError("no text")
            run_folder.settle(out)
            files.write_text(out / "metrics.jsonl", "new")

    def again() -> None:
        with run_folder.held(out):
            run_folder.make(out, overwrite=False)

    begin()
    possible = [contents(out), *([new, new | {"metrics.jsonl": b"new"}] if trains else [])]
    for k in moments(lambda: attempt(overwritten)):
        begin()
        for work in (overwritten, again):
            with disk.watched_by(Failing(kind, k)):
                attempt(work)
            assert kind != "full" or trains or contents(out) == possible[0], k
        again()
        assert contents(out) in possible, k


def attempt(work: Callable[[], None]) -> None:
    with suppress(Killed, OSError, DataError):
        work()


# Models that are written at once --------------------------------------------------------------------------------------

WRITERS: dict[str, tuple[Command, str]] = {
    "merge": (merge.COMMAND, "--models model,other --out made/out"),
    "quantize": (quantize.COMMAND, "--model model --out made/out"),
    "export": (interchange.EXPORT, "--model model --out made/out"),
    "import": (interchange.IMPORT, "hf --out made/out"),
    "gguf": (interchange.EXPORT, "--model model --out made/out.gguf --format gguf"),
    "gguf in a folder": (interchange.EXPORT, "--model model --out made/out --format gguf"),
    "replay": (evolve.COMMAND, "replay run/journal.jsonl --out made/out"),
    "train-tokenizer": (prepare.TRAIN_TOKENIZER, "--data text.txt --tokenizer_type char --out made/out"),
    "create-config": (architecture.CREATE_CONFIG, "--output made/out.json --type nano"),
}


@pytest.mark.parametrize("stride", [pytest.param(1, marks=pytest.mark.long), 18])
@pytest.mark.parametrize(
    ("writer", "empty"), [*((name, False) for name in WRITERS), ("merge", True), ("train-tokenizer", True)]
)
def test_what_is_written_is_whole_or_not_there_and_nothing_else_lies_beside_it(
    writer: str, empty: bool, stride: int, at: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where nothing was before, and where an empty folder was. A kill leaves what the next call takes away."""
    command, words = WRITERS[writer]
    if writer == "import":
        assert call(interchange.EXPORT, "--model model --out hf") == 0
    if writer == "replay":
        assert call(evolve.COMMAND, EVOLVE.replace("--out out", "--out run")) == 0
    assert call(command, words) == 0
    made = Path("made")
    (target,) = made.iterdir()
    expected = contents(made)

    def begin() -> None:
        shutil.rmtree(made, ignore_errors=True)
        if empty:
            target.mkdir(parents=True)

    begin()
    when = moments(lambda: call(command, words))
    capsys.readouterr()
    for kind, k in plan(when, stride):
        begin()
        fault = failed(command, words, kind, k)
        check_said(fault, capsys)
        left = [path.name for path in made.iterdir()] if made.exists() else []
        beside = [name for name in left if name != target.name]
        assert all(name.startswith(".tmp-") for name in beside), fault
        assert fault.code is None or not beside, fault
        there = target.exists() and not (empty and not any(target.iterdir()))
        if there:
            assert {name: data for name, data in contents(made).items() if ".tmp-" not in name} == expected, fault
        assert call(command, words) == (2 if there else 0), (fault, capsys.readouterr().err)
        assert contents(made) == expected, fault
        assert [path.name for path in made.iterdir()] == [target.name], fault
        capsys.readouterr()


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_in_the_place_of_another_is_the_one_or_the_other(kind: str, at: Path) -> None:
    base = folder.load("model").params
    targets = ("q_proj", "v_proj")
    old, new = (lora.init(base, targets, 2, keys.key(number), 2.0) for number in range(2))
    settings = peft.Settings(2, 2.0, targets, base="model", digest=tree.digest(base))
    found = set()
    for k in moments(lambda: peft.save("out", new, settings, base)):
        peft.save("out", old, settings, base)
        with disk.watched_by(Failing(kind, k)):
            attempt(lambda: peft.save("out", new, settings, base))
        found.add(tree.digest(peft.load_adapter("out", base)))
        peft.save("out", new, settings, base)
        assert tree.digest(peft.load_adapter("out", base)) == tree.digest(new), k
        assert listing(Path("out")) == {"adapter_config.json", "adapter_model.safetensors"}, k
    assert found == {tree.digest(old), tree.digest(new)}


def test_what_a_living_process_writes_is_left_alone(at: Path) -> None:
    """And so is what a dead one left of something else; what it left of the same is taken away, by any way to write."""
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    others = [f".tmp-{os.getppid()}-out", f".tmp-old-{os.getppid()}-out", f".tmp-{gone.pid}-out2", ".tmp-x-out"]
    ways: list[Callable[[Path], Any]] = [
        lambda path: files.write_text(path, "new"),
        lambda path: files.write_with(path, lambda temporary: temporary.write_text("new") and None),
        as_folder,
        files.refuse_existing,
    ]
    for number, way in enumerate(ways):
        place = at / f"{number}"
        for name in [*others, f".tmp-{gone.pid}-out", f".tmp-{os.getpid()}-out"]:
            (place / name).mkdir(parents=True)
            (place / name / "half").write_text("half")
        way(place / "out")
        assert sorted(path.name for path in place.iterdir() if path.name != "out") == sorted(others)


def as_folder(path: Path) -> None:
    with files.writing_folder(path) as temporary:
        files.write_text(temporary / "new", "new")


def test_what_a_dead_process_was_replacing_is_there_again(at: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    as_folder(at / "place" / "out")
    (at / "place" / "out").rename(at / "place" / f".tmp-old-{gone.pid}-out")
    with pytest.raises(UsageError, match="out exists"):
        files.refuse_existing(at / "place" / "out")
    assert [path.name for path in (at / "place").rglob("*")] == ["out", "new"]
