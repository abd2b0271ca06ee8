"""Population-based training: who goes on as whom, with what numbers, and that all of it follows from the journal.

Axes: P members.
"""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import SEEDS, token_rows, weights
from torch import Tensor

from functional_lm import compile as compiling
from functional_lm import keys, tree
from functional_lm.compile import compiled
from functional_lm.evolution import hyper
from functional_lm.model.config import ModelConfig
from functional_lm.training import optimizer, schedule, step

CONFIG = ModelConfig(vocab_size=24, d_model=8, n_layers=1, n_heads=2, d_ff=12, max_len=16, dropout=0.1)
NUMBERS = {"learning_rate": 3e-3, "beta1": 0.9}
FUNCTIONS = step.training(CONFIG, optimizer.adamw(), schedule.constant(), numbers=NUMBERS)
HOW = hyper.Settings(5, exploit=0.4)
fitnesses = st.lists(st.floats(-9, 9, width=32) | st.just(math.nan) | st.just(math.inf), min_size=5, max_size=5)


def batch(number: int) -> dict[str, Tensor]:
    rows = token_rows(CONFIG, (2, 7), number)
    return {"tokens": rows[:, :-1].contiguous(), "targets": rows[:, 1:].contiguous()}


@given(st.floats(1e-6, 0.99))
def test_scales_come_back(value: float) -> None:
    for name in NUMBERS:
        there = hyper.outer(name, hyper.inner(name, torch.tensor(value, dtype=torch.float64)))
        assert math.isclose(float(there), value, rel_tol=1e-9)


@given(SEEDS, st.floats(1, 100))
def test_members_begin_within_the_spread(seed: int, spread: float) -> None:
    begun = hyper.beginning(keys.key(seed), NUMBERS, hyper.Settings(64, spread))
    for name, middle in NUMBERS.items():
        away = hyper.inner(name, begun[name].double()) - hyper.inner(name, torch.tensor(middle, dtype=torch.float64))
        assert away.abs().max() <= math.log(spread) + 1e-4
        assert (begun[name] >= 0).all()
        assert spread < 1.5 or len(begun[name].unique()) > 32


@given(SEEDS, fitnesses)
def test_the_worst_go_on_from_the_best(seed: int, values: list[float]) -> None:
    fitness = torch.tensor(values)
    parents, replaced = hyper.selected(keys.key(seed), fitness, HOW)
    finite = [i for i in range(5) if math.isfinite(values[i])]
    if not finite:
        assert not replaced.any()
        assert parents.tolist() == list(range(5))
        return
    best = sorted(finite, key=lambda i: -values[i])[:2]
    assert {values[int(p)] for p in parents[replaced]} <= {values[i] for i in best}
    assert parents[~replaced].tolist() == [i for i in range(5) if not replaced[i]]
    assert not replaced[fitness.nan_to_num(-math.inf, -math.inf, -math.inf).argmax()]
    assert all(replaced[i] for i in range(5) if i not in finite)
    assert int(replaced.sum()) == max(2, 5 - len(finite))


@given(SEEDS, st.lists(fitnesses, min_size=1, max_size=3))
@settings(max_examples=6)
def test_tell_copies_weights_optimizer_and_numbers_and_history_knows(seed: int, given: list[list[float]]) -> None:
    strategy = hyper.pbt(HOW, FUNCTIONS, NUMBERS, lambda key: weights(CONFIG, int(key[0]) % 7))
    train = hyper.steps_of(FUNCTIONS, lambda function: function)
    key, measured = keys.key(seed), [torch.tensor(values) for values in given]
    numbers_of, parents_of = hyper.history(key, [*measured, measured[0]], NUMBERS, HOW)
    state = strategy.init(key, {})
    for generation, fitness in enumerate(measured):
        for name, values in numbers_of[generation].items():
            assert torch.equal(state.states.numbers[name], values)
        trained = state._replace(states=train(state.states, batch, 2 * generation, 2))
        after = strategy.tell(trained, fitness)
        parents = parents_of[generation + 1]
        for name in ("params", "optimizer", "step"):
            was, now = tree.flatten({name: getattr(trained.states, name)}), {name: getattr(after.states, name)}
            assert all(torch.equal(leaf, was[path][parents]) for path, leaf in tree.flatten(now).items())
        assert torch.equal(after.states.key, state.states.key)  # copies drop out on their own
        kept = parents == torch.arange(5)
        for name, values in trained.states.numbers.items():
            assert torch.equal(after.states.numbers[name][kept], values[kept])
        state = after
    member = int(parents_of[-1][4])
    line = hyper.lineage(numbers_of, parents_of, len(measured), 4)
    for name in NUMBERS:
        assert len(line[name]) == len(measured) + 1
        assert line[name][-1] == float(numbers_of[-1][name][4])
        assert line[name][-2] == float(numbers_of[-2][name][member])


