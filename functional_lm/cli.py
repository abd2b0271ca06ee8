"""One mechanism for every command: a frozen dataclass of options and a function, called by Python Fire.

Fire alone runs first and complains after, and guesses types (`--compile false` is a true string, `--prompt 123` an
int). So the words are first checked and typed by the dataclass (`flags.py`), and Fire is then handed the canonical
form of what was meant, `--name=<repr>`, which its own parser reads back to exactly the same values.

A command prints its help without importing torch: give `run` as "module:function" when its module is heavy.
"""

from __future__ import annotations

import errno
import importlib
import inspect
import os
import re
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

from functional_lm.errors import FunctionalLMError, UsageError
from functional_lm.flags import Flag, describe, nearest, parse
from functional_lm.options import REQUIRED, limits

WIDTH = 100
LONGEST = 300  # characters of an error that nothing here has worded
REMEDIES = {  # by the number of an error of the system
    errno.EEXIST: "a folder has to be there: choose another place",
    errno.ENOTDIR: "a folder has to be there: choose another place",
    errno.EISDIR: "a file has to be there: name one",
    errno.ENOENT: "check the path, or choose another place",
    errno.EACCES: "choose a place that you may read and write",
    errno.EPERM: "choose a place that you may read and write",
    errno.EROFS: "choose a place that can be written to",
    errno.ENOSPC: "make room, or choose another place",
    errno.ENAMETOOLONG: "choose a shorter name",
}
COMMON = "Every command"
TYPES = {bool: "true|false", int: "INT", float: "FLOAT", str: "TEXT"}
DEBUG = Flag("debug", bool, None, False, False, {"help": "print the traceback of an error"}, COMMON, "false")
ASKED = (("-h, --help", "", "print this"), ("--version", "", "print the version"))  # answered before any parsing


@dataclass(frozen=True)
class OptionGroup:
    """The fields of a further dataclass as optional flags, which reach `run` as a dict of those that were given.

    `default_text` stands in the help for all defaults ("preset's"); a field that the command has itself, or that is
    in `exclude`, gives no flag.
    """

    title: str
    options: type
    default_text: str = "preset's"
    exclude: tuple[str, ...] = ()


@dataclass(frozen=True)
class Command:
    """A verb. `run` (or the function that "module:function" names) is called as `run(options, *dict_of_each_extra)`.

    `options` is a dataclass whose fields come from `options.option`; `positional` names those that may be given
    without their flag, in this order.
    """

    name: str
    summary: str
    options: type
    run: Callable[..., Any] | str
    extra: tuple[OptionGroup, ...] = ()
    positional: tuple[str, ...] = ()
    details: str = ""  # further text of the help, printed as it is: examples, notes


def flags_of(command: Command) -> list[Flag]:
    """Every flag of a command, its extra groups and `--debug` included. Raises ValueError for one name twice."""
    flags = describe(command.options)
    for number, group in enumerate(command.extra, 1):
        hidden = {flag.name for flag in flags} | set(group.exclude)
        flags += [
            replace(flag, owner=number, heading=group.title, default=None, default_text=group.default_text)
            for flag in describe(group.options)
            if flag.name not in hidden
        ]
    flags.append(DEBUG)
    seen = {"help", "version", "h"}
    for spelling in (spelling for flag in flags for spelling in flag.spellings):
        if spelling in seen:
            raise ValueError(f"command {command.name}: two flags are called --{spelling}")
        seen.add(spelling)
    if unknown := set(command.positional) - {flag.name for flag in flags}:
        raise ValueError(f"command {command.name}: positional {sorted(unknown)} are not among its options")
    return flags


# Running ----------------------------------------------------------------------------------------------------------


