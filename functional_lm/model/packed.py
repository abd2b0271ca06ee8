"""Quantised matrices as leaves: how numbers are put on a grid, stored, read back and multiplied with.

Instead of `weight [out, in]` a subtree holds

- int8, one grid a row: `qweight` int8 [out, in] in -127..127, `scales` float32 [out]; weight = qweight scales;
- int4, one grid a group of g inputs: `qweight` uint8 [out, in/2] (two to a byte, the even input in the lower half),
  `scales` bfloat16 [out, in/g], `zeros` uint8 [out, in/g]; weight = (q - zeros) scales, q in 0..15.

Scales are bfloat16 numbers, rounded upwards, in whatever dtype: so a cast to bfloat16 for a kernel changes nothing, and
no weight lies further than half a step from its grid. These leaves can be differentiated through. `for_decoding` turns
them into those of a kernel (`packed`), which cannot.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor

from functional_lm.model.norm import wide
from functional_lm.tree import Tree

LEAVES = frozenset(("qweight", "scales", "zeros"))
RANGE = {8: (-127, 127), 4: (0, 15)}
# Up to so many rows the CPU's kernel is faster than to write the int8 weights out in bfloat16 and multiply (measured).
FEW = 16
KERNEL_GROUPS = (32, 64, 128, 256)
KERNEL_INPUTS = 32  # the int8 kernel reads rows in such strides, beyond their end where they do not fit


# Numbers and grids ------------------------------------------------------------------------------------------------


def grid(weight: Float[Tensor, "... g"], bits: int) -> tuple[Float[Tensor, "..."], Integer[Tensor, "..."]]:
    """The scale and the zero point of the finest grid that covers each row; a row of zeros has scale 1.

    int8 grids are symmetric. int4 grids are not; 0 stands on them all, so that no weight is clipped by more than half
    a step.
    """
    w, (lowest, highest) = wide(weight), RANGE[bits]
    if bits == 8:
        scale = w.abs().amax(-1) / highest
        low = torch.zeros_like(scale)
    else:
        low = w.amin(-1).clamp(max=0)
        scale = (w.amax(-1).clamp(min=0) - low) / (highest - lowest)
    scale = _rounded_up(scale)
    scale = torch.where(scale == 0, 1.0, scale)
    return scale, (-low / scale).round().to(torch.uint8)


def snap(
    weight: Float[Tensor, "*n"], scale: Float[Tensor, "*#n"], zero: Integer[Tensor, "*#n"], bits: int
) -> Float[Tensor, "*n"]:
    """The place on the grid that is nearest to each weight, a whole number within RANGE."""
    lowest, highest = RANGE[bits]
    return ((wide(weight) / scale).round() + zero).clamp(lowest, highest)


def _rounded_up(x: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """The next bfloat16 number that is not less than x, for x not negative."""
    bits = x.float().contiguous().view(torch.int32)
    return ((bits + 0xFFFF) & ~0xFFFF).view(torch.float32).to(x.dtype)


def assemble(
    places: Float[Tensor, "out in"],
    scales: Float[Tensor, "out groups"],
    zeros: Integer[Tensor, "out groups"],
    bits: int,
) -> Tree:
    """The leaves of a matrix whose places on its n grids a row are known; int8 has one."""
    if bits == 8:
        return {"qweight": places.to(torch.int8), "scales": scales[..., 0].float()}
    whole = places.to(torch.uint8)
    both = whole[..., 0::2] | (whole[..., 1::2] << 4)
    return {"qweight": both, "scales": scales.to(torch.bfloat16), "zeros": zeros.to(torch.uint8)}


def nearest(weight: Float[Tensor, "out in"], bits: int, group_size: int) -> Tree:
    """The leaves of a matrix, each weight rounded to the nearest place on its grid. `group_size` is that of int4."""
    groups = weight.unflatten(-1, (-1, group_size if bits == 4 else weight.shape[-1]))
    scales, zeros = grid(groups, bits)
    places = snap(groups, scales[..., None], zeros[..., None], bits)
    return assemble(places.flatten(-2), scales, zeros, bits)


def dequantize(params: Tree, dtype: torch.dtype = torch.float32) -> Float[Tensor, "out in"]:
    """The matrix that quantised leaves stand for, computed in float32."""
    packed, scales = params["qweight"], params["scales"].float()
    if packed.dtype == torch.int8:
        return (packed.float() * scales[..., None]).to(dtype)
    places = torch.stack([packed & 15, packed >> 4], -1).flatten(-2).float()
    groups = places.unflatten(-1, (scales.shape[-1], -1)) - params["zeros"].float()[..., None]
    return (groups * scales[..., None]).flatten(-2).to(dtype)


def described(params: Tree) -> Float[Tensor, "out in"]:
    """The shape of a matrix as a tensor without storage."""
    return torch.empty(shape(params), device="meta")


# Products ---------------------------------------------------------------------------------------------------------


def is_quantized(params: Tree) -> bool:
    """Whether a subtree is a quantised matrix, in whatever form."""
    return "qweight" in params or "packed" in params


def shape(params: Tree) -> tuple[int, int]:
    """`(out, in)` of a matrix, quantised (as stored) or not."""
    leaf = params["weight"] if "weight" in params else params["qweight"]
    return leaf.shape[-2], leaf.shape[-1] * (2 if leaf.dtype == torch.uint8 else 1)


def product(params: Tree, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
    """x Wᵀ of a quantised W, in x's dtype."""
    if "grids" in params:
        return _int4_kernel(params["packed"], params["grids"].to(x.dtype), x)
    scales = params["scales"].to(x.dtype)
    if "packed" in params and x.numel() <= FEW * x.shape[-1]:
        rows = torch.ops.aten._weight_int8pack_mm(x.reshape(-1, x.shape[-1]), params["packed"], scales)
        return rows.view(*x.shape[:-1], -1)
    whole = params["packed"] if "packed" in params else params["qweight"]
    if whole.dtype == torch.int8:  # whole numbers up to 127 are exact in every dtype
        return F.linear(x, whole.to(x.dtype)) * scales
    return F.linear(x, dequantize(params, x.dtype))


