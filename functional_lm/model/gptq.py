"""GPTQ (arXiv 2210.17323): weights rounded one input after another, each rounding's error carried by those to come.

The inputs of each projection are what the layers before it, quantised already, make of calibration text. They are had
without hooks: a block whose output projection is the identity gives what that projection would have been given (and so
breaks the hint of its own output's width, on purpose).

Axes: N calibration rows, T time, D model width, H heads, E head width, F feed-forward width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from functional_lm import tree
from functional_lm.errors import DataError
from functional_lm.model import packed, quantize, transformer
from functional_lm.model.attention import Context, attention
from functional_lm.model.config import ModelConfig
from functional_lm.model.norm import norm
from functional_lm.model.quantize import Plan
from functional_lm.tree import Tree

DAMPING = 0.01  # of the Hessian's mean diagonal, which makes it invertible (section 3.3, step 3)
BLOCK = 128  # inputs whose errors are carried to the rest of the matrix at once
CHUNK = 8  # calibration rows in one forward


def gptq(params: Tree, tokens: Int[Tensor, "N T"], config: ModelConfig, plan: Plan) -> Tree:
    """`quantize.quantize` by GPTQ, calibrated on `tokens`; embedding and output are rounded to the nearest.

    Raises UsageError as that does, and DataError where the calibration gives numbers that are not finite.
    """
    done: dict[str, Tree] = {}

    def chosen(name: str, weight: Tensor, bits: int) -> Tree:
        return done[name] if name in done else packed.nearest(weight, bits, plan.group_size)

    def output(layer: Tree, y: Tensor, context: Context) -> Tensor:
        return transformer.block(layer, y, context, config)[0]

    quantize.quantize(transformer.abstract(config), plan)  # refuses what cannot be, before the work
    layers: Tree = {}
    model = tree.cast(params, torch.float32)["model"]
    x, context = _embedded(model, tokens, config, plan)
    for number, layer in model["layers"].items():
        new, found = _layer(layer, x, context, config, plan, f"model.layers.{number}")
        layers[number], done = new, {**done, **found}
        x = _each(output, new, x, context)
    return quantize.quantize(params, plan, chosen)


def _layer(
    layer: Tree, x: Float[Tensor, "N T D"], context: Context, config: ModelConfig, plan: Plan, prefix: str
) -> tuple[Tree, dict[str, Tree]]:
    """The layer with its projections quantised in the order of their use, and their leaves by name."""
    found: dict[str, Tree] = {}
    for places, inputs in stages(config):
        targets = [
            (part, name)
            for part, name in places
            if name in layer[part] and quantize.bits_of(f"{prefix}.{part}.{name}.weight", plan)
        ]
        if not targets:
            continue
        hessian = _hessian(_each(inputs, layer, x, context))
        for part, name in targets:
            full, old = f"{prefix}.{part}.{name}.weight", layer[part][name]
            bits = quantize.bits_of(full, plan)
            assert bits is not None
            found[full] = rounded(old["weight"], hessian, bits, plan.group_size)
            rest = {leaf: value for leaf, value in old.items() if leaf != "weight"}
            layer = {**layer, part: {**layer[part], name: {**rest, **found[full]}}}
    return layer, found


Inputs = Callable[[Tree, Tensor, Context], Tensor]


def stages(config: ModelConfig) -> Iterator[tuple[list[tuple[str, str]], Inputs]]:
    """The projections of a layer that share an input, in the order of their use, and what that input is."""

    def normed(layer: Tree, name: str, y: Tensor) -> Tensor:
        return norm(layer[name], y, config.norm, config.norm_eps)

    def entering(layer: Tree, x: Tensor, context: Context) -> Tensor:
        return x if config.norm_placement == "post" else normed(layer, "input_layernorm", x)

    def attended(layer: Tree, x: Tensor, context: Context) -> Tensor:
        return attention(layer["self_attn"], entering(layer, x, context), context, config)[0]

    def heads(layer: Tree, x: Tensor, context: Context) -> Tensor:
        inner = {**layer["self_attn"], "o_proj": _identity(config.n_heads * config.head_dim, x)}
        return attended({**layer, "self_attn": inner}, x, context)

    def between(layer: Tree, x: Tensor, context: Context) -> Tensor:
        if config.norm_placement == "post":
            return normed(layer, "input_layernorm", x + attended(layer, x, context))
        after = x if config.parallel_residual else x + attended(layer, x, context)
        return normed(layer, "post_attention_layernorm", after)

    def inside(layer: Tree, x: Tensor, context: Context) -> Tensor:
        mlp = {**layer["mlp"], "down_proj": _identity(config.d_ff, x)}
        return transformer.feed_forward(mlp, between(layer, x, context), config)

    yield [("self_attn", name) for name in ("q_proj", "k_proj", "v_proj")], entering
    yield [("self_attn", "o_proj")], heads
    yield [("mlp", "gate_proj"), ("mlp", "up_proj")], between
    yield [("mlp", "down_proj")], inside


def _identity(size: int, like: Tensor) -> Tree:
    return {"weight": torch.eye(size, dtype=like.dtype, device=like.device)}


def _embedded(
    model: Tree, tokens: Int[Tensor, "N T"], config: ModelConfig, plan: Plan
) -> tuple[Float[Tensor, "N T D"], Context]:
    """The residual stream before the first layer (a model without layers), and what all layers share."""
    bare = {name: child for name, child in model.items() if name not in ("layers", "norm")}
    if plan.embeddings:
        bare["embed_tokens"] = packed.nearest(model["embed_tokens"]["weight"], 8, plan.group_size)
    positions = torch.arange(tokens.shape[-1], device=tokens.device)
    x, _ = transformer.hidden({"model": {**bare, "layers": {}}}, tokens, config)
    return x, transformer.shared(config, positions, tokens.shape[-1], None, cached=False)


def _each(function: Inputs, layer: Tree, x: Float[Tensor, "N T D"], context: Context) -> Float[Tensor, "N T n"]:
    """`function(layer, x, context)`, some rows at a time."""
    with torch.no_grad():
        return torch.cat([function(layer, part, context) for part in x.split(CHUNK)])


def _hessian(inputs: Float[Tensor, "N T in"]) -> Float[Tensor, "in in"]:
    """2 X Xᵀ over all tokens, divided by their number: of the squared error of a projection's output (equation 1)."""
    x = inputs.flatten(0, -2).float()
    if not x.isfinite().all():
        raise DataError("the model's activations on the calibration text are not finite; check the model")
    return 2 / len(x) * (x.mT @ x)


