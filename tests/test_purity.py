"""The package draws from keys alone: no other source of randomness, no module with hidden state, no pickle.

Reads the syntax tree of every file. A name is followed through its import (`import numpy as np`, `from torch import
randn as r`); a method that can only be a tensor's random one is refused whatever it is called on.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "functional_lm"

# Whatever lies below these dotted names.
MODULES = {
    **dict.fromkeys(("random", "secrets", "numpy.random", "torch.random", "torch.distributions"), "random numbers"),
    **dict.fromkeys(("os.urandom", "os.getrandom", "uuid.uuid1", "uuid.uuid4"), "random numbers"),
    **dict.fromkeys(("torch.nn.init", "torch.nn.utils.parametrizations.orthogonal"), "random numbers"),
    **dict.fromkeys(("pickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve"), "pickle"),
    **dict.fromkeys(("torch.load", "torch.serialization.load", "torch.jit.load", "torch.hub"), "pickle"),
    "torch.compiler.load_compiled_function": "pickle",
}
# Anywhere below torch: torch.cuda.manual_seed_all, torch.ops.aten.randn.default, torch.Tensor.bernoulli, ...
TORCH = {
    *("manual_seed", "manual_seed_all", "seed", "seed_all", "initial_seed", "Generator", "default_generator"),
    *("get_rng_state", "set_rng_state", "get_rng_state_all", "set_rng_state_all", "fork_rng"),
    *("rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "normal"),
    *("bernoulli", "multinomial", "poisson", "binomial", "rrelu", "gumbel_softmax", "fractional_max_pool2d"),
    *("dropout", "dropout1d", "dropout2d", "dropout3d", "native_dropout", "alpha_dropout"),
    *("feature_dropout", "feature_alpha_dropout", "Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout"),
    *("FeatureAlphaDropout", "RandomSampler", "SubsetRandomSampler", "WeightedRandomSampler", "random_split"),
}
# On any object: methods of tensors.
METHODS = {
    *("normal_", "uniform_", "bernoulli_", "random_", "exponential_", "geometric_", "cauchy_", "log_normal_"),
    *("bernoulli", "multinomial", "rand_like", "randn_like", "manual_seed"),
}
STATELESS = {"torch.nn.Parameter", "torch.nn.Buffer"}


def impurities(source: str, package: str = "functional_lm") -> list[tuple[int, str]]:
    """(line, what) of everything in `source`, a module of `package`, that is not allowed."""
    tree = ast.parse(source)
    imported: dict[str, set[str]] = defaultdict(set)
    found = set()
    nodes = [(node, getattr(node, "lineno", 0)) for node in ast.walk(tree)]
    for node, line in nodes:
        for dotted, name in imports(node, package):
            imported[name].add(dotted)
            if name == "*" and dotted.split(".")[0] in ("torch", "numpy", "os", "uuid"):
                found.add((line, f"import * of {dotted}"))
            found.update((line, reason) for reason in verdicts(dotted))
    for node, line in nodes:
        found.update((line, reason) for reason in judge(node, imported))
    return sorted(found)


def imports(node: ast.AST, package: str) -> Iterator[tuple[str, str]]:
    """(what it is, what it is called here) for each import of a statement."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield alias.name, alias.asname or alias.name
            if not alias.asname:  # `import a.b` binds a
                yield alias.name.split(".")[0], alias.name.split(".")[0]
    elif isinstance(node, ast.ImportFrom):
        module = ".".join(filter(None, (package if node.level else "", node.module)))
        for alias in node.names:
            yield f"{module}.{alias.name}" if alias.name != "*" else module, alias.asname or alias.name


def resolve(node: ast.AST, imported: dict[str, set[str]]) -> set[str]:
    """The dotted names that an expression may stand for."""
    if isinstance(node, ast.Name):
        return imported.get(node.id, set())
    if isinstance(node, ast.Attribute):
        return {f"{base}.{node.attr}" for base in resolve(node.value, imported)}
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) > 1:
        name = node.args[1]
        if node.func.id == "getattr" and isinstance(name, ast.Constant):
            return {f"{base}.{name.value}" for base in resolve(node.args[0], imported)}
    return set()


