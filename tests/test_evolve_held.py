"""Members that train are measured as any other model is: read or answered, on the half that decides and on the other.

Axes: P members.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from evolutions import at, call, evolved, there, weights_of
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import SEEDS, weights
from torch import Tensor

from functional_lm import evolve_held, files, folder, tree
from functional_lm.evolution import journal as journals
from functional_lm.evolution import task
from functional_lm.evolve_asked import asked_of
from functional_lm.evolve_flags import EvolveFlags
from functional_lm.evolve_task import Source
from functional_lm.folder import Model
from functional_lm.inference import generate
from functional_lm.model.config import ModelConfig
from functional_lm.text import corpus
from functional_lm.text import tokenizer as tokenizers

__all__ = ["at", "there"]  # fixtures

TOKENIZER = tokenizers.train(["abcdefgh "], "char", 280)
CONFIG = ModelConfig(vocab_size=TOKENIZER.vocab_size, d_model=8, n_layers=1, n_heads=2, max_len=16)


def letters(texts: Sequence[str], rows: Sequence[Any]) -> list[float]:
    """What tells answers apart, of which an order of rows or of members that is mixed up makes others."""
    return [sum(map(ord, text)) / 100 + len(row["prompt"]) for text, row in zip(texts, rows, strict=True)]


def asked(place: Path, rows: int, **changes: Any) -> tuple[EvolveFlags, Model, Source]:
    lines = [json.dumps({"prompt": "abcdefgh"[: 1 + i % 8], "response": "a"}) + "\n" for i in range(rows)]
    place.write_text("".join(lines))
    flags = EvolveFlags(
        space="hyper", fitness=f"{__name__}:letters", max_tokens=4, batch_size=3, val_fraction=0.5, dtype="float32",
        device="cpu", compile=False, stop=(), **changes,
    )  # fmt: skip
    model = Model(weights(CONFIG, 0), CONFIG, TOKENIZER)
    made = asked_of(flags, model, corpus.find(str(place)), (flags.fitness,))
    every = made.rows.validation
    held = [every[start : start + 3] for start in range(0, len(every), 3)]
    return flags, model, Source(lambda number: None, held, 0, "", made)


def alone(model: Model, source: Source, rows: Sequence[Any]) -> float:
    """The mean score of what `generate` answers to each row."""
    assert source.asked is not None
    run, how = generate.decoder(CONFIG, compile=False), generate.GenerateOptions(4, 0.0)
    texts = []
    for row in rows:
        ids = list(generate.generate(model.params, source.asked.rows.encode(row), run, how))
        stops = source.asked.rows.stops
        texts.append(TOKENIZER.decode(ids[: next((i for i, token in enumerate(ids) if token in stops), len(ids))]))
    return sum(letters(texts, rows)) / len(rows)


@given(seed=SEEDS, size=st.integers(1, 4), rows=st.integers(2, 20))
@settings(max_examples=8)
def test_trained_members_answer_as_each_does_alone(
    tmp_path_factory: pytest.TempPathFactory, seed: int, size: int, rows: int
) -> None:
    """Whatever of the last batch is missing; no row decides and judges."""
    flags, model, source = asked(tmp_path_factory.mktemp("rows") / "rows.jsonl", rows)
    members = [weights(CONFIG, seed + i) for i in range(size)]
    first, other = evolve_held.halves(source.held)
    assert [*first, *other] == source.held
    found = evolve_held.deciding(flags, model, source, size)(tree.stack(members))
    for value, params in zip(found.tolist(), members, strict=True):
        one = model._replace(params=params)
        assert value == pytest.approx(alone(one, source, [row for batch in first for row in batch]), rel=1e-5)
        judged = evolve_held.judging(flags, model, source)(params)
        if other:
            assert judged == pytest.approx(alone(one, source, [row for batch in other for row in batch]), rel=1e-5)
        else:
            assert judged != judged


def test_answers_of_trained_members_are_drawn_alike(tmp_path: Path) -> None:
    """Members that are equal say the same, in every generation; one of other weights does not."""
    flags, model, source = asked(tmp_path / "rows.jsonl", 12, temperature=1.0)
    equal = [weights(CONFIG, 1), weights(CONFIG, 1), weights(CONFIG, 2)]
    measure = evolve_held.deciding(flags, model, source, 3)
    once, again = (measure(tree.stack(equal)) for _ in range(2))
    assert torch.equal(once, again)
    assert once[0] == once[1] != once[2]


@pytest.mark.long
def test_compiled_and_eager_answers_are_one(tmp_path: Path) -> None:
    flags, model, source = asked(tmp_path / "rows.jsonl", 14)
    members = tree.stack([weights(CONFIG, seed) for seed in range(3)])
    found: list[Tensor] = []
    for compiles in (True, False):
        options = EvolveFlags(**{**vars(flags), "compile": compiles})
        found.append(evolve_held.deciding(options, model, source, 3)(members))
    torch.testing.assert_close(*found)


TRAINED = ["--val_fraction", "0.5", "--steps", "20", "--learning_rate", "0.02", "--max_tokens", "4"]


@pytest.mark.parametrize(
    "more",
    [
        ["--space", "hyper", "--strategy", "pbt", "--fresh"],
        ["--space", "architecture", "--strategy", "pso", "--sigma", "1", "--choices", "n_layers=1:2,d_model=8:16"],
    ],
)
def test_trainings_are_chosen_by_their_answers(more: list[str], at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody answers "sat" before; what is trained on rows that say it does."""
    flags = [*TRAINED, *more, "--fitness", "exact"]
    assert evolved(at / "run", *flags, data="rows.jsonl") == 0
    assert "exact of what was held out: " in capsys.readouterr().out
    summary = files.read_json(at / "run" / "summary.json")
    assert summary["held_out"][summary["kept"]] == 1.0
    assert folder.load(at / "run").config.max_len == 32


def test_what_is_fresh_starts_at_new_weights(at: Path) -> None:
    """Not at those of the model, which is no worse for that."""
    flags = ["--space", "hyper", "--strategy", "pbt", "--val_fraction", "0.3", "--steps", "1", "--generations", "1"]
    taught = [*flags, "--steps", "30", "--learning_rate", "0.02", "--fresh"]
    assert evolved(Path("trained"), *taught[:6], *taught[8:]) == 0
    started = []
    for out, more in (("fresh", ["--fresh"]), ("on", [])):
        assert evolved(at / out, "--model", "trained", *flags, *more) == 0
        started.append(files.read_json(at / out / "summary.json")["held_out"]["start"])
    assert started[0] < started[1] - 0.5


def test_what_trainings_answer_is_told_again_without_the_function(
    at: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [*TRAINED[:-2], "--max_tokens", "3", "--space", "hyper", "--strategy", "pbt", "--fitness", "scores:letters"]
    assert evolved(at / "run", *flags, data="rows.jsonl") == 0
    assert len(journals.read(at / "run" / journals.NAME).generations) == 3
    monkeypatch.setattr(task.answers, "named", lambda name: pytest.fail("a replay scores nothing"))
    assert call("replay", at / "run" / "journal.jsonl", "--out", at / "again") == 0
    assert "the weights are those of the run, bit for bit" in capsys.readouterr().out
    assert weights_of(at / "again") == weights_of(at / "run")