def rounded(weight: Float[Tensor, "out in"], hessian: Float[Tensor, "in in"], bits: int, group_size: int) -> Tree:
    """The quantised leaves of a matrix whose inputs have this Hessian (algorithm 1, with lazy batches).

    A group's grid is that of its weights as the errors before it have left them. An input that is always 0 counts for
    nothing, and its weights become 0.
    """
    work, inputs = weight.float().clone(), weight.shape[-1]
    dead = hessian.diagonal() == 0
    work[:, dead] = 0
    factor = _factor(hessian, dead)
    size = group_size if bits == 4 else inputs
    places = torch.empty_like(work)
    grids = [packed.grid(work, bits)] if bits == 8 else []
    for first in range(0, inputs, BLOCK):
        last = min(first + BLOCK, inputs)
        errors = torch.zeros_like(work[:, first:last])
        for i in range(first, last):
            if bits == 4 and i % size == 0:  # what the block still owes this group is needed for its grid
                group = work[:, i : i + size].clone()
                group[:, max(0, last - i) :] -= errors @ factor[first:last, max(i, last) : i + size]
                grids.append(packed.grid(group, bits))
            scale, zero = grids[-1]
            places[:, i] = packed.snap(work[:, i], scale, zero, bits)
            back = (places[:, i] - zero) * scale
            errors[:, i - first] = (work[:, i] - back) / factor[i, i]
            work[:, i + 1 : last] -= errors[:, i - first, None] * factor[i, i + 1 : last]
        work[:, last:] -= errors @ factor[first:last, last:]
    scales, zeros = (torch.stack(parts, -1) for parts in zip(*grids, strict=True))
    return packed.assemble(places, scales, zeros, bits)


def _factor(hessian: Float[Tensor, "in in"], dead: Tensor) -> Float[Tensor, "in in"]:
    """The upper Cholesky factor of the damped Hessian's inverse, in float64: rows of it carry the errors."""
    wide = hessian.double()
    wide = wide + torch.diag(dead.double() + DAMPING * wide.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(wide))
    return torch.linalg.cholesky(inverse, upper=True).float()
