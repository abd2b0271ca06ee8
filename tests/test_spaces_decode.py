"""Settings of decoding as a space: transforms, all members' answers at once, and folders that say how to sample."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import weights

from functional_lm import evolve, files, folder, generate, keys, sampling_settings, tree
from functional_lm.__main__ import COMMANDS
from functional_lm.cli import main, main_single
from functional_lm.errors import DataError
from functional_lm.evolution import answers, cma, decoding
from functional_lm.evolution.strategy import Candidates, unmoved
from functional_lm.inference.sampling import Penalties, Sampling, sample
from functional_lm.model import transformer
from functional_lm.model.config import ModelConfig
from functional_lm.sampling_settings import LIMITS, NAME, USUAL
from functional_lm.text import tokenizer as tokenizers

NAMES = tuple(USUAL)
CONFIG = ModelConfig(vocab_size=24, d_model=16, n_layers=2, n_heads=2, d_ff=24, max_len=24)


@given(values=st.lists(st.floats(-1e4, 1e4), min_size=len(NAMES), max_size=len(NAMES)))
def test_every_candidate_is_a_setting_that_can_be_meant(values: list[float]) -> None:
    found = decoding.settings_of(torch.tensor(values), NAMES, 100)
    for name, value in found.items():
        low, high = LIMITS[name]
        assert low <= float(value) <= high
    assert found["top_k"].dtype == torch.int64
    assert 1 <= int(found["top_k"]) <= 100


@given(
    temperature=st.floats(0.02, 50), top_k=st.integers(1, 100), top_p=st.floats(0.01, 0.99), min_p=st.floats(0.01, 0.9),
    repetition_penalty=st.floats(0.1, 10), presence_penalty=st.floats(-1.9, 1.9),
    frequency_penalty=st.floats(-1.9, 1.9),
)  # fmt: skip
def test_a_setting_comes_back_from_its_number(**wanted: float) -> None:
    values = torch.tensor([decoding.number(name, wanted[name], 100) for name in NAMES])
    found = decoding.settings_of(values, NAMES, 100)
    for name in NAMES:
        assert float(found[name]) == pytest.approx(wanted[name], rel=1e-3, abs=1e-3)


def reference(params: tree.Tree, prompt: list[int], own: dict[str, float], key: torch.Tensor, count: int) -> list[int]:
    """One sequence, everything read anew for every token."""
    penalties = Penalties.none(1, CONFIG.vocab_size)._replace(
        min_p=torch.tensor([own["min_p"]]), repetition=torch.tensor([own["repetition_penalty"]]),
        presence=torch.tensor([own["presence_penalty"]]), frequency=torch.tensor([own["frequency_penalty"]]),
        prompted=torch.zeros(1, CONFIG.vocab_size, dtype=torch.bool).index_fill(1, torch.tensor(prompt), True),
    )  # fmt: skip
    how, text = Sampling.uniform(1, own["temperature"], int(own["top_k"]), own["top_p"]), list(prompt)
    for number in range(count):
        logits = transformer.forward(params, torch.tensor([text]), CONFIG)[:, -1]
        token = sample(logits, keys.fold_in(key, number)[None], how, True, penalties)
        penalties = penalties.counted(token)
        text.append(int(token))
    return text[len(prompt) :]


@settings(max_examples=5)
@given(seed=st.integers(0, 1000), chunk=st.integers(1, 4), compile=st.just(False))
def test_all_members_answer_as_each_would_alone(seed: int, chunk: int, compile: bool) -> None:
    params = tree.map(lambda leaf: 2 * leaf, weights(CONFIG, seed))
    space = decoding.decode(params, USUAL, NAMES, CONFIG.vocab_size)
    strategy = cma.cma_es(4, 1.0)
    candidates = strategy.ask(strategy.init(keys.key(seed), space.start))
    how = answers.Answering(5, (), chunk=chunk, compile=compile)
    answer = decoding.answerer(strategy, space, CONFIG, how, torch.float32, USUAL, NAMES)
    prompts = [[1, 2, 3, 2], [5, 6]]
    found = answer(candidates, answers.padded(prompts, 4), keys.key(seed))
    own_keys = keys.split(keys.key(seed), 2)
    for member in range(4):
        values = decoding.settings_of(candidates.own["settings"][member], NAMES, CONFIG.vocab_size)
        own = {name: float(value) for name, value in values.items()}
        for row, prompt in enumerate(prompts):
            assert found[member, row].tolist() == reference(params, prompt, own, own_keys[row], 5)


def test_settings_that_are_not_evolved_are_the_given_ones() -> None:
    params = weights(CONFIG, 0)
    cold = {**USUAL, "temperature": 0.0}
    space = decoding.decode(params, cold, ("presence_penalty",), CONFIG.vocab_size)
    how = answers.Answering(5, ())
    answer = decoding.answerer(unmoved(), space, CONFIG, how, torch.float32, cold, ("presence_penalty",))
    one = Candidates({}, {}, {"settings": torch.zeros(1, 1)})
    found = answer(one, answers.padded([[1, 2]], 2), keys.key(0))
    assert found[0, 0].tolist() == reference(params, [1, 2], cold, keys.key(0), 5)


@pytest.mark.long
def test_it_compiles() -> None:
    params, names = weights(CONFIG, 0), ("temperature", "top_p")
    space, strategy = decoding.decode(params, USUAL, names, CONFIG.vocab_size), cma.cma_es(4, 1.0)
    candidates = strategy.ask(strategy.init(keys.key(0), space.start))
    made = [
        decoding.answerer(
            strategy, space, CONFIG, answers.Answering(5, (), compile=compile), torch.float32, USUAL, names
        )(candidates, answers.padded([[1, 2, 3], [4]], 3), keys.key(0))
        for compile in (True, False)
    ]
    assert torch.equal(*made)


# Folders --------------------------------------------------------------------------------------------------------------

WORDS = "the cat sat on the mat and the dog sat on the log " * 20


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("decode")
    rows = [{"prompt": f"the {a} ", "response": "sat"} for a in ("cat", "dog") for _ in range(8)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "text.txt").write_text(WORDS)
    (place / "variety.py").write_text("def score(texts, rows):\n    return [len(set(text)) for text in texts]\n")
    tokenizer = tokenizers.train([WORDS], "char", 280)
    config = ModelConfig(tokenizer.vocab_size, d_model=16, n_layers=1, n_heads=2, max_len=64)
    params = tree.map(lambda leaf: 3 * leaf, transformer.init(config, keys.key(0)))
    folder.save(place / "model", params, config, tokenizer)
    return place


@pytest.fixture
def at(there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(there)
    return tmp_path


def evolved(out: Path, *more: str) -> int:
    words = {
        "--space": "decode", "--model": "model", "--data": "rows.jsonl", "--strategy": "cma-es", "--sigma": "1",
        "--population": "8", "--generations": "6", "--fitness": "variety:score", "--max_tokens": "10",
        "--batch_size": "4", "--val_fraction": "0.25", "--out": str(out), "--compile": "false", "--dtype": "float32",
    }  # fmt: skip
    given = [word for flag, value in words.items() if flag not in more for word in (flag, value)]
    return main_single(evolve.COMMAND, [*given, *map(str, more)])


def said(capsys: pytest.CaptureFixture[str], model: Path, *more: str) -> str:
    words = ["--model", str(model), "--prompt", "the cat", "--max_tokens", "24", "--compile", "false"]
    assert main_single(generate.COMMAND, [*words, "--dtype", "float32", *more]) == 0
    return capsys.readouterr().out


def test_the_winner_is_a_folder_that_says_how(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Better than the start, used by `generate` unless flags say otherwise; resumed and replayed to the bit."""
    assert evolved(at / "run") == 0
    held = files.read_json(at / "run" / "summary.json")["held_out"]
    assert max(held["centre"], held["best"]) > held["start"]
    assert tree.digest(folder.load(at / "run").params) == tree.digest(folder.load("model").params)
    own = sampling_settings.of_folder(at / "run")
    assert own.keys() == USUAL.keys()
    assert files.read_json(at / "run" / NAME)["eos_token_id"] is not None
    capsys.readouterr()
    flags = [f"--{name}={value!r}" for name, value in own.items()]
    assert said(capsys, at / "run") == said(capsys, Path("model"), *flags) != said(capsys, Path("model"))
    usual = [f"--{name}={value!r}" for name, value in USUAL.items()]
    assert said(capsys, at / "run", *usual) == said(capsys, Path("model"))
    assert evolved(at / "parts", "--generations", "3", "--save_every", "2") == 0
    assert evolved(at / "parts") == 0
    journal = str(at / "parts" / "journal.jsonl")
    assert main_single(evolve.COMMAND, ["replay", journal, "--out", str(at / "again")]) == 0
    assert "bit for bit" in capsys.readouterr().out
    assert own == sampling_settings.of_folder(at / "parts") == sampling_settings.of_folder(at / "again")