def verdicts(dotted: str) -> Iterator[str]:
    for module, reason in MODULES.items():
        if f"{dotted}.".startswith(f"{module}."):
            yield f"{reason}: {dotted}"
    parts = dotted.split(".")
    if parts[0] == "torch" and TORCH.intersection(parts):
        yield f"random numbers: {dotted}"


def judge(node: ast.AST, imported: dict[str, set[str]]) -> Iterator[str]:
    """What is wrong with one node of the tree."""
    names = resolve(node, imported)
    for dotted in names:
        yield from verdicts(dotted)
    if isinstance(node, ast.Attribute) and node.attr in METHODS and not names:
        yield f"random numbers: .{node.attr}"
    if isinstance(node, ast.ClassDef):
        for base in node.bases:
            for dotted in resolve(base, imported):
                if dotted.startswith(("torch.nn.", "lightning.", "pytorch_lightning.")):
                    yield f"a class with hidden state: {node.name}({dotted})"
    if isinstance(node, ast.Call):
        yield from judge_call(node, imported)


def judge_call(node: ast.Call, imported: dict[str, set[str]]) -> Iterator[str]:
    called = resolve(node.func, imported)
    for dotted in called - STATELESS:
        layer = dotted.removeprefix("torch.nn.").removeprefix("modules.")
        if layer != dotted and layer.split(".")[-1][:1].isupper():
            yield f"a module draws its own weights: {dotted}"
    rates = [keyword.value for keyword in node.keywords if keyword.arg == "dropout_p"]
    if any(dotted.endswith(".scaled_dot_product_attention") for dotted in called):
        rates += node.args[4:5]
    if any(not (isinstance(rate, ast.Constant) and rate.value == 0) for rate in rates):
        yield "random numbers: dropout_p"
    if any(keyword.arg == "allow_pickle" and not is_false(keyword.value) for keyword in node.keywords):
        yield "pickle: allow_pickle"
    name = node.func.id if isinstance(node.func, ast.Name) else ""
    if (name == "__import__" or "importlib.import_module" in called) and isinstance(node.args[0], ast.Constant):
        yield from verdicts(str(node.args[0].value))


def is_false(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


# --------------------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize(
    ("done", "where"),
    [
        ("pyplot.subplots(", {"training/record.py"}),
        ("running without compilation, several times slower", {"training_flags.py", "serve.py"}),
        ("stopped(tokens, how.stops)", {"evolution/answers.py"}),
    ],
)
def test_there_is_one_mechanism_each(done: str, where: set[str]) -> None:
    """What was written two and three times before: the frame of a picture, the machine's dtype, a loop of tokens."""
    found = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if done in path.read_text("utf-8")}
    assert found == where


def test_the_package_draws_from_keys_alone() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert PACKAGE / "keys.py" in files
    complaints = []
    for file in files:
        package = ".".join(file.relative_to(PACKAGE.parent).parts[:-1])
        found = impurities(file.read_text("utf-8"), package)
        if file == PACKAGE / "compile_store.py":  # what this user has compiled here, as torch's own cache does
            assert found
            continue
        complaints += [f"{file}:{line}: {what}" for line, what in found]
    assert not complaints, "\n".join(complaints)