def rows(params: Tree, index: Integer[Tensor, "..."]) -> Float[Tensor, "... in"]:
    """Rows of an int8 matrix, in the dtype of its scales: an embedding."""
    whole = params["packed"] if "packed" in params else params["qweight"]
    return whole[index].to(params["scales"].dtype) * params["scales"][index][..., None]


def _int4_kernel(
    packed: Integer[Tensor, "out half"], grids: Float[Tensor, "groups out 2"], x: Float[Tensor, "... in"]
) -> Float[Tensor, "... out"]:
    group_size = x.shape[-1] // grids.shape[0]
    flat = x.reshape(-1, x.shape[-1])
    result: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, packed, group_size, grids)
    return result.view(*x.shape[:-1], -1)


def for_decoding(params: Tree, dtype: torch.dtype) -> Tree:
    """The leaves that the device's kernels for few rows want; as they are where there are none.

    On the CPU in bfloat16: int8 is multiplied as it is stored, int4 in an order of the kernel's own with
    `grids` [in/g, out, 2] of scales and shifts. In float32 those kernels are many times slower than the plain product.
    """
    if "qweight" not in params or params["qweight"].device.type != "cpu" or dtype != torch.bfloat16:
        return params
    if shape(params)[1] % KERNEL_INPUTS:
        return params
    rest = {name: leaf for name, leaf in params.items() if name not in LEAVES}
    scales = params["scales"].to(dtype)
    if params["qweight"].dtype == torch.int8:
        return {**rest, "packed": params["qweight"], "scales": scales}
    (outputs, inputs), groups = shape(params), params["scales"].shape[-1]
    if outputs % 64 or inputs // groups not in KERNEL_GROUPS:
        return params
    both = params["qweight"]
    places = torch.stack([both & 15, both >> 4], -1).flatten(-2).int()
    shifts = (8 - params["zeros"].float()) * params["scales"].float()  # the kernel's grid is (q - 8) scale + shift
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(places, 1)
    return {**rest, "packed": packed, "grids": torch.stack([scales.mT, shifts.to(dtype).mT], -1).contiguous()}
