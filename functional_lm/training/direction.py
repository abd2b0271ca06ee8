"""Directions: transformations that turn gradients into updates of about unit size.

Moments are float32, those of float64 leaves float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from functional_lm import tree
from functional_lm.training.transformation import Numbers, Optimizer
from functional_lm.tree import Tree


def scale_by_adam(eps: float = 1e-8) -> Optimizer:
    """Adam's direction (arXiv 1412.6980, algorithm 1): bias-corrected first moment over root of the second.

    Reads `beta1`, `beta2` and `step` (0 at the first update).
    """

    def init(params: Tree) -> Tree:
        return {"m": tree.map(_zeros, params), "v": tree.map(_zeros, params)}

    def update(updates: Tree, state: Tree, params: Tree, numbers: Numbers) -> tuple[Tree, Tree]:
        beta1, beta2, count = numbers["beta1"], numbers["beta2"], numbers["step"] + 1
        m = tree.map(lambda m, g: m + (1 - beta1) * (g - m), state["m"], updates)
        v = tree.map(lambda v, g: v + (1 - beta2) * (g * g - v), state["v"], updates)
        correct1, correct2 = 1 - beta1**count, 1 - beta2**count
        return tree.map(lambda m, v: (m / correct1) / ((v / correct2).sqrt() + eps), m, v), {"m": m, "v": v}

    return Optimizer(init, update)


def scale_by_lion() -> Optimizer:
    """Lion (arXiv 2302.06675, algorithm 2): the sign of a mixture of gradient and momentum.

    Reads `beta1` (mixture) and `beta2` (momentum).
    """

    def init(params: Tree) -> Tree:
        return {"m": tree.map(_zeros, params)}

    def update(updates: Tree, state: Tree, params: Tree, numbers: Numbers) -> tuple[Tree, Tree]:
        beta1, beta2 = numbers["beta1"], numbers["beta2"]
        signs = tree.map(lambda m, g: torch.sign(beta1 * m + (1 - beta1) * g), state["m"], updates)
        return signs, {"m": tree.map(lambda m, g: beta2 * m + (1 - beta2) * g, state["m"], updates)}

    return Optimizer(init, update)


def scale_by_momentum() -> Optimizer:
    """Heavy-ball momentum as torch.optim.SGD has it: m <- beta1 m + g. Reads `beta1`."""

    def init(params: Tree) -> Tree:
        return {"m": tree.map(_zeros, params)}

    def update(updates: Tree, state: Tree, params: Tree, numbers: Numbers) -> tuple[Tree, Tree]:
        m = tree.map(lambda m, g: numbers["beta1"] * m + g, state["m"], updates)
        return m, {"m": m}

    return Optimizer(init, update)


def scale_by_adafactor(eps: float = 1e-30, threshold: float = 1.0) -> Optimizer:
    """Adafactor (arXiv 1804.04235, algorithms 4 and 5): second moments of a matrix kept as row and column means.

    n + m numbers instead of n m. The decay is 1 - t^-0.8, and an update of root mean square above `threshold` is
    scaled down to it. The learning rate is the schedule's: it is not multiplied by the size of the parameters.
    """

    def init(params: Tree) -> Tree:
        def moments(leaf: Tensor) -> Tree:
            if leaf.dim() < 2:
                return {"v": _zeros(leaf)}
            return {"row": _zeros(leaf[..., 0]), "column": _zeros(leaf[..., 0, :])}

        return tree.unflatten(
            {
                f"{name}.{kind}": value
                for name, leaf in tree.flatten(params).items()
                for kind, value in moments(leaf).items()
            }
        )

    def direction(g: Tensor, state: Tree, keep: Tensor) -> tuple[Tensor, Tree]:
        square = g * g + eps
        if "v" in state:
            state = {"v": _mix(state["v"], square, keep)}
            scaled = g * torch.rsqrt(state["v"])
        else:
            row, column = _mix(state["row"], square.mean(-1), keep), _mix(state["column"], square.mean(-2), keep)
            state = {"row": row, "column": column}
            scaled = g * torch.rsqrt((row / row.mean(-1, keepdim=True))[..., :, None] * column[..., None, :])
        rms = scaled.square().mean().sqrt()
        return scaled / (rms / threshold).clamp(min=1.0), state

    def update(updates: Tree, state: Tree, params: Tree, numbers: Numbers) -> tuple[Tree, Tree]:
        keep = 1 - (numbers["step"] + 1.0) ** -0.8
        made = {name: direction(g, _at(state, name), keep) for name, g in tree.flatten(updates).items()}
        after = {f"{name}.{kind}": value for name, (_, kept) in made.items() for kind, value in kept.items()}
        return tree.map_named(lambda name, _: made[name][0], updates), tree.unflatten(after)

    return Optimizer(init, update)


def _mix(old: Tensor, new: Tensor, keep: Tensor) -> Tensor:
    return new + keep * (old - new)


def _at(node: Tree, name: str) -> Tree:
    for part in name.split("."):
        node = node[part]
    return node


# Muon -----------------------------------------------------------------------------------------------------------------

Quintics = Sequence[tuple[float, float, float]]

# Polar Express (arXiv 2505.16932, algorithm 1): odd polynomials a x + b x³ + c x⁵ that one after the other bring
# singular values from [1e-3, 1] as near to 1 as polynomials of that degree can. Outside the range that each is made for
# they explode, so that all but the last are given room for bfloat16's rounding (p(x / 1.01), as in the paper).
_EXACT: Quintics = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
POLAR_EXPRESS: Quintics = (*((a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in _EXACT[:-1]), _EXACT[-1])


def orthogonalize(x: Tensor, quintics: Quintics = POLAR_EXPRESS) -> Tensor:
    """The nearest semi-orthogonal matrices, U Vᵀ of each [..., n, m], roughly: singular values within some 0.3 of 1.

    Products in bfloat16 and of the smaller side; a batch of equal shapes is one product.
    """
    wide = x if x.shape[-2] <= x.shape[-1] else x.mT
    y = (wide / (wide.square().sum((-2, -1), keepdim=True).sqrt() * 1.01 + 1e-7)).bfloat16()
    for a, b, c in quintics:
        gram = y @ y.mT
        y = a * y + (b * gram + c * (gram @ gram)) @ y
    return (y if wide is x else y.mT).to(x.dtype)


def scale_by_muon(quintics: Quintics = POLAR_EXPRESS) -> Optimizer:
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): Nesterov momentum of a matrix, orthogonalised.

    Times 0.2 √max(n, m), so that an update is as large as AdamW's and both share one learning rate (arXiv 2502.16982,
    eq. 4). Reads `momentum`. Matrices of one shape are orthogonalised together.
    """

    def init(params: Tree) -> Tree:
        return {"m": tree.map(_zeros, params)}

    def update(updates: Tree, state: Tree, params: Tree, numbers: Numbers) -> tuple[Tree, Tree]:
        momentum = numbers["momentum"]
        m = tree.map(lambda m, g: _mix(m, g, momentum), state["m"], updates)
        ahead = tree.map(lambda m, g: _mix(m, g, momentum), m, updates)
        made = _by_shape(lambda x: orthogonalize(x, quintics), ahead)
        return tree.map(lambda u: u * (0.2 * max(u.shape[-2:]) ** 0.5), made), {"m": m}

    return Optimizer(init, update)


def _by_shape(function: Callable[[Tensor], Tensor], leaves: Tree) -> Tree:
    """`function` on each matrix; those of one shape (or its transpose) are stacked into one call."""
    groups: dict[tuple[int, ...], list[tuple[str, Tensor]]] = {}
    for name, leaf in tree.flatten(leaves).items():
        groups.setdefault(tuple(sorted(leaf.shape)), []).append((name, leaf))
    made: dict[str, Tensor] = {}
    for shape, members in groups.items():
        upright = function(torch.stack([leaf if tuple(leaf.shape) == shape else leaf.mT for _, leaf in members]))
        for (name, leaf), value in zip(members, upright.unbind()):
            made[name] = value if tuple(leaf.shape) == shape else value.mT
    return tree.map_named(lambda name, _: made[name], leaves)


def _zeros(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf, dtype=torch.promote_types(leaf.dtype, torch.float32))