def test_new_weights_are_those_that_members_begin_with() -> None:
    def fresh(key: Tensor) -> tree.Tree:
        return weights(CONFIG, int(key[0]) % 1000)

    key = keys.key(3)
    begun = hyper.pbt(HOW, FUNCTIONS, NUMBERS, fresh).init(key, {})
    for count in (1, 5):
        for member, params in enumerate(hyper.newborn(key, fresh, count)):
            assert tree.digest(params) == tree.digest(tree.index(begun.states.params, member))
    assert tree.digest(begun.centre) == tree.digest(hyper.newborn(key, fresh, 1)[0])


@given(SEEDS)
@settings(max_examples=3)
def test_members_train_as_if_each_were_alone(seed: int) -> None:
    """With numbers and dropout of its own, on the batches of all."""
    strategy = hyper.pbt(hyper.Settings(3), FUNCTIONS, NUMBERS)
    state = strategy.init(keys.key(seed), weights(CONFIG, seed))
    together = hyper.steps_of(FUNCTIONS, lambda function: function)(state.states, batch, 4, 3)
    for member, (before, after) in enumerate(zip(tree.unstack(state.states), tree.unstack(together))):
        one = before
        for number in range(4, 7):
            one, _ = FUNCTIONS.train_step(one, batch(number))
        for path, leaf in tree.flatten(one.params).items():
            torch.testing.assert_close(leaf, tree.flatten(after.params)[path], rtol=1e-3, atol=1e-5, msg=f"{member}")


SHAPED = {"learning_rate": 3e-3, "warmup": 0.4, "final_rate": 0.2, "bend": 2.0}


@given(SEEDS)
@settings(max_examples=3)
def test_schedules_of_members_are_those_of_each_alone(seed: int) -> None:
    """Rates that rise and fall otherwise in each member: vmapped = looped, and each is what a run at that rate is."""
    total = 6
    functions = step.training(
        CONFIG, hyper.scheduled(optimizer.adamw()), schedule.constant(), numbers={**SHAPED, "total_steps": total}
    )
    key, params = keys.key(seed), weights(CONFIG, seed)
    own = {name: torch.tensor(value) * torch.tensor([0.5, 1.0, 2.0]) for name, value in SHAPED.items()}
    states = hyper.begun(functions, params, key, own, 3)
    together = hyper.steps_of(functions, lambda function: function)(states, batch, 0, total)
    found = []
    for member in range(3):
        mine = {name: float(values[member]) for name, values in own.items()}
        shape = [torch.tensor(mine[name]) for name in hyper.SCHEDULE]

        def factor(at: Tensor, total: Tensor, shape: list[Tensor] = shape) -> Tensor:
            return schedule.bent(at, total, *shape)

        alone = step.training(CONFIG, optimizer.adamw(), factor, numbers={**mine, "total_steps": total})
        state = alone.init(params, key)
        for number in range(total):
            state, _ = alone.train_step(state, batch(number))
        found.append(state.params)
        for path, leaf in tree.flatten(state.params).items():
            torch.testing.assert_close(tree.flatten(together.params)[path][member], leaf, rtol=1e-3, atol=1e-5)
    assert len({tree.digest(params) for params in found}) == 3


@given(st.integers(1, 40), st.integers(0, 40), st.floats(0, 1))
def test_a_bent_schedule_has_the_known_ones_in_it(total: int, warm: int, last: float) -> None:
    """Constant, warm-up and a line down are numbers of it."""
    warm, length = min(warm, total), torch.tensor(total)
    line = schedule.schedule("linear", warm, last)
    for at in map(torch.tensor, range(total)):
        assert float(schedule.bent(at, length, torch.tensor(0.0), torch.tensor(1.0), torch.tensor(1.0))) == 1.0
        mine = schedule.bent(at, length, torch.tensor(warm / total), torch.tensor(last), torch.tensor(1.0))
        assert float(mine) == pytest.approx(float(line(at, length)), abs=1e-4)


@pytest.mark.parametrize("name", hyper.SHARES)
def test_a_share_stays_below_one(name: str) -> None:
    offset = {name: torch.tensor([[-9.0], [0.0], [9.0]])}
    assert hyper.moved({name: 0.5}, offset)[name].tolist() == pytest.approx([0.5 * math.exp(-9), 0.5, 1.0])
    hyper.check_numbers({name: 1.0})


@pytest.mark.long
def test_generations_are_compiled_once_and_those_of_the_eager_form() -> None:
    """Numbers, weights and parents differ from one to the next; the graph is the first one's."""
    strategy = hyper.pbt(hyper.Settings(3), FUNCTIONS, NUMBERS)
    together, eager = (
        hyper.steps_of(FUNCTIONS, partial(compiled, donate=True, enabled=enabled)) for enabled in (True, False)
    )
    state, counts = strategy.init(keys.key(0), weights(CONFIG, 0)), [compiling.graphs()]
    for generation in range(3):
        found, expected = (train(state.states, batch, 2 * generation, 2) for train in (together, eager))
        counts.append(compiling.graphs())
        for path, leaf in tree.flatten(expected).items():
            torch.testing.assert_close(tree.flatten(found)[path], leaf, rtol=1e-3, atol=1e-4, msg=path)
        state = strategy.tell(state._replace(states=expected), torch.tensor([3.0, 1.0, 2.0]).roll(generation))
    assert counts[0] < counts[1] == counts[2] == counts[3]
