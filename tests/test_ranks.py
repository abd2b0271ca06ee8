"""Ranks: any number of processes measures what one does, bit for bit, and none that is lost takes anything with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from evolutions import EAGER, at, evolved, there, weights_of
from hypothesis import given
from hypothesis import strategies as st

from functional_lm import evolve, tree
from functional_lm.errors import DataError, FunctionalLMError, UsageError
from functional_lm.evolution import journal as journals
from functional_lm.evolution import population
from functional_lm.evolution import ranks as processes
from functional_lm.evolution.ranks import Group

__all__ = ["at", "there"]  # fixtures
ROOT = Path(__file__).parents[1]
ALWAYS = ["--model", "model", "--block_size", "16", "--batch_size", "4", *EAGER]
FLAGS = ["--population", "8", "--chunk_size", "2"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As torchrun has it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Shares ---------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 8))
def test_shares_are_whole_chunks_that_make_the_population(size: int, chunk: int, ranks: int) -> None:
    own = {"x": torch.arange(size)}
    if ranks > -(-size // chunk):
        with pytest.raises(UsageError, match="ranks are more than the"):
            population.share(size, chunk, 0, ranks)
        return
    parts = [population.share(size, chunk, rank, ranks) for rank in range(ranks)]
    whole = list(population.chunks(own, size, population.share(size, chunk)))
    divided = [one for part in parts for one in population.chunks(own, size, part)]
    assert [one["x"].tolist() for one in whole] == [one["x"].tolist() for one in divided]
    counts = [population.members(size, part) for part in parts]
    assert sum(counts) == size
    assert min(counts) > 0
    assert max(len(part.chunks) for part in parts) - min(len(part.chunks) for part in parts) <= 1


def test_a_run_begun_alone_in_one_chunk_goes_on_with_more_ranks_in_smaller_ones(
    at: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """--chunk_size auto stays what the journal says; the refusal names the flag with which two ranks go on."""
    many = ["--population", "8"]
    assert evolved(at / "run", *many, "--generations", "2") == 0
    before = (at / "run" / journals.NAME).read_bytes()
    journal = journals.read(at / "run" / journals.NAME)
    assert journal.header["chunk"] == 8

    @contextmanager
    def second(device: str, seconds: float) -> Iterator[Group]:
        yield Group(1, 2)

    monkeypatch.setattr(evolve.ranks, "joined", second)
    assert evolved(at / "run", *many, "--generations", "3") == 2
    assert capsys.readouterr().err == (
        "error: 2 ranks are more than the 1 chunk of 8 members; start at most 1, or give --chunk_size 4 or less "
        "(of the fitness the last bits may change)\n"
    )
    assert (at / "run" / journals.NAME).read_bytes() == before


@pytest.mark.long
def test_with_a_smaller_chunk_two_ranks_go_on_where_one_began(at: Path) -> None:
    many = ["--population", "8", "--generations"]
    assert evolved(at / "run", *many, "2") == 0
    assert begun(2, at / "run", at / "log", *many, "4").wait(600) != 0
    (line,) = errors((at / "log").read_text())
    assert "start at most 1, or give --chunk_size 4 or less" in line
    assert begun(2, at / "run", at / "log", *many, "4", "--chunk_size", "4").wait(600) == 0
    assert "the run began with chunk 8, now 4: the last bits of its numbers may differ" in (at / "log").read_text()
    assert len(journals.read(at / "run" / journals.NAME).generations) == 4


def test_alone_there_is_nobody_to_wait_for() -> None:
    group = Group()
    values = torch.arange(3.0)
    assert group.together(values) is values
    assert group.exchanged([1, 2]) == [[1, 2]]
    assert group.in_turn("x", lambda: 3) == 3
    group.check_same({"model": "a"})
    assert group.speaks()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"RANK": "x"},
            "the environment has RANK=x, which is no whole number below 2147483648; start ranks with torchrun",
        ),
        ({"WORLD_SIZE": "-1"}, "the environment has WORLD_SIZE=-1, which is no whole number"),
        ({"MASTER_PORT": "70000"}, "the environment has MASTER_PORT=70000, which is no whole number below 65536"),
        ({"RANK": "2"}, "the environment has RANK=2 of WORLD_SIZE=2; ranks are numbered from 0"),
        ({"WORLD_SIZE": "0", "RANK": "0"}, "the environment has RANK=0 of WORLD_SIZE=0; ranks are numbered from 0"),
        ({}, "rank 1 of 2 found no other at 127.0.0.1:1 (MASTER_ADDR:MASTER_PORT) within 1 s; start all of them"),
    ],
)
def test_an_environment_that_names_no_place_among_ranks_is_refused(
    changes: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
        **changes,
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(FunctionalLMError) as error, processes.joined("cpu", 1.0):
        pass
    assert str(error.value).startswith(message)


class Two(Group):
    """Two ranks, of which the other always says the same."""

    def exchanged(self, numbers: Sequence[int]) -> list[list[int]]:
        return [list(numbers), [5] * len(numbers)]


def test_a_rank_with_another_model_is_refused_by_name() -> None:
    with pytest.raises(DataError, match="rank 1 has another model than rank 0; all of them need the same"):
        Two().check_same({"model": "a", "text": "b"})


# Processes ------------------------------------------------------------------------------------------------------------


def begun(ranks: int, out: Path, log: Path, *more: str, data: str = "text.txt") -> subprocess.Popen[bytes]:
    """torchrun in the working directory of the test, at a free port."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command += ["-m", "functional_lm.evolve", *ALWAYS, "--data", data, "--out", str(out), *more]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with open(log, "wb") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)


