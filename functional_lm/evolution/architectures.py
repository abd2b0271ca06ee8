"""Choices of configuration as real numbers, so that any strategy over trees searches them. Imports no torch.

    choices = (Choice("d_model", (64, 96, 128)), Choice("n_heads", (2, 4)), Choice("norm", ("rmsnorm", "layernorm")))
    found   = grid(choices, base, most)           every architecture that is possible, and where the search begins
    place   = found.nearest(decoded(choice, numbers, start) for each choice)
    config  = found.able[place]

Numbers are options in an order: one real number, 0 where the search begins, 1 further is the next option. Beyond the
last option the way leads back, so that every number means an option and each is as wide as the others. Words have no
order: each has a number of its own, and the highest is chosen (the one that the search begins at has a lead).

Not every combination is an architecture: heads have to divide the width, and there may be a limit of parameters. One
that is not becomes the nearest that is, counted in options; heads are changed before anything else.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from functional_lm.errors import UsageError
from functional_lm.model import account
from functional_lm.model.config import ModelConfig

FACTOR = "mlp_factor"  # not a field itself: d_ff in widths of the model
FIXED = (
    "vocab_size",
    "max_len",
    "attention",
    "checkpoint_activations",
    "rope_scaling",
)  # of the data, or of the machine
DERIVED = ("n_kv_heads", "head_dim", "d_ff", "initializer_range")
HEADS = ("n_heads", "n_kv_heads", "head_dim")
MOST = 10_000  # combinations that are tried
LEAD = 0.5  # of the word that the search begins at

Place = tuple[int, ...]


class Choice(NamedTuple):
    """A field of the configuration (or `mlp_factor`) and the values that it may have."""

    name: str
    options: tuple[Any, ...]

    @property
    def ordered(self) -> bool:
        return all(isinstance(option, int | float) and not isinstance(option, bool) for option in self.options)

    def shown(self, told: float) -> Any:
        """The option that a number of the records stands for."""
        if not self.ordered:
            return self.options[int(told)]
        return min(self.options, key=lambda option: abs(option - told))

    @property
    def size(self) -> int:
        """How many real numbers stand for it."""
        return 1 if self.ordered else len(self.options)


class Grid(NamedTuple):
    """`able` are the possible architectures by the numbers of their options; `start` is the one nearest to the base."""

    choices: tuple[Choice, ...]
    able: dict[Place, ModelConfig]
    start: Place

    def nearest(self, wanted: Place) -> Place:
        """The possible combination that is fewest options away; the first of equals."""
        if wanted in self.able:
            return wanted
        return min(self.able, key=lambda place: self._distance(wanted, place))

    def _distance(self, one: Place, other: Place) -> int:
        """In options; heads count half."""
        away = 0
        for choice, a, b in zip(self.choices, one, other):
            away += (1 if choice.name in HEADS else 2) * (abs(a - b) if choice.ordered else a != b)
        return away

    def values(self, place: Place) -> dict[str, Any]:
        return {choice.name: choice.options[at] for choice, at in zip(self.choices, place)}

    def missing(self) -> list[tuple[str, Any]]:
        """Options that no possible architecture has."""
        return [
            (choice.name, option)
            for column, choice in enumerate(self.choices)
            for at, option in enumerate(choice.options)
            if all(place[column] != at for place in self.able)
        ]


def decoded(choice: Choice, numbers: Sequence[float], start: int) -> int:
    """The option that real numbers stand for; 0 for what is not finite."""
    if not all(map(math.isfinite, numbers)):
        return 0
    count = len(choice.options)
    if not choice.ordered:
        led = [number + LEAD * (at == start) for at, number in enumerate(numbers)]
        return max(range(count), key=led.__getitem__)
    along = (numbers[0] + start + 0.5) % (2 * count)
    return min(int(along if along < count else 2 * count - along), count - 1)


# What is possible -----------------------------------------------------------------------------------------------------


def grid(choices: Sequence[Choice], base: ModelConfig, most: int | None = None) -> Grid:
    """All combinations of the options that are architectures of at most `most` parameters; the rest is the base's.

    Without choices there is one: the base. Raises UsageError where there is none, or where there are too many to try.
    """
    total = math.prod(len(choice.options) for choice in choices)
    if total > MOST:
        raise UsageError(f"--choices make {total} architectures; {MOST} are the most: leave some out")
    rest, able, why, least = open_fields(base), {}, "", math.inf
    for place in itertools.product(*(range(len(choice.options)) for choice in choices)):
        values = {choice.name: choice.options[at] for choice, at in zip(choices, place)}
        try:
            config = configured(base, rest, values)
        except UsageError as error:
            why = why or f"{error}"
            continue
        size = account.parameters(config)
        least = min(least, size)
        if most is None or size <= most:
            able[place] = config
    if not able and least == math.inf:
        raise UsageError(f"no architecture of --choices is possible: {why}")
    if not able:
        raise UsageError(
            f"the smallest architecture of --choices has {least} parameters, more than --max_parameters {most}"
        )
    found = Grid(tuple(choices), able, ())
    return found._replace(start=found.nearest(tuple(closest(choice, base, rest) for choice in choices)))


def open_fields(base: ModelConfig) -> dict[str, Any]:
    """The fields of the base as they would be given: 0 for those that follow from others, so that they follow again."""
    values = base.to_json()
    for name in DERIVED:
        if getattr(ModelConfig(**{**base.to_json(), name: 0}), name) == values[name]:
            values[name] = 0
    return values


def configured(base: ModelConfig, rest: dict[str, Any], values: dict[str, Any]) -> ModelConfig:
    """The architecture of some values. A feed-forward width of the base's own keeps its share of the width.

    Raises UsageError for one that is not possible.
    """
    given = {name: value for name, value in values.items() if name != FACTOR}
    width = given.get("d_model", base.d_model)
    factor = values.get(FACTOR, base.d_ff / base.d_model if rest["d_ff"] else 0)
    if factor and "d_ff" not in given:
        given["d_ff"] = max(1, round(factor * width))
    return ModelConfig(**{**rest, **given})


def closest(choice: Choice, base: ModelConfig, rest: dict[str, Any]) -> int:
    """The option that is nearest to what the base has; of words that are none of its own the first."""
    if rest.get(choice.name) == 0 and 0 in choice.options:
        return choice.options.index(0)
    value = base.d_ff / base.d_model if choice.name == FACTOR else getattr(base, choice.name)
    if choice.ordered:
        return min(range(len(choice.options)), key=lambda at: abs(choice.options[at] - value))
    return choice.options.index(value) if value in choice.options else 0
