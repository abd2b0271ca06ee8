"""The command line: wrong calls are refused before anything runs, right ones arrive typed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from commands import CALLS, COMMAND, LAYERED, NEEDY, Needy, Options, record, run
from hypothesis import given, settings
from hypothesis import strategies as st

from functional_lm.cli import Command, call, flags_of, main_single
from functional_lm.flags import FLAG, describe
from functional_lm.model.config import ModelConfig
from functional_lm.options import option

WRONG = {
    "--larning_rate 3": "unknown flag --larning_rate; did you mean --learning_rate?",
    "--larning-rate=3": "unknown flag --larning-rate; did you mean --learning_rate?",
    "--zzz": "unknown flag --zzz; --help lists the flags",
    "-steps 5": "unknown flag -steps; did you mean --steps?",
    "-s 5": "unknown flag -s; --help lists the flags",
    "--nosteps": "unknown flag --nosteps; did you mean --steps?",
    "--steps -5": "--steps is -5; it has to be at least 1",
    "--steps 1.5": "--steps is 1.5; it is a whole number",
    "--steps nan": "--steps is nan; it is a whole number",
    "--steps inf": "--steps is inf; it is a whole number",
    "--steps true": "--steps is 'true'; it is a whole number",
    "--steps 0x10": "--steps is '0x10'; it is a whole number",
    "--steps 1__0": "--steps is '1__0'; it is a whole number",
    "--steps=": "--steps is ''; it is a whole number",
    "--steps none": "--steps is 'none'; it is a whole number",
    "--steps 9223372036854775808": "--steps is 9223372036854775808; it does not fit 64 bits",
    "--steps 1e400": "--steps is 1e400; it does not fit 64 bits",
    f"--steps {'9' * 400}": f"--steps is {'9' * 57}...; it does not fit 64 bits",
    "--seed x": "--seed is 'x'; it is a whole number, or none",
    "--learning_rate nan": "--learning_rate is nan; it has to be finite and below 3.4e38",
    f"--learning_rate {10**400}": f"--learning_rate is 1{'0' * 56}...; it has to be finite and below 3.4e38",
    "--learning_rate false": "--learning_rate is 'false'; it is a number",
    "--learning_rate 0": "--learning_rate is 0; it has to be above 0 and below 1",
    "--learning_rate 1": "--learning_rate is 1; it has to be above 0 and below 1",
    "--dropout .6": "--dropout is .6; it has to be between 0 and 0.5",
    "--dropout -.1": "--dropout is -.1; it has to be between 0 and 0.5",
    "--schedule cosin": "--schedule is 'cosin'; it can be cosine, linear, constant",
    "--compile maybe": "--compile is 'maybe'; it is true or false",
    "--compile none": "--compile is 'none'; it is true or false",
    "--fused maybe": "--fused is 'maybe'; it is true or false, or none",
    "--nocompile=true": "--nocompile takes no value; write --compile true or --compile false",
    "--no-compile true": "unexpected argument 'true'; write --name value, and quote a value that holds spaces",
    "--compile --no-compile": "--compile is given twice; give it once",
    "--steps 1 --steps 2": "--steps is given twice; give it once",
    "--data a --data-path b": "--data is given twice; give it once",
    "--steps": "--steps needs a value: a whole number",
    "--steps --compile": "--steps needs a value: a whole number",
    "--prompt --hello": "--prompt needs a value: text; if it starts with a dash, --prompt=--hello",
    "--sizes 1,x": "--sizes is 'x'; it is whole numbers separated by commas",
    "--sizes 1,-2": "--sizes is -2; it has to be at least 0",
    "--betas 0.9": "--betas is '0.9'; it is 2 numbers separated by commas, or none",
    "steps=5": "unexpected argument 'steps=5'; write --name value, and quote a value that holds spaces",
    "--prompt once upon": "unexpected argument 'upon'; write --name value, and quote a value that holds spaces",
    "-- --steps": "unexpected argument '--steps'; write --name value, and quote a value that holds spaces",
    "-": "unexpected argument '-'; write --name value, and quote a value that holds spaces",
}


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_call_is_refused_in_one_line_before_anything_runs(
    words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    CALLS.clear()
    assert main_single(COMMAND, words.split(" ")) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"error: {WRONG[words]}\n")
    assert not CALLS


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--model, --prompt are required"),
        (["--prompt", "x"], "--model is required (the model folder)"),
        (
            ["--model", "m", "a", "b"],
            "unexpected argument 'b'; write --name value, and quote a value that holds spaces",
        ),
        (["--model=m", "a", "--prompt", "b"], "--prompt is given twice; give it once"),
        (["--model=m", "--tokens=two\nlines", "a"], "--tokens is 'two\\nlines'; it is a whole number"),
    ],
)
def test_required_and_positional(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main_single(NEEDY, argv) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


RIGHT: list[tuple[list[str], str, Any]] = [
    (["--steps", "5"], "steps", 5),
    (["--steps=1e3"], "steps", 1000),
    (["--steps", "1_000"], "steps", 1000),
    (["--seed", str(2**53 + 1)], "seed", 2**53 + 1),
    (["--seed=-9223372036854775808"], "seed", -(2**63)),
    (["--seed", "-1"], "seed", -1),
    (["--seed", "none"], "seed", None),
    (["--note", "null"], "note", None),
    (["--prompt", "none"], "prompt", "none"),
    (["--learning-rate", "1e-2"], "learning_rate", 0.01),
    (["--dropout", "0"], "dropout", 0.0),
    (["--compile"], "compile", True),
    (["--compile", "false"], "compile", False),
    (["--compile", "--steps", "3"], "compile", True),
    (["--compile=NO"], "compile", False),
    (["--nocompile"], "compile", False),
    (["--no-compile"], "compile", False),
    (["--no_fused"], "fused", False),
    (["--fused", "none"], "fused", None),
    (["--norm"], "norm", True),
    (["--nonorm"], "norm", False),
    (["--prompt", ""], "prompt", ""),
    (["--prompt="], "prompt", ""),
    (["--prompt", "123"], "prompt", "123"),
    (["--prompt", "a,b"], "prompt", "a,b"),
    (["--prompt", "[1, {2: 'x'}]"], "prompt", "[1, {2: 'x'}]"),
    (["--prompt", "True"], "prompt", "True"),
    (["--prompt", "-"], "prompt", "-"),
    (["--prompt", "---"], "prompt", "---"),
    (["--prompt", "- an item"], "prompt", "- an item"),
    (["--prompt", "--flag and words"], "prompt", "--flag and words"),
    (["--prompt=--help"], "prompt", "--help"),
    (["--prompt=a=b"], "prompt", "a=b"),
    (["--prompt", "x # y"], "prompt", "x # y"),
    (["--data-path", "a.txt,b.txt"], "data", "a.txt,b.txt"),
    (["--data-file=a"], "data", "a"),
    (["--stop", "a,b"], "stop", ("a", "b")),
    (["--stop", "1, 2"], "stop", ("1", " 2")),
    (["--stop", ""], "stop", ()),
    (["--stop", '["a,b", "\\n"]'], "stop", ("a,b", "\n")),
    (["--stop", "[INST]"], "stop", ("[INST]",)),
    (["--sizes", "(3, 4)"], "sizes", (3, 4)),
    (["--sizes", "7"], "sizes", (7,)),
    (["--sizes", "[]"], "sizes", ()),
    (["--betas", "1,-.5"], "betas", (1.0, -0.5)),
    (["--betas", "none"], "betas", None),
]


@pytest.mark.parametrize(("argv", "name", "value"), RIGHT, ids=lambda part: str(part))
def test_a_right_call_arrives_typed_and_prints_nothing(
    argv: list[str], name: str, value: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    arrived = getattr(run(argv), name)
    assert arrived == value
    assert type(arrived) is type(value)
    assert capsys.readouterr() == ("", "")


def test_defaults_positional_and_aliases() -> None:
    assert run([]) == Options()
    assert run(["-1", "--model-path", "m"], NEEDY) == Needy(model="m", prompt="-1")
    assert run(["--model", "m", "--", "--prompt"], NEEDY).prompt == "--prompt"


TEXTS = st.text()  # surrogates too: arguments that are not UTF-8 arrive as such
ANY = {
    "steps": st.integers(1, 2**63 - 1),
    "seed": st.none() | st.integers(-(2**63), 2**63 - 1),
    "learning_rate": st.floats(0, 1, exclude_min=True, exclude_max=True),
    "compile": st.booleans(),
    "fused": st.none() | st.booleans(),
    "note": st.none() | TEXTS,
    "prompt": TEXTS | st.text(st.characters(categories=["Cs", "Cc", "Po", "Pd"])),
    "stop": st.lists(TEXTS).map(tuple),
    "sizes": st.lists(st.integers(0, 10**18)).map(tuple),
    "betas": st.none() | st.tuples(*[st.floats(allow_nan=False, allow_infinity=False)] * 2),
}


@settings(max_examples=200, deadline=None)
@given(st.fixed_dictionaries({}, optional=ANY))
def test_values_survive_fire(values: dict[str, Any]) -> None:
    CALLS.clear()
    call(COMMAND, values)
    assert repr(CALLS) == repr([(Options(**values),)])  # repr: -0.0 and 0, 1 and True are told apart


@settings(max_examples=150, deadline=None)
@given(st.text(st.characters(exclude_characters="\0")))
def test_a_text_arrives_as_it_was_written(text: str) -> None:
    assert run([f"--prompt={text}"]).prompt == text
    if not FLAG.fullmatch(text) and text != "--":
        assert run(["--prompt", text]).prompt == text
        assert run([text, "--model", "m"], NEEDY).prompt == text


@settings(max_examples=150, deadline=None)
@given(st.floats(-3.4e38, 3.4e38), st.integers(-(2**63), 2**63 - 1))
def test_numbers_arrive_exactly(number: float, integer: int) -> None:
    options = run(["--betas", f"{number!r},{integer}", "--seed", str(integer)])
    assert repr(options.betas) == repr((number, float(integer)))
    assert options.seed == integer
    assert run([f"--seed={integer:_}"]).seed == integer


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(["--steps", "--", "-", "3", "--compile", "true", "--stop=", "--sizes"]) | st.text()))
def test_any_words_run_once_or_are_refused(argv: list[str]) -> None:
    CALLS.clear()
    code = main_single(COMMAND, argv)
    assert (code, len(CALLS)) in ((0, 1), (2, 0))


def test_an_extra_group_arrives_as_the_dict_of_what_was_given() -> None:
    argv = ["--steps", "3", "--d-model=64", "--rope_scaling", "8,1,4,8192", "--qk_norm", "--n_kv_heads", "2"]
    assert run(argv, LAYERED).steps == 3
    assert CALLS[0][1] == {"d_model": 64, "rope_scaling": (8.0, 1.0, 4.0, 8192.0), "qk_norm": True, "n_kv_heads": 2}
    run([], LAYERED)
    assert CALLS[0][1] == {}


def test_the_commands_own_option_wins_over_the_groups() -> None:
    assert run(["--dropout", "0.25"], LAYERED).dropout == 0.25
    assert CALLS[0][1] == {}
    names = [flag.name for flag in flags_of(LAYERED)]
    assert len(names) == len(set(names))
    assert {flag.name for flag in describe(ModelConfig)} <= set(names)


def test_a_groups_flag_is_checked_like_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    assert main_single(LAYERED, ["--n_heads", "two"]) == 2
    assert main_single(LAYERED, ["--rope-scaling=1,2"]) == 2
    assert capsys.readouterr().err == (
        "error: --n_heads is 'two'; it is a whole number\n"
        "error: --rope_scaling is '1,2'; it is 4 numbers separated by commas, or none\n"
    )


def test_mistakes_in_a_command_are_found_when_it_is_described() -> None:
    @dataclass(frozen=True)
    class Twice:
        a: int = option(1, "")
        b: int = option(1, "", aliases=("a",))

    @dataclass(frozen=True)
    class Odd:
        a: dict[str, int] = field(default_factory=dict)

    with pytest.raises(ValueError, match="two flags are called --a"):
        flags_of(Command("x", "", Twice, record))
    with pytest.raises(ValueError, match="positional"):
        flags_of(Command("x", "", Options, record, positional=("text",)))
    with pytest.raises(TypeError, match="no flag can hold"):
        flags_of(Command("x", "", Odd, record))
