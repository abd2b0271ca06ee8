"""What a command says: errors in one line, help, versions; and what that costs."""

from __future__ import annotations

import math
import os
import runpy
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from commands import CALLS, COMMAND, LAYERED, NEEDY, Options, record, run
from hypothesis import given
from hypothesis import strategies as st

from functional_lm.__main__ import COMMANDS
from functional_lm.cli import Command, _wrap, flags_of, help_text, main, main_single, table
from functional_lm.errors import DataError, UsageError
from functional_lm.options import REQUIRED, option

# Errors while running -------------------------------------------------------------------------------------------------


DEBUG_HINT = "(run again with --debug for the traceback)"


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UsageError("no such preset"), 2, "error: no such preset"),
        (DataError("the file is damaged"), 1, "error: the file is damaged"),
        (
            FileNotFoundError(2, "No such file or directory", "x.txt"),
            1,
            "error: x.txt: No such file or directory; check the path, or choose another place",
        ),
        (
            OSError(28, "No space left on device", "x"),
            1,
            "error: x: No space left on device; make room, or choose another place",
        ),
        (FileNotFoundError(2, "the run folder is gone", "x"), 1, "error: x: the run folder is gone"),
        (OSError(28, "No space left on device"), 1, f"error: No space left on device {DEBUG_HINT}"),
        (OSError("odd"), 1, f"error: OSError: odd {DEBUG_HINT}"),
        (ValueError("two\nlines"), 1, f"error: ValueError: two lines {DEBUG_HINT}"),
        (ValueError("long " * 99), 1, f"error: ValueError: {'long ' * 59}... {DEBUG_HINT}"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (BrokenPipeError(32, "Broken pipe"), 141, None),
    ],
    ids=lambda part: type(part).__name__ if isinstance(part, BaseException) else "",
)
def test_an_error_while_running_is_one_line(
    error: BaseException,
    code: int,
    line: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def fails(options: Options) -> None:
        raise error

    monkeypatch.setattr("os.dup2", lambda *_: None)  # pytest still needs the standard output
    command = Command("train", "", Options, fails)
    assert main_single(command, []) == code
    assert capfd.readouterr() == ("", f"{line}\n" if line else "")
    assert main_single(command, ["--debug"]) == code
    err = capfd.readouterr().err
    assert line is None or ("Traceback (most recent call last)" in err and "in fails" in err)


def test_sigterm_is_ctrl_c_and_its_handler_is_given_back(capfd: pytest.CaptureFixture[str]) -> None:
    tidied = []

    def asked_to_end(options: Options) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        finally:
            tidied.append(True)

    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        assert main_single(Command("train", "", Options, asked_to_end), []) == 130
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capfd.readouterr() == ("", "interrupted\n")
    assert tidied


@pytest.mark.parametrize(("default", "shown"), [(1, "1"), ("", "''"), ("runs/" + "deep/" * 9, "runs/deep/deep")])
def test_help_shows_a_default_of_any_length(default: Any, shown: str) -> None:
    @dataclass(frozen=True)
    class One:
        a: str = option(default, "letter")

    text = help_text(Command("x", "Do x.", One, record), "x")
    assert f"  --a TEXT            {shown}" in text
    assert max(map(len, text.splitlines())) <= 100


def test_options_may_refuse_combinations(capsys: pytest.CaptureFixture[str]) -> None:
    @dataclass(frozen=True)
    class Picky:
        steps: int = option(0, "")

        def __post_init__(self) -> None:
            if self.steps == 7:
                raise UsageError("not seven")

    assert main_single(Command("x", "", Picky, record), ["--steps", "7"]) == 2
    assert capsys.readouterr().err == "error: not seven\n"


def test_run_may_be_named_and_is_then_imported_late() -> None:
    CALLS.clear()
    command = Command("train", "", Options, f"{__name__}:record")
    assert main_single(command, ["--help"]) == 0
    assert main_single(command, ["--steps=3"]) == 0
    recorded = CALLS or sys.modules[__name__].CALLS  # the same list unless pytest imported this file twice
    assert recorded[0][0].steps == 3


# Verbs and help -------------------------------------------------------------------------------------------------------


VERBS = [COMMAND, NEEDY, Command("train-tokenizer", "Train a tokenizer.", Options, record)]


def test_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["--help"], ["-h"]):
        assert main(VERBS, argv) == 0
        out = capsys.readouterr().out
        assert all(command.name in out and command.summary in out for command in VERBS)
    assert main(VERBS, ["trian"]) == 2
    assert main(VERBS, ["--steps"]) == 2
    assert capsys.readouterr().err == (
        "error: there is no verb 'trian'; did you mean train?\n"
        "error: there is no verb '--steps'; --help lists the verbs\n"
    )
    CALLS.clear()
    assert main(VERBS, ["train_tokenizer", "--steps", "9"]) == 0
    assert CALLS[0][0].steps == 9
    assert main(VERBS, ["train", "--steps", "0"]) == 2


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(VERBS, ["--version"]) == main(VERBS, ["train", "--version"]) == main_single(COMMAND, ["--version"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("functional_lm ") for line in lines)


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["--steps", "0", "--help"], ["--", "--help"]])
def test_help_is_asked_for_anywhere(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    CALLS.clear()
    assert main(VERBS, ["train", *argv]) == 0
    assert capsys.readouterr() == (help_text(COMMAND, "python -m functional_lm train") + "\n", "")
    assert not CALLS


@pytest.mark.parametrize("command", [COMMAND, LAYERED, NEEDY])
def test_help_and_table_name_every_flag_with_its_default_and_meaning(command: Command) -> None:
    text, markdown = help_text(command, "prog"), table(command)
    assert max(map(len, text.splitlines())) <= 100
    assert not any(line != line.rstrip() for line in text.splitlines())
    for flag in flags_of(command):
        assert f"  --{flag.name} " in text
        if flag.name != "debug":
            rows = [row for row in markdown.splitlines() if row.startswith(f"| `--{flag.name} ")]
            assert len(rows) == 1
            assert rows[0].replace("\\|", "").count("|") == 4
            assert flag.about.get("help", "").replace("|", "\\|") in rows[0]


@given(st.text(st.sampled_from("abc|, ")), st.integers(6, 20))
def test_wrapping_loses_no_word(text: str, width: int) -> None:
    lines = _wrap(text, width, "    ")
    assert "".join("".join(lines).split()) == "".join(text.split())
    assert max(map(len, lines)) <= width


def test_help_in_full() -> None:
    @dataclass(frozen=True)
    class Small:
        model: str = option(REQUIRED, "the folder", metavar="DIR", aliases=("model_path",))
        prompt: str = option("", "text")
        mode: str = option("alpha", "how", choices=("alpha", "beta", "gamma", "delta", "epsilon", "zeta"), group="More")
        rate: float | None = option(0.5, "size of a step, " + "word " * 12, above=0, group="More")

    command = Command("go", "Go on.", Small, record, positional=("prompt",), details="Example:\n  go --model x")
    assert help_text(command, "prog go").splitlines() == [
        "Go on.",
        "",
        "Usage: prog go [PROMPT] --model DIR [--flag value ...]",
        "",
        "Example:",
        "  go --model x",
        "",
        "Options:",
        "  --model DIR                     required  the folder (also --model_path)",
        "  --prompt TEXT                   ''        text",
        "",
        "More:",
        "  --mode alpha|beta|gamma|delta|  alpha     how",
        "      epsilon|zeta",
        "  --rate FLOAT|none               0.5       size of a step, word word word word word word word word",
        "                                            word word word word (above 0)",
        "",
        "Every command:",
        "  --debug true|false              false     print the traceback of an error",
        "  -h, --help                                print this",
        "  --version                                 print the version",
    ]
    assert table(command).splitlines() == [
        "| flag | default | meaning |",
        "|---|---|---|",
        "| `--model DIR` | required | the folder (also --model_path) |",
        "| `--prompt TEXT` | `''` | text |",
        "| `--mode alpha\\|beta\\|gamma\\|delta\\|epsilon\\|zeta` | `alpha` | how |",
        f"| `--rate FLOAT\\|none` | `0.5` | size of a step, {'word ' * 12}(above 0) |",
    ]


SCRIPT = """
import sys
from functional_lm.cli import Command, OptionGroup, main
from functional_lm.model.config import ModelConfig
commands = [Command("train", "Train.", ModelConfig, "torch:nothing", extra=(OptionGroup("Model", ModelConfig),))]
code = main(commands, sys.argv[1:])
assert "torch" not in sys.modules and "fire" not in sys.modules
sys.exit(code)
"""


def in_a_process(*argv: str, script: str = SCRIPT, **options: Any) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[1]
    return subprocess.run([sys.executable, "-c", script, *argv], cwd=root, text=True, **options)


def test_help_is_quick_and_imports_no_torch() -> None:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        result = in_a_process("train", "--help", capture_output=True)
        times.append(time.perf_counter() - start)
        assert (result.returncode, result.stderr) == (0, "")
        assert "--d_model INT" in result.stdout
    assert min(times) < 0.5
    result = in_a_process("train", "--d_modle", "3", capture_output=True)
    assert (result.returncode, result.stderr) == (2, "error: unknown flag --d_modle; did you mean --d_model?\n")


EVERY = """
import sys
from functional_lm.__main__ import COMMANDS
from functional_lm.cli import main
for command in COMMANDS:
    assert main(COMMANDS, [command.name, "--help"]) == 0
    assert main(COMMANDS, [command.name, "--hlep"]) == 2
heavy = {"torch", "numpy", "sentencepiece", "fire", "flask", "matplotlib", "transformers"} & sys.modules.keys()
assert not heavy, heavy
"""


def test_no_verb_imports_what_is_slow_for_its_help_or_a_slip() -> None:
    result = in_a_process(script=EVERY, capture_output=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("error: unknown flag --hlep; --help lists the flags") == len(COMMANDS)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("module", ["architecture", "interchange", "merge", "prepare", "quantize", "train"])
def test_a_module_with_a_verb_is_a_command_and_never_does_nothing(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [module, "--hlep"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"functional_lm.{module}", run_name="__main__")
    assert ended.value.code == 2
    assert "--help lists the" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX pipes")
@pytest.mark.parametrize("when", ["in the function", "at the last flush"])
def test_a_reader_that_leaves_ends_the_command_quietly(when: str) -> None:
    lines = 100_000 if when == "in the function" else 1
    script = f"""
import sys, time
from dataclasses import dataclass
from functional_lm.cli import Command, main_single
@dataclass(frozen=True)
class Nothing:
    pass
def run(options):
    sys.stdin.read()
    for _ in range({lines}): print("line")
sys.exit(main_single(Command("x", "", Nothing, run), []))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[1],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout
    assert process.stdin
    assert process.stderr
    process.stdout.close()
    process.stdin.close()
    assert process.wait(10) == 141
    assert process.stderr.read() == b""
    process.stderr.close()


def test_limits_are_inclusive_where_they_say_so() -> None:
    assert run(["--dropout", "0.5"]).dropout == 0.5
    assert run(["--steps", "1"]).steps == 1
    assert run(["--learning_rate", repr(math.nextafter(0, 1))]).learning_rate == 5e-324


def test_where_memory_is_at_its_end_what_needs_less_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    def greedy(options: Options) -> None:
        raise MemoryError("Unable to allocate 74.5 GiB")

    assert main_single(Command("train", "Train.", Options, greedy), []) == 1
    said = capsys.readouterr().err
    assert said == "error: out of memory (Unable to allocate 74.5 GiB); smaller numbers in the flags need less\n"