def main(commands: Sequence[Command], argv: Sequence[str] | None = None, prog: str = "python -m functional_lm") -> int:
    """Run the command that the first word names; returns the exit code.

    0; 1 for what went wrong on the way; 2 for a wrong call; 130 when interrupted; 141 when the reader has gone.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    verbs = {command.name: command for command in commands}
    verb = argv[0].replace("_", "-") if argv else "--help"
    if verb in verbs:
        return main_single(verbs[verb], argv[1:], f"{prog} {verb}")
    try:
        if verb in ("-h", "--help"):
            print(_list_verbs(commands, prog))
        elif verb == "--version":
            print(version())
        else:
            raise UsageError(f"there is no verb {argv[0]!r}; {nearest(verb, verbs, '--help lists the verbs')}")
        print(end="", flush=True)
        return 0
    except Exception as error:
        return _report(error, debug=False)


def main_single(command: Command, argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run one command; errors become one line on stderr and an exit code, which is returned."""
    argv = sys.argv[1:] if argv is None else list(argv)
    debug = False
    before = _as_ctrl_c(signal.SIGTERM)
    try:
        if "--help" in argv or "-h" in argv:
            print(help_text(command, prog or f"python -m functional_lm {command.name}"))
        elif "--version" in argv:
            print(version())
        else:
            given = parse(flags_of(command), argv, command.positional)
            debug = given.pop("debug", False)
            call(command, given)
        print(end="", flush=True)
        return 0
    except (Exception, KeyboardInterrupt) as error:
        return _report(error, debug)
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _as_ctrl_c(number: int) -> Any:
    """Let a signal end the command as Ctrl-C does: with a word and with what it tidies up on its way out.

    The handler to give back; None where somebody else handles it, and outside the main thread.
    """
    with suppress(ValueError):
        if signal.getsignal(number) is signal.SIG_DFL:
            return signal.signal(number, signal.default_int_handler)
    return None


def call(command: Command, given: dict[str, Any]) -> None:
    """Have Fire call the command with checked values. Nothing that `run` returns is printed."""
    import fire

    flags = [flag for flag in flags_of(command) if flag is not DEBUG]

    def function(**values: Any) -> None:
        owned: list[dict[str, Any]] = [{} for _ in range(1 + len(command.extra))]
        for flag in flags:
            if flag.name in values:
                owned[flag.owner][flag.name] = values[flag.name]
        _run_function(command)(command.options(**owned[0]), *owned[1:])

    def parameter(flag: Flag) -> inspect.Parameter:
        default = inspect.Parameter.empty if flag.default is REQUIRED else flag.default
        return inspect.Parameter(flag.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=flag.kind)

    function.__name__, function.__doc__ = command.name, command.summary
    vars(function)["__signature__"] = inspect.Signature([parameter(flag) for flag in flags])
    fire.Fire(function, command=[f"--{name}={value!r}" for name, value in given.items()], name=command.name)


def _run_function(command: Command) -> Callable[..., Any]:
    if not isinstance(command.run, str):
        return command.run
    module, _, name = command.run.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


def _report(error: BaseException, debug: bool) -> int:
    """One line on stderr (the traceback before it under --debug); returns the exit code."""
    if isinstance(error, BrokenPipeError):
        # The reader has gone; the interpreter's own flush at exit must not complain.
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    if debug:
        traceback.print_exception(error)
    if isinstance(error, KeyboardInterrupt):
        line, code = "interrupted", 130
    elif isinstance(error, FunctionalLMError):
        line, code = f"error: {error}", error.exit_code
    elif isinstance(error, OSError) and error.filename is not None and error.strerror:
        line, code = f"error: {error.filename}: {error.strerror}{_remedy(error)}", 1
    elif isinstance(error, MemoryError):
        why = f" ({error})" if str(error) else ""
        line, code = f"error: out of memory{why}; smaller numbers in the flags need less", 1
    else:
        # A compiler's error is all that it printed.
        said = textwrap.shorten(f"{error}".split("\n\n")[0], LONGEST, placeholder=" ...")
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {said}"
        hint = "" if debug else " (run again with --debug for the traceback)"
        line, code = f"error: {reason}{hint}", 1
    print(" ".join(line.splitlines()), file=sys.stderr)
    return code


def _remedy(error: OSError) -> str:
    """What helps against an error of the system, where the words are the system's."""
    code = error.errno or 0
    return f"; {REMEDIES[code]}" if code in REMEDIES and error.strerror == os.strerror(code) else ""


