"""Language models as trees of tensors and pure functions.

    import functional_lm as flm

    params, config, tokenizer = flm.load("runs/train")
    logits = flm.forward(params, tokens, config)

The names below are imported when they are first used, so that `import functional_lm` (and `--help`) costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PLACES = {
    "load": "functional_lm.folder",
    "save": "functional_lm.folder",
    "Model": "functional_lm.folder",
    "ModelConfig": "functional_lm.model.config",
    "preset": "functional_lm.model.config",
    "init": "functional_lm.model.transformer",
    "forward": "functional_lm.model.transformer",
    "forward_cached": "functional_lm.model.transformer",
    "loss": "functional_lm.model.transformer",
    "attach": "functional_lm.model.lora",
    "load_adapter": "functional_lm.interop.peft",
    "compiled": "functional_lm.compile",
}
_ROOMS = ("keys", "tree")

if TYPE_CHECKING:
    from functional_lm import keys, tree
    from functional_lm.compile import compiled
    from functional_lm.folder import Model, load, save
    from functional_lm.interop.peft import load_adapter
    from functional_lm.model.config import ModelConfig, preset
    from functional_lm.model.lora import attach
    from functional_lm.model.transformer import forward, forward_cached, init, loss

__all__ = sorted([*_PLACES, *_ROOMS])


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    if name in _ROOMS:
        return importlib.import_module(f"functional_lm.{name}")
    raise AttributeError(f"module 'functional_lm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
