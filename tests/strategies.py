"""Models for hypothesis to choose from: configurations valid by construction, weights large enough to matter.

Sizes are small (L <= 2, D <= 32, V <= 40, T <= 16), so that an eager forward takes a few milliseconds. Fresh weights
(`init`) are so small that attention is nearly uniform and a mistake in it hardly shows; `weights` are not.

Axes: B batch, T time, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from functional_lm import tree
from functional_lm.model.config import CHOICES, ModelConfig
from functional_lm.model.transformer import abstract
from functional_lm.tree import Tree

SEEDS = st.integers(0, 2**31 - 1)
LONGEST = 16


def one_of(name: str) -> st.SearchStrategy[str]:
    """A choice of the field `name`; hypothesis shrinks towards the default one."""
    default = getattr(ModelConfig(), name)
    return st.sampled_from([default, *(choice for choice in CHOICES[name] if choice != default)])


SCALING = st.tuples(
    st.floats(1, 16), st.floats(0.5, 1.5), st.floats(2, 5), st.floats(2, 64)
)  # factor, low, high > low, original length


@st.composite
def configs(draw: st.DrawFn, **fixed: Any) -> ModelConfig:
    """Any architecture; `fixed` fields are given, and those that depend on them follow."""

    def pick(name: str, choices: st.SearchStrategy[Any]) -> Any:
        return fixed[name] if name in fixed else draw(choices, label=name)

    positions = pick("positions", one_of("positions"))
    placement = pick("norm_placement", one_of("norm_placement"))
    kv_heads, groups = draw(st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 2), (1, 3), (3, 1)]), label="K, H/K")
    kv_heads, heads = fixed.get("n_kv_heads", kv_heads), fixed.get("n_heads", kv_heads * groups)
    head_dim = pick("head_dim", st.integers(2, 8))
    even = 2 if positions == "sinusoidal" else 1
    own = draw(st.booleans(), label="head_dim of its own") or "head_dim" in fixed or heads * head_dim % even
    width = pick("d_model", st.integers(1, 16).map(lambda n: 2 * n)) if own else heads * head_dim
    pairs = draw(st.integers(1, head_dim // 2), label="rotated pairs")  # half a dimension more, whatever the rounding
    values: dict[str, Any] = {
        "vocab_size": draw(st.integers(2, 40)),
        "n_layers": draw(st.integers(1, 2)),
        "d_model": width,
        "n_heads": heads,
        "n_kv_heads": kv_heads,
        "head_dim": head_dim if own else 0,
        "d_ff": draw(st.integers(1, 24)),
        "max_len": LONGEST,
        "positions": positions,
        "rope_theta": draw(st.sampled_from([10000.0, 100.0])),
        "rotary_fraction": draw(st.sampled_from([1.0, min(1.0, (2 * pairs + 0.5) / head_dim)])),
        "rope_scaling": draw(st.none() | SCALING),
        "norm": draw(one_of("norm")),
        "norm_placement": placement,
        "norm_eps": draw(st.sampled_from([1e-5, 1e-2])),
        "feed_forward": draw(one_of("feed_forward")),
        "bias": draw(one_of("bias")),
        "qk_norm": draw(st.booleans()),
        "attention": draw(one_of("attention")),
        "sliding_window": draw(st.just(0) | st.integers(1, 6)),
        "parallel_residual": placement == "pre" and draw(st.booleans()),
        "logit_softcap": draw(st.sampled_from([0.0, 3.0])),
        "tie_embeddings": draw(st.booleans()),
    }
    return ModelConfig(**{**values, **fixed})


def numbers(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def weights(config: ModelConfig, seed: int, dtype: torch.dtype = torch.float32) -> Tree:
    """Parameters of which each matters: products that keep the size of what they multiply, scales around 1, biases."""
    shapes = tree.flatten(abstract(config))
    drawn = numbers((sum(leaf.numel() for leaf in shapes.values()),), seed, dtype)

    def scaled(name: str, leaf: Tensor) -> Tensor:
        if leaf.dim() == 1:
            return 0.3 * leaf + (1 if name.endswith("weight") else 0)
        return leaf if "embed" in name else leaf * (1.5 / leaf.shape[-1] ** 0.5)

    parts = drawn.split([leaf.numel() for leaf in shapes.values()])
    return tree.unflatten(
        {name: scaled(name, part.view(leaf.shape)) for (name, leaf), part in zip(shapes.items(), parts)}
    )


def token_rows(config: ModelConfig, shape: tuple[int, ...], seed: int) -> Tensor:
    """Tokens of any shape, int64."""
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def document_rows(rows: int, time: int, seed: int) -> Tensor:
    """[B, T] numbers of packed documents: each row starts with its own and goes on to a new one at random places."""
    new = torch.rand((rows, time), generator=torch.Generator().manual_seed(seed)) < 0.25
    return new.long().cumsum(-1) + 100 * torch.arange(rows)[:, None]


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 3e-5, what: str = "") -> None:
    """Equal up to `tolerance` times the largest number that is expected (at least 1)."""
    assert actual.shape == expected.shape, f"{what} {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    if not expected.numel():
        return
    size = max(1.0, expected.abs().max().item())
    worst = (actual.double() - expected.double()).abs().max().item()
    assert worst <= tolerance * size, f"{what} differs by {worst:.3g} where the largest number is {size:.3g}"


def assert_trees_close(actual: Tree, expected: Tree, tolerance: float = 3e-5) -> None:
    found, wanted = tree.flatten(actual), tree.flatten(expected)
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert_close(found[name], wanted[name], tolerance, name)