def process_of(runner: int, rank: int) -> int:
    children = Path(f"/proc/{runner}/task/{runner}/children").read_text().split()
    return next(
        int(pid) for pid in children if f"\0RANK={rank}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes()
    )


def generations(out: Path) -> int:
    path = out / journals.NAME
    return path.read_bytes().count(b"\n") - 1 if path.exists() else 0


def killed(rank: int, ranks: int, out: Path, log: Path) -> str:
    """What is said when a rank is killed after some generations."""
    runner = begun(ranks, out, log, *FLAGS, "--generations", "100000", "--save_every", "7")
    try:
        until(runner, out, 10)
        os.kill(process_of(runner.pid, rank), signal.SIGKILL)
        assert runner.wait(300) != 0
    finally:
        runner.terminate()
    return log.read_text()


def until(runner: subprocess.Popen[bytes], out: Path, count: int) -> None:
    """Return when so many generations are in the journal."""
    last = time.monotonic() + 600
    while generations(out) < count:
        assert runner.poll() is None
        assert time.monotonic() < last
        time.sleep(0.05)


def errors(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("error: ")]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks into /proc")
def test_two_ranks_of_which_one_is_lost_and_one_that_goes_on_are_one(at: Path) -> None:
    """The generations that two ranks measured and those that one does are the ones of an uninterrupted run."""
    said = killed(1, 2, at / "run", at / "log")
    assert [line[:23] for line in errors(said)] == ["error: a rank was lost:"], said
    done = generations(at / "run")
    assert evolved(at / "run", *FLAGS, "--generations", str(done + 3)) == 0
    assert evolved(at / "whole", *FLAGS, "--generations", str(done + 3)) == 0
    assert weights_of(at / "run") == weights_of(at / "whole")
    header = journals.read(at / "run" / journals.NAME).header
    assert (header["ranks"], header["chunk"], header["threads"]) == (2, 2, 1)


@pytest.mark.long
def test_one_two_and_four_ranks_end_with_the_same_bytes(at: Path) -> None:
    assert evolved(at / "1", *FLAGS, "--generations", "5") == 0
    for ranks in (2, 4):
        assert begun(ranks, at / f"{ranks}", at / "log", *FLAGS, "--generations", "5").wait(600) == 0, (
            at / "log"
        ).read_text()
        assert (at / "log").read_text().count("members, 2 at once on each of") == 1
    files = ["adapter_model.safetensors", "checkpoints/step-00000005/state.safetensors"]
    for name in files:
        assert len({(at / ranks / name).read_bytes() for ranks in "124"}) == 1, name
    assert len({tree.digest(tree.load(at / ranks / files[0])) for ranks in "124"}) == 1