def version() -> str:
    """The installed version, or a word for a checkout that is not installed."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return f"functional_lm {installed('functional_lm')}"
    except PackageNotFoundError:
        return "functional_lm (not installed)"


# Help -------------------------------------------------------------------------------------------------------------


def help_text(command: Command, prog: str) -> str:
    """Summary, usage and a table of the flags by group, at most 100 columns wide."""
    flags = flags_of(command)
    required = [f"--{flag.typed} {_type(flag)}" for flag in flags if flag.default is REQUIRED]
    places = [f"[{name.upper()}]" for name in command.positional]
    usage = " ".join(["Usage:", prog, *places, *required, "[--flag value ...]"])
    blocks = [textwrap.fill(command.summary, WIDTH), textwrap.fill(usage, WIDTH, subsequent_indent="    ")]
    blocks += [command.details.strip()] if command.details.strip() else []
    groups: dict[str, list[tuple[str, str, str]]] = {}
    for flag in flags:
        groups.setdefault(flag.heading, []).append((f"--{flag.typed} {_type(flag)}", flag.default_text, _meaning(flag)))
    groups[COMMON] += ASKED
    rows = [row for group in groups.values() for row in group]
    left = max(len(line) for row in rows for line in _wrap(row[0], 36, "    "))
    middle = min(16, max(len(row[1]) for row in rows))
    for heading, group in groups.items():
        lines = [line for row in group for line in _row(row, (left, middle, WIDTH - left - middle - 6))]
        blocks.append("\n".join([f"{heading}:", *lines]))
    return "\n\n".join(blocks)


def table(command: Command) -> str:
    """The flags of a command as a Markdown table."""
    lines = ["| flag | default | meaning |", "|---|---|---|"]
    for flag in flags_of(command):
        if flag is not DEBUG:
            default = flag.default_text if flag.owner or flag.default is REQUIRED else f"`{flag.default_text}`"
            cells = (f"`--{flag.typed} {_type(flag)}`", default, _meaning(flag))
            lines.append(" | ".join(("", *(cell.replace("|", "\\|") for cell in cells), "")).strip())
    return "\n".join(lines)


def _list_verbs(commands: Sequence[Command], prog: str) -> str:
    left = max((len(command.name) for command in commands), default=0)
    lines = [line for command in commands for line in _row((command.name, command.summary), (left, WIDTH - left - 4))]
    usage = f"Usage: {prog} VERB [--flag value ...]"
    return "\n".join([usage, "", *lines, "", f"`{prog} VERB --help` lists the flags of a verb with their defaults."])


def _type(flag: Flag) -> str:
    """The word for a value: `INT`, `a|b|c`, `FLOAT,...`, `INT|none`."""
    word = "|".join(map(str, flag.about["choices"])) if "choices" in flag.about else TYPES[flag.kind]
    if "metavar" in flag.about:
        word = str(flag.about["metavar"])
    elif flag.count is not None:
        word = ",".join([word] * flag.count) or f"{word},..."
    return f"{word}|none" if flag.optional else word


def _meaning(flag: Flag) -> str:
    """The help of a flag with its limits and other spellings."""
    also = ", ".join(f"--{spelling}" for spelling in flag.spellings[1:])
    notes = "; ".join(note for note in (limits(flag.about), f"also {also}" if also else "") if note)
    return " ".join(f"{flag.about.get('help', '')} {f'({notes})' if notes else ''}".split())


def _row(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    """The lines of a table row, indented by two, each cell wrapped in its column."""
    wrapped = [_wrap(cell, width, indent) for cell, width, indent in zip(cells, widths, ("    ", "", ""))]
    lines = zip_longest(*wrapped, fillvalue="")
    return ["  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]


def _wrap(text: str, width: int, indent: str = "") -> list[str]:
    """Lines that end at a space, after `|` or `,` (lists of choices have no spaces), or inside an overlong word."""
    lines = [""]
    for piece in re.findall(rf"[^|,\s]{{1,{max(1, width - len(indent) - 1)}}}[|,]?\s*|[|,]\s*|\s+", text):
        if len((lines[-1] + piece).rstrip()) > width:
            lines.append(indent)
        lines[-1] += piece
    return [line.rstrip() for line in lines]
