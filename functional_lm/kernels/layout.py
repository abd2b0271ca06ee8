"""Matrices in the order in which the kernels read them: blocks of 32 outputs, the numbers of a pair of inputs together.

    blocks[n, i, o, j] = W[32 n + o, p i + j]        [N, in/p, 32, p], p = 2, and 1 in float32

`laid_out` puts them in the places of a tree's matrices: instead of `weight` (or of the whole numbers of an int8 matrix)
there are `blocks`, and `outputs [out, 0]`, which says how many outputs the last block does not exceed. They lie side by
side in one piece of memory, in pages of 2 MiB where the system has such: small ones are what reading stumbles over.

An adapter (or a member's noise) is `thin_A [R, in]`, `thin_B [out, R]` with `thin`: as it is, under other names.

Axes: N blocks.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from functional_lm import tree
from functional_lm.tree import Tree

BLOCKS, OUTPUTS = "blocks", "outputs"
THIN = ("thin_A", "thin_B")
BLOCK = 32
LINE, PAGE = 64, 1 << 21  # bytes
# What a projection's matrix is called, the one that products read first, and of what numbers it may be.
KINDS = {"packed": (torch.int8,), "qweight": (torch.int8,), "weight": (torch.float32, torch.bfloat16)}


def in_blocks(weight: Tensor) -> Tensor:
    """[out, in] as [N, in/p, 32, p]; outputs that are missing from the last block are zeros."""
    pair = _pair(weight.dtype)
    padded = F.pad(weight, (0, 0, 0, -weight.shape[0] % BLOCK))
    return padded.view(-1, BLOCK, weight.shape[1] // pair, pair).transpose(1, 2)


def whole(blocks: Tensor, outputs: int) -> Tensor:
    """The matrix [out, in] again, a copy."""
    return blocks.transpose(1, 2).reshape(-1, blocks.shape[1] * blocks.shape[3])[:outputs]


def rows(params: Tree, index: Int[Tensor, "..."]) -> Tensor:
    """Rows of a matrix in blocks, an embedding: [..., in], of an int8 one in the dtype of the scales."""
    found = params[BLOCKS][index // BLOCK, :, index % BLOCK].flatten(-2)
    return found * params["scales"][index][..., None] if "scales" in params else found


def laid_out(params: Tree) -> Tree:
    """The tree with every matrix that the kernels can multiply with in blocks; what they cannot stays as it is."""
    flat = tree.flatten(params)
    matrices = {name: leaf for name, leaf in flat.items() if _served(name, leaf, flat)}
    sizes = [math.ceil(_numbers(leaf) * leaf.element_size() / LINE) * LINE for leaf in matrices.values()]
    pieces = allocated(sum(sizes)).split(sizes)
    made = {name: leaf for name, leaf in flat.items() if name not in matrices}
    for (name, matrix), piece in zip(matrices.items(), pieces, strict=True):
        outputs, path = matrix.shape[0], name.rpartition(".")[0]
        made[_joined(path, BLOCKS)] = _placed(piece, matrix)
        made[_joined(path, OUTPUTS)] = torch.empty(outputs, 0)
        if (scales := made.get(_joined(path, "scales"))) is not None:
            made[_joined(path, "scales")] = F.pad(scales, (0, -outputs % BLOCK))
    return tree.unflatten(made)


def thin(params: Tree) -> Tree:
    """The tree with its adapters under the names of `low_rank`.

    Not those with magnitudes, which ask for the sum; nor of rank 1, whose product the compiler makes where it is read.
    """
    flat = tree.flatten(params)
    paths = {name.rpartition(".")[0] for name, leaf in flat.items() if name.endswith(".lora_A") and leaf.shape[-2] > 1}
    served = {path for path in paths if f"{path}.lora_B" in flat and f"{path}.lora_magnitude" not in flat}
    names = {f"{path}.{old}": f"{path}.{new}" for path in served for old, new in zip(("lora_A", "lora_B"), THIN)}
    return tree.unflatten({names.get(name, name): leaf for name, leaf in flat.items()})


def _served(name: str, leaf: Tensor, flat: Mapping[str, Tensor]) -> bool:
    """Whether a leaf is a matrix for the kernels: of its projection the one that products read."""
    path, _, kind = name.rpartition(".")
    read = next((other for other in KINDS if _joined(path, other) in flat), None)
    if kind != read or leaf.dim() != 2 or leaf.device.type != "cpu" or leaf.dtype not in KINDS[kind]:
        return False
    return _joined(path, "grids") not in flat and leaf.numel() > 0 and leaf.shape[1] % _pair(leaf.dtype) == 0


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _placed(piece: Tensor, matrix: Tensor) -> Tensor:
    ordered = in_blocks(matrix)
    place = piece[: _numbers(matrix) * matrix.element_size()].view(matrix.dtype).view(ordered.shape)
    return place.copy_(ordered)


def _numbers(matrix: Tensor) -> int:
    return math.ceil(matrix.shape[0] / BLOCK) * BLOCK * matrix.shape[1]


def _pair(dtype: torch.dtype) -> int:
    return 1 if dtype == torch.float32 else 2


def allocated(size: int) -> Tensor:
    """Bytes that begin at a page of 2 MiB, and lie in such pages where the system has them."""
    if size < PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size + LINE, dtype=torch.uint8)[:size]
    room = mmap.mmap(-1, math.ceil(size / PAGE) * PAGE + PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    room.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(room, dtype=torch.uint8)
    start = -memory.data_ptr() % PAGE
    return memory[start : start + size]