@pytest.mark.long
def test_the_first_of_four_is_lost_and_two_go_on(at: Path) -> None:
    said = killed(0, 4, at / "run", at / "log")
    assert [line[:23] for line in errors(said)] == ["error: a rank was lost:"]
    total = str(generations(at / "run") + 4)
    assert begun(2, at / "run", at / "log", *FLAGS, "--generations", total).wait(600) == 0, (at / "log").read_text()
    assert "going on with" in (at / "log").read_text()
    assert evolved(at / "whole", *FLAGS, "--generations", total) == 0
    assert weights_of(at / "run") == weights_of(at / "whole")


@pytest.mark.long
def test_in_a_long_generation_too_a_line_says_that_the_run_ends(at: Path) -> None:
    """torchrun kills the ranks that are left after 30 s, in which this generation does not end."""
    Path("slow.py").write_text(
        "import os, time\n"
        "def late(texts, rows):\n"
        "    if 'RANK' in os.environ:\n        time.sleep(100)\n"
        "    return [float(len(text)) for text in texts]\n"
    )
    answered = ["--fitness", "slow:late", "--max_tokens", "4", "--chunk_size", "4", "--population", "8"]
    out, log = at / "run", at / "log"
    assert evolved(out, *answered, "--generations", "1", data="rows.jsonl") == 0
    runner = begun(2, out, log, *answered, "--generations", "9", data="rows.jsonl")
    try:
        while "going on with" not in log.read_text():
            assert runner.poll() is None, log.read_text()
            time.sleep(0.1)
        time.sleep(5)
        os.kill(process_of(runner.pid, 1), signal.SIGKILL)
        assert runner.wait(60) != 0
    finally:
        runner.terminate()
    (line,) = errors(log.read_text())
    assert line.startswith("error: told to stop, and the generation took more than 20 s longer; the journal has"), line
    assert len(journals.read(out / journals.NAME).generations) == 1


@pytest.mark.long
def test_what_ranks_refuse_is_said_once(at: Path) -> None:
    Path("unlike.py").write_text(
        "import os\n"
        "def by_rank(texts, rows):\n"
        "    if os.environ.get('RANK') == '1':\n        raise ValueError('on purpose')\n"
        "    return [0.0] * len(texts)\n"
    )
    answered = ["--population", "4", "--chunk_size", "2", "--fitness", "unlike:by_rank", "--max_tokens", "4"]
    trained = ["--population", "4", "--space", "hyper", "--strategy", "pbt", "--val_fraction", "0.3"]
    cases = {
        "4 ranks are more than the 2 chunks of 4 members": (4, ["--population", "8", "--chunk_size", "4"], "text.txt"),
        "3 ranks are more than the 2 members": (3, ["--population", "2"], "text.txt"),
        "--population 5 is odd": (2, ["--population", "5"], "text.txt"),
        "--strategy pbt goes on with the weights of its members, which ranks do not exchange": (2, trained, "text.txt"),
        "the fitness unlike:by_rank raised ValueError: on purpose": (2, answered, "rows.jsonl"),
    }
    for number, (message, (ranks, more, data)) in enumerate(cases.items()):
        assert begun(ranks, at / f"{number}", at / "log", *more, data=data).wait(600) != 0
        (line,) = errors((at / "log").read_text())
        assert message in line


@pytest.mark.long
def test_ctrl_c_ends_all_of_them_after_the_generation(at: Path) -> None:
    runner = begun(2, at / "run", at / "log", *FLAGS, "--generations", "100000")
    until(runner, at / "run", 5)
    runner.send_signal(signal.SIGTERM)
    assert runner.wait(300) != 0
    said = (at / "log").read_text()
    assert "stopped after generation" in said
    assert errors(said) == []
    total = str(generations(at / "run") + 2)
    assert evolved(at / "run", *FLAGS, "--generations", total) == 0
    assert evolved(at / "whole", *FLAGS, "--generations", total) == 0
    assert weights_of(at / "run") == weights_of(at / "whole")