def test_some_settings_alone_are_evolved(at: Path) -> None:
    assert evolved(at / "run", "--settings", "temperature,top_p", "--strategy", "eggroll", "--generations", "2") == 0
    own = sampling_settings.of_folder(at / "run")
    assert own["temperature"] != 0.8
    assert {name: own[name] for name in NAMES[3:]} == {name: USUAL[name] for name in NAMES[3:]}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--fitness", "loss"], "--space decode changes answers alone; --fitness is loss"),
        (["--temperature", "0.5"], "--temperature is evolved in --space decode"),
        (["--settings", "heat"], "--settings is 'heat'; it can be temperature, top_k, top_p"),
        (["--settings", "top_p,top_p"], "name each setting once"),
        (["--space", "lora", "--settings", "top_p"], "--settings belongs to --space decode, not to lora"),
        (["--data", "text.txt"], "has no rows of prompt and response"),
    ],
)
def test_what_cannot_be_meant_is_one_line(
    more: list[str], message: str, at: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evolved(at / "run", *more) in (1, 2)
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_other_programs_get_the_settings_and_give_them_back(at: Path) -> None:
    pytest.importorskip("transformers")
    (at / "own").mkdir()
    for path in Path("model").iterdir():
        (at / "own" / path.name).write_bytes(path.read_bytes())
    sampling_settings.write(at / "own", {"temperature": 0.3, "top_k": 7})
    assert main(COMMANDS, ["export", "--model", str(at / "own"), "--out", str(at / "theirs")]) == 0
    assert main(COMMANDS, ["import", str(at / "theirs"), "--out", str(at / "back")]) == 0
    for name in ("theirs", "back"):
        assert sampling_settings.of_folder(at / name) == {"temperature": 0.3, "top_k": 7}


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"temperature": "hot"}, "temperature is 'hot'; it has to be a number from 0 to 100"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": 2.5}, "top_k is 2.5"),
        ({"top_k": True}, "top_k is True"),
        ([1], "holds no JSON object"),
        ("{", "is no JSON"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused(written: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / NAME).write_text(written if isinstance(written, str) else json.dumps(written))
    with pytest.raises(DataError, match=message.replace(".", r"\.")):
        sampling_settings.of_folder(tmp_path)


def test_other_peoples_fields_stay_and_null_says_nothing(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text(json.dumps({"eos_token_id": 2, "top_k": None, "temperature": 0.6, "do_sample": True}))
    assert sampling_settings.of_folder(tmp_path) == {"temperature": 0.6}
    assert sampling_settings.of_folder(tmp_path / "none") == {}
    sampling_settings.write(tmp_path, {"top_p": 0.9})
    assert files.read_json(tmp_path / NAME) == {
        "eos_token_id": 2, "top_k": None, "temperature": 0.6, "do_sample": True, "top_p": 0.9
    }  # fmt: skip


def test_the_server_goes_by_the_folder_where_a_request_says_nothing() -> None:
    pytest.importorskip("flask")
    from served import offline, post, serving

    from functional_lm.serving.app import create

    with serving(settings={"temperature": 0.0}) as service:
        client = create(service).test_client()
        asked = {"prompt": "The quick", "max_tokens": 8, "seed": 3}
        for more, temperature in (({}, 0.0), ({"temperature": 1.5}, 1.5), ({"temperature": 1.0}, 1.0)):
            status, answer = post(client, "/v1/completions", {**asked, **more})
            assert status == 200
            assert answer["choices"][0]["text"] == offline("The quick", 8, temperature, 3)
