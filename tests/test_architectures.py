"""Architectures as what is evolved: choices as numbers, buckets, and that neither buckets nor ranks change a training.

Axes: P members.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import token_rows, weights
from torch import Tensor

from functional_lm import evolve_choices, evolve_trained, tree
from functional_lm.errors import UsageError
from functional_lm.evolution import architectures, population, trainings
from functional_lm.evolution.architectures import Choice
from functional_lm.evolution.strategy import Candidates
from functional_lm.evolve_flags import EvolveFlags
from functional_lm.evolve_task import Source, Task
from functional_lm.folder import Model
from functional_lm.model import account
from functional_lm.model.config import ModelConfig

BASE = ModelConfig(vocab_size=24, d_model=8, n_layers=1, n_heads=2, max_len=16)
PARTS = ("n_layers=1:2", "d_model=8:12", "n_heads=2:3:4", "mlp_factor=1:2", "feed_forward=gelu:swiglu:relu2")
GRID = architectures.grid(evolve_choices.parse(PARTS), BASE)
reals = st.floats(-50, 50)
options = st.integers(1, 7).flatmap(
    lambda n: st.tuples(st.just(Choice("n_layers", tuple(range(n)))), st.integers(0, n - 1))
)


# Numbers to options ---------------------------------------------------------------------------------------------------


@given(options, reals, st.integers(-3, 3))
def test_a_number_is_the_option_that_far_away_and_comes_back_beyond_the_last(
    case: tuple[Choice, int], number: float, turns: int
) -> None:
    choice, start = case
    count = len(choice.options)
    found = architectures.decoded(choice, [number], start)
    assert 0 <= found < count
    for whole in range(-start, count - start):
        assert architectures.decoded(choice, [float(whole)], start) == start + whole
    inside = abs((number + start + 0.5) % 1 - 0.5) < 0.49  # away from the border of two options
    assert not inside or architectures.decoded(choice, [number + 2 * count * turns], start) == found
    assert not inside or architectures.decoded(choice, [-1.0 - 2 * start - number], start) == found  # a mirror at -0.5


@given(st.lists(reals, min_size=2, max_size=5), st.integers(0, 4))
def test_of_words_the_highest_number_wins_and_the_first_one_has_a_lead(numbers: list[float], start: int) -> None:
    choice, start = Choice("norm", tuple("abcde"[: len(numbers)])), start % len(numbers)
    assert architectures.decoded(choice, [0.0] * len(numbers), start) == start
    led = [number + architectures.LEAD * (at == start) for at, number in enumerate(numbers)]
    assert led[architectures.decoded(choice, numbers, start)] == max(led)
    assert architectures.decoded(choice, [math.nan] * len(numbers), start) == 0


@given(st.tuples(*(st.integers(0, len(choice.options) - 1) for choice in GRID.choices)))
def test_what_is_impossible_becomes_the_nearest_that_is_possible(wanted: tuple[int, ...]) -> None:
    values, found = GRID.values(wanted), GRID.nearest(wanted)
    possible = values["d_model"] % values["n_heads"] == 0 and values["d_model"] // values["n_heads"] >= 2
    assert (wanted in GRID.able) == (found == wanted) == possible
    assert GRID.able[found].d_model % GRID.able[found].n_heads == 0
    if not possible:  # in this grid other heads always help
        assert {name for name, value in GRID.values(found).items() if value != values[name]} == {"n_heads"}


@given(st.integers(300, 3000))
@settings(max_examples=15)
def test_no_architecture_is_larger_than_the_limit(most: int) -> None:
    smallest = min(map(account.parameters, GRID.able.values()))
    if most < smallest:
        with pytest.raises(UsageError, match=f"the smallest architecture of --choices has {smallest} parameters"):
            architectures.grid(GRID.choices, BASE, most)
        return
    limited = architectures.grid(GRID.choices, BASE, most)
    assert limited.able == {place: one for place, one in GRID.able.items() if account.parameters(one) <= most}
    assert limited.start in limited.able


def test_the_rest_of_an_architecture_follows_from_the_base() -> None:
    """What the base derived is derived again; a feed-forward width of its own keeps its share."""
    for place, config in GRID.able.items():
        values = GRID.values(place)
        assert config == ModelConfig(
            vocab_size=24, max_len=16, d_ff=int(values["mlp_factor"] * values["d_model"]),
            **{name: value for name, value in values.items() if name != "mlp_factor"},
        )  # fmt: skip
    own = ModelConfig(vocab_size=24, d_model=8, n_layers=1, n_heads=4, n_kv_heads=2, d_ff=20, max_len=16)
    wide = architectures.grid((Choice("d_model", (8, 16)),), own)
    assert [(one.d_ff, one.n_kv_heads, one.head_dim) for one in wide.able.values()] == [(20, 2, 2), (40, 2, 4)]
    assert wide.able[wide.start] == own
    assert architectures.grid((), own).able == {(): own}


REFUSED = {
    "n_heads": "it is NAME=VALUE:VALUE, commas between",
    "n_heads=": "it is NAME=VALUE:VALUE, commas between",
    "heads=2": "--choices has 'heads'; did you mean n_heads?",
    "n_heads=2:two": "--choices n_heads is 'two'; it is a whole number",
    "n_heads=0:2": "--choices n_heads is 0; it has to be between 1 and",
    "norm=rmsnorm:none": "--choices norm is 'none'; it can be rmsnorm, layernorm",
    "n_heads=2:2": "has a value twice",
    "vocab_size=10:20": "--choices vocab_size cannot differ between members",
    "mlp_factor=0": "--choices mlp_factor is 0; it has to be above 0",
}


@pytest.mark.parametrize("part", REFUSED)
def test_what_is_no_choice_is_refused(part: str) -> None:
    with pytest.raises(UsageError) as error:
        evolve_choices.parse([part])
    assert REFUSED[part] in str(error.value)


def test_choices_that_cannot_be_met_are_refused() -> None:
    for parts, message in (
        (("n_heads=3:5",), "no architecture of --choices is possible: d_model 8 is not a multiple of n_heads 3"),
        (("n_heads=2", "n_heads=4"), "--choices names n_heads twice"),
        (("d_ff=8", "mlp_factor=2"), "--choices names d_ff and mlp_factor"),
        (
            [f"{name}={':'.join(map(str, range(1, 12)))}" for name in ("n_layers", "d_model", "n_heads", "d_ff")],
            "--choices make 14641 architectures; 10000 are the most",
        ),
    ):
        with pytest.raises(UsageError) as error:
            architectures.grid(evolve_choices.parse(parts), BASE)
        assert message in str(error.value)


# Buckets --------------------------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from(sorted(GRID.able)[:5]), min_size=1, max_size=20), st.integers(1, 6), st.integers(1, 4))
def test_jobs_are_the_members_and_ranks_give_them_back_in_order(
    found: list[tuple[int, ...]], chunk: int, ranks: int
) -> None:
    for numbers in ({"learning_rate": 0.1}, {}):
        plan = trainings.jobs(found, chunk, trainings.Search(numbers, GRID))
        assert sorted(member for job in plan for member in job.members) == list(range(len(found)))
        for job in plan:
            assert {found[member] for member in job.members} == {job.place}
            assert set(job.rows) <= set(job.members)
            size = len(job.rows)
            assert (size in (1, 2, 4, chunk) and size <= chunk) if numbers else size == 1
            assert not numbers or set(job.rows) == set(job.members)
        owner = trainings.divided([float(len(job.rows)) for job in plan], ranks)
        parts = [trainings.of_rank(plan, owner, rank) for rank in range(ranks)]
        values = torch.tensor([float(member) for part in parts for job in part for member in job.members])
        assert trainings.in_order(values, plan, owner).tolist() == list(range(len(found)))


@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=12), st.integers(1, 5))
def test_no_rank_has_much_more_to_do_than_the_others(costs: list[float], ranks: int) -> None:
    owner = trainings.divided(costs, ranks)
    loads = [sum(cost for cost, its in zip(costs, owner) if its == rank) for rank in range(ranks)]
    assert max(loads) - min(loads) <= max(costs) + 1e-9


def batch(number: int) -> dict[str, Tensor]:
    rows = token_rows(BASE, (2, 7), number)
    return {"tokens": rows[:, :-1].contiguous(), "targets": rows[:, 1:].contiguous(), "bytes": torch.tensor(12)}


def made(rank: int = 0, ranks: int = 1, **changes: Any) -> tuple[Task, Any]:
    given = EvolveFlags(
        space="architecture", strategy="cma-es", sigma=1.0, population=9, choices=PARTS, steps=3, batch_size=2,
        learning_rate=0.01, compile=False, dtype="float32", device="cpu", chunk_size="4", block_size=6,
    )  # fmt: skip
    flags = EvolveFlags(**{**vars(given), **changes})
    evolution = evolve_trained.evolution_of(flags, Model(weights(BASE, 0), BASE, None), "")  # type: ignore[arg-type]
    source = Source(batch, [batch(100), batch(101)], 12, "")

    def divide(tokens: int) -> population.Share:
        return population.share(flags.population, int(flags.chunk_size), rank, ranks)

    return evolve_trained.task_of(flags, evolution, source, 6, divide), evolution


def candidates(evolution: Any, count: int) -> tree.Tree:
    """Members of few architectures, two of which are alike in all."""
    offsets, differ = torch.linspace(-0.8, 0.8, count), ("n_layers", "learning_rate")
    own = {
        name: leaf + offsets.view(-1, *[1] * leaf.dim()) * (name in differ)
        for name, leaf in evolution.space.start.items()
    }
    return tree.map(lambda leaf: torch.cat([leaf, leaf[:1]]), own)


@pytest.mark.parametrize("changes", [{}, {"tuned": ()}, {"equal_compute": True}, {"space": "hyper", "choices": ()}])
def test_a_bucket_trains_its_members_as_if_each_were_alone(changes: dict[str, Any]) -> None:
    task, evolution = made(**changes)
    own = candidates(evolution, 8)
    together = task.placed(task.measure(Candidates({}, {}, own), 0), Candidates({}, {}, own))
    assert together.shape == (9,)
    assert len(together.unique()) > 1
    one, _ = made(**{**changes, "chunk_size": "1"})
    for member in range(9):
        alone = one.measure(Candidates({}, {}, tree.map(lambda leaf, i=member: leaf[i : i + 1], own)), 0)
        torch.testing.assert_close(alone[0], together[member], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("space", ["architecture", "hyper"])
def test_ranks_measure_what_one_process_does_bit_for_bit(space: str) -> None:
    changes = {"space": space, "choices": PARTS if space == "architecture" else ()}
    task, evolution = made(**changes)
    own = Candidates({}, {}, candidates(evolution, 8))
    wanted = task.placed(task.measure(own, 0), own)
    for ranks in (2, 3):
        tasks = [made(rank, ranks, **changes)[0] for rank in range(ranks)]
        parts = [one.measure(own, 0) for one in tasks]
        assert max(map(len, parts)) < 9
        for one in tasks:
            assert torch.equal(one.placed(torch.cat(parts), own), wanted)


def test_equal_compute_is_equal_operations() -> None:
    flags = EvolveFlags(space="architecture", choices=PARTS, equal_compute=True, steps=1000)
    search = trainings.Search({}, GRID)
    first = GRID.able[GRID.start]
    assert evolve_trained.steps_of(flags, search, first, 16) == 1000
    for config in itertools.islice(GRID.able.values(), 10):
        steps = evolve_trained.steps_of(flags, search, config, 16)
        ratio = steps * account.training_flops(config, 16) / (1000 * account.training_flops(first, 16))
        assert ratio == pytest.approx(1, abs=2e-3)
