"""Writes tests/data/jax_random.json: what jax.random draws, for tests/test_keys.py to compare with.

Needs JAX, which the package itself never does: `python -m pip install "jax[cpu]"; python tools/jax_table.py`.
A case names a function of functional_lm.keys with its arguments, and holds JAX's answer as integers (a float by its
bits, a 32-bit word as int32), or the SHA-256 of its little-endian bytes where it is long.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.extend.random
import jax.numpy as jnp
import numpy as np

Case = dict[str, Any]

SEEDS = (0, 1, 42, 123456789, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40 + 5, 2**63 - 1, -1, -5, -(2**31), -(2**63))
SHAPES = ((), (0,), (1,), (2,), (5,), (7, 3), (2, 3, 4), (3, 0, 2), (1, 1, 1, 9))
LONG = 200_003  # several blocks of an eager draw


def key(seed: int) -> jax.Array:
    """The key of a 64-bit seed, whether or not x64 is enabled."""
    return jax.random.wrap_key_data(np.array([(seed >> 32) & 0xFFFFFFFF, seed & 0xFFFFFFFF], np.uint32))


def answer(case: Case) -> np.ndarray:
    """What JAX draws for a case."""
    draw, seed = case["draw"], case["seed"]
    arguments = {name: value for name, value in case.items() if name not in ("draw", "seed")}
    if draw == "key":
        return np.asarray(jax.random.key_data(jax.random.key(seed)))
    if draw == "threefry":
        words = np.array([arguments["x0"], arguments["x1"]], np.int64).astype(np.uint32)
        return np.asarray(jax.extend.random.threefry_2x32(jax.random.key_data(key(seed)), words))
    if draw in ("split", "fold_in"):
        return np.asarray(jax.random.key_data(getattr(jax.random, draw)(key(seed), *arguments.values())))
    if draw == "permutation":
        x = arguments["x"]
        return np.asarray(jax.random.permutation(key(seed), x if isinstance(x, int) else rows(x)))
    if "logits" in arguments:
        logits = arguments.pop("logits")
        arguments["logits"] = jax.random.uniform(key(1), logits["shape"], logits["dtype"], -4.0, 4.0)
        arguments["axis"] = arguments.pop("dim", -1)
    if draw == "bernoulli":
        arguments["p"] = jnp.asarray(arguments["p"], arguments.pop("dtype", "float32"))
    if draw == "bits":
        arguments["dtype"] = "u" + arguments["dtype"]
    names = ("lower", "upper") if draw == "truncated_normal" else ("minval", "maxval")
    for ours, theirs in zip(("low", "high"), names):
        if ours in arguments:
            bound = arguments.pop(ours)
            arguments[theirs] = np.uint64(bound) if bound == 2**63 else bound
    return np.asarray(getattr(jax.random, draw)(key(seed), **arguments))


def rows(shape: list[int]) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.int32).reshape(shape)


def record(case: Case, values: np.ndarray) -> Case:
    """The answer as integers, or their digest."""
    if values.dtype == bool:
        integers = values.astype(np.uint8)
    elif case["draw"] in ("permutation", "categorical") and not isinstance(case.get("x"), list):
        integers = values.astype(np.int64)  # indices
    else:
        integers = values.view(f"int{8 * values.dtype.itemsize}")
    if values.size <= 64:
        return {"shape_out": list(values.shape), "values": integers.ravel().tolist()}
    digest = hashlib.sha256(integers.astype(integers.dtype.newbyteorder("<")).tobytes()).hexdigest()
    return {"shape_out": list(values.shape), "head": integers.ravel()[:4].tolist(), "sha256": digest}


def derivations() -> Iterator[Case]:
    for seed in SEEDS:
        yield {"draw": "key", "seed": seed}
        yield {"draw": "split", "seed": seed, "num": 2}
    for x0, x1 in ((0, 0), (0, 2**31), (1, 5), (2**32 - 1, 2**32 - 1), (3, 2**32 - 2)):
        yield {"draw": "threefry", "seed": 2**35 + 11, "x0": x0, "x1": x1}
    for num in (0, 1, 5, 1000):
        yield {"draw": "split", "seed": 7, "num": num}
    for data in (0, 1, 2, 1000, 2**31 - 1, 2**31, 2**32 - 1):
        yield {"draw": "fold_in", "seed": 7, "data": data}


def exact(wide: bool) -> Iterator[Case]:
    """The draws that are equal bit for bit; `wide`: those that need x64."""
    integer, floats = ("int64", ["float64"]) if wide else ("int32", ["float32", "bfloat16", "float16"])
    for seed, shape in enumerate((*SHAPES, (LONG,), (300, 700))):
        yield {"draw": "bits", "seed": seed, "shape": shape, "dtype": integer}
        for dtype in floats:
            yield {"draw": "uniform", "seed": seed, "shape": shape, "dtype": dtype}
    for seed in SEEDS:
        yield {"draw": "bits", "seed": seed, "shape": (3,), "dtype": integer}
    ranges = ((-1.0, 1.0), (0.0, 3.0), (-0.1, 0.7), (5.0, 6.3), (-3.3, 1e-3), (100.0, 100.1), (2.0, -1.0), (1e-6, 2e-6))
    for dtype in ("float64",) if wide else ("float32",):
        for seed, (low, high) in enumerate(ranges):
            yield {"draw": "uniform", "seed": seed, "shape": (6,), "dtype": dtype, "low": low, "high": high}
            yield {"draw": "uniform", "seed": seed, "shape": (LONG,), "dtype": dtype, "low": low, "high": high}
    for dtype in floats:
        for seed, p in enumerate((0.0, 1.0, 0.5, 0.1, 0.9, 1e-3)):
            yield {"draw": "bernoulli", "seed": seed, "p": p, "shape": (37,), "dtype": dtype}
            yield {"draw": "bernoulli", "seed": seed, "p": p, "shape": (100, 70), "dtype": dtype}
    yield from integers(wide)


def integers(wide: bool) -> Iterator[Case]:
    spans: dict[str, tuple[tuple[int, int], ...]] = {
        "int8": ((0, 10), (-128, 128), (-5, 6), (0, 1000)),
        "uint8": ((0, 256), (3, 200), (0, 1)),
        "int16": ((-32768, 32768), (-100, 20000)),
        "int32": (
            *((0, 1), (0, 2), (0, 10), (-7, 9), (5, 5), (5, -5), (0, 65536), (0, 65537), (0, 50257), (0, 10**9)),
            *((-(2**31), 2**31 - 1), (-(2**31), 0), (0, 2**31 - 1), (-1, 2**31 - 1), (-(2**31) + 1, 2**31 - 1)),
        ),
    }
    spans_wide: dict[str, tuple[tuple[int, int], ...]] = {
        "int32": ((-(2**31), 2**31), (0, 2**31), (2**31 - 2, 2**31), (-(2**40), 2**40), (2**31 - 1, 2**31)),
        "int64": (
            *((0, 1), (0, 10), (-7, 9), (5, -5), (0, 2**32), (0, 2**32 + 1), (0, 10**15), (-(2**62), 2**62 + 1)),
            *((-(2**63), 2**63 - 1), (-(2**63), 2**63), (-(2**63) + 1, 3), (-(2**63), 1), (2**63 - 2, 2**63 - 1)),
        ),
    }
    for dtype, pairs in (spans_wide if wide else spans).items():
        for seed, (low, high) in enumerate(pairs):
            for drawn in ((5,), (40, 60)):
                yield {"draw": "randint", "seed": seed, "shape": drawn, "low": low, "high": high, "dtype": dtype}
        for shape in SHAPES:
            yield {"draw": "randint", "seed": 3, "shape": shape, "low": -3, "high": 100, "dtype": dtype}


def permutations() -> Iterator[Case]:
    for seed, size in enumerate((0, 1, 2, 3, 10, 64, 1624, 1625, 1626, 5000, LONG)):
        yield {"draw": "permutation", "seed": seed, "x": size}
    for seed, shape in enumerate(([6], [5, 3], [4, 2, 3], [1, 4])):
        yield {"draw": "permutation", "seed": seed, "x": shape}
    yield {"draw": "permutation", "seed": 9, "x": 2_700_000}  # three rounds


def inexact(wide: bool) -> Iterator[Case]:
    """The draws that agree within a few ulp."""
    floats = ["float64"] if wide else ["float32", "bfloat16", "float16"]
    for dtype in floats:
        for seed, shape in enumerate((*SHAPES, (64,))):
            yield {"draw": "normal", "seed": seed, "shape": shape, "dtype": dtype}
        if dtype in ("float32", "float64"):
            for shape in SHAPES:
                yield {"draw": "gumbel", "seed": 5, "shape": shape, "dtype": dtype}
            yield {"draw": "gumbel", "seed": 6, "shape": (64,), "dtype": dtype}
            for seed, (low, high) in enumerate(
                ((-2.0, 2.0), (-3.0, 3.0), (0.5, 1.0), (-8.0, -1.0), (-0.1, 6.0), (1, 1))
            ):
                yield {
                    "draw": "truncated_normal",
                    "seed": seed,
                    "low": low,
                    "high": high,
                    "shape": (32,),
                    "dtype": dtype,
                }
            logits: tuple[tuple[tuple[int, ...], dict[str, Any]], ...] = (
                ((10,), {}),
                ((4, 7), {}),
                ((4, 7), {"dim": 0}),
                ((3, 4, 7), {"dim": 1}),
                ((7,), {"shape": (6,)}),
                ((4, 7), {"shape": (2, 3, 4)}),
                ((3, 4, 7), {"dim": 1, "shape": (5, 3, 7)}),
                ((64, 1000), {}),
            )
            for seed, (size, more) in enumerate(logits):
                yield {"draw": "categorical", "seed": seed, "logits": {"shape": size, "dtype": dtype}, **more}


def table() -> list[Case]:
    cases = []
    for wide, draws in (
        (True, [derivations()]),
        (False, [exact(False), permutations(), inexact(False)]),
        (True, [exact(True), inexact(True)]),
    ):
        jax.config.update("jax_enable_x64", wide)
        cases += [{**case, **record(case, answer(dict(case)))} for group in draws for case in group]
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "tests" / "data" / "jax_random.json")
    out = parser.parse_args().out
    assert jax.config.jax_threefry_partitionable
    header = {
        "source": f"jax {jax.__version__} on {jax.default_backend()}, jax_threefry_partitionable=True",
        "command": "python tools/jax_table.py",
    }
    lines = ",\n".join(json.dumps(case, separators=(",", ":")) for case in table())
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(header)[:-1] + f', "cases": [\n{lines}\n]}}\n', encoding="utf-8")
    print(f"{out}: {out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