IMPURE = r"""
import torch; torch.manual_seed(0)
import torch; torch.cuda.manual_seed_all(0)
import torch; torch.randn(3)
import torch; torch.rand(3)
import torch; torch.randint(0, 2, (3,))
import torch; torch.randperm(3)
import torch; torch.randn_like(x)
import torch; torch.rand_like(x)
import torch; torch.randint_like(x, 3)
import torch; torch.normal(0.0, 1.0, (3,))
import torch; torch.multinomial(p, 1)
import torch; torch.bernoulli(p)
import torch; torch.poisson(p)
import torch; torch.dropout(x, 0.1, True)
import torch; torch.Generator()
import torch; torch.get_rng_state()
import torch; torch.random.fork_rng()
import torch; torch.distributions.Normal(0, 1)
import torch; torch.ops.aten.randn.default([3])
import torch; draw = torch.randn
import torch; draw = getattr(torch, "randn")
import torch as t; t.randn(3)
from torch import randn as r
from torch import *
from torch import random
from torch import Generator
from torch import nn; nn.init.normal_(x)
from torch import nn; nn.Dropout(0.1)
from torch import nn; nn.Linear(3, 3)
import torch.nn as nn; nn.functional.dropout(x, 0.1)
import torch.nn.functional as F; F.dropout(x)
import torch.nn.functional as F; F.gumbel_softmax(x)
from torch.nn import functional as F; F.dropout2d(x)
from torch.nn.functional import dropout as drop
import torch.nn.functional as F; F.scaled_dot_product_attention(q, k, v, dropout_p=0.1)
import torch.nn.functional as F; F.scaled_dot_product_attention(q, k, v, dropout_p=p)
import torch.nn.functional as F; F.scaled_dot_product_attention(q, k, v, None, 0.1)
from torch.nn.functional import scaled_dot_product_attention as sdpa; sdpa(q, k, v, None, rate)
x.normal_()
x.uniform_(-1, 1)
x.bernoulli_(0.5)
x.random_()
x.exponential_()
x.multinomial(1)
x.bernoulli()
model.weight.data.normal_(0, 0.02)
import numpy as np; np.random.rand(3)
import numpy as np; rng = np.random.default_rng()
import numpy.random
import numpy.random as npr
from numpy import random as r
from numpy.random import default_rng
import random
import random as r
from random import choice
import secrets
from secrets import token_hex
import os; os.urandom(8)
from os import urandom
import uuid; uuid.uuid4()
from uuid import uuid4 as unique
import importlib; importlib.import_module("random")
__import__("random")
import torch; torch.load("a.pt")
from torch import load
import pickle
import pickle as p
from pickle import loads
import cloudpickle
import numpy as np; np.load("a.npy", allow_pickle=True)
import torch\nclass A(torch.nn.Module): pass
from torch import nn\nclass A(nn.Module): pass
from torch.nn import Module as M\nclass A(M): pass
from torch import nn\nclass A(nn.Linear): pass
def f():\n    import random
def f():\n    import torch\n    return torch.randn(3)
"""

PURE = r"""
from functional_lm import keys; keys.uniform(key, (3,)); keys.normal(key); keys.bernoulli(key, 0.5, (3,))
from functional_lm import keys; keys.randint(key, (3,), 0, 5); keys.permutation(key, 5); keys.categorical(key, x)
from functional_lm.keys import normal, bernoulli, randint; normal(key); randint(key, (), 0, 2)
from . import keys; keys.bernoulli(key)
from .keys import bernoulli; bernoulli(key)
import functional_lm.keys as keys; keys.bernoulli(key)
import torch; torch.arange(3); torch.Tensor; torch.nn.functional.silu(x); torch.nn.Parameter(x)
import torch; torch.nn.functional.layer_norm(x, (3,)); isinstance(model, torch.nn.Module)
import torch.nn.functional as F; F.scaled_dot_product_attention(q, k, v, dropout_p=0.0)
import torch.nn.functional as F; F.scaled_dot_product_attention(q, k, v, None, 0.0)
import numpy as np; np.load("a.npy"); np.load("a.npy", allow_pickle=False); np.memmap("a.bin")
import json; json.load(file); tree.load(path)
import os; os.replace(a, b)
def dropout(x, key, rate): return x\ndropout(x, key, 0.1)
def normal(key): return key\nrandom = normal(key)
config.dropout; batch.seed; request.seed; state.random
class A: pass
class A(Exception): pass
"""


@pytest.mark.parametrize("source", IMPURE.split("\n")[1:-1])
def test_the_checker_catches(source: str) -> None:
    assert impurities(source.replace("\\n", "\n"))


@pytest.mark.parametrize("source", PURE.split("\n")[1:-1])
def test_the_checker_leaves_alone(source: str) -> None:
    assert not impurities(source.replace("\\n", "\n"))
