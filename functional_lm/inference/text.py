"""Generation from text to text: the tokenizer at both ends of `generate`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from functional_lm.inference import generate as tokens
from functional_lm.inference.generate import Decoder, GenerateOptions
from functional_lm.model.config import ModelConfig
from functional_lm.text import tokenizer as tokenizers
from functional_lm.text.tokenizer import Tokenizer
from functional_lm.tree import Tree


def stream(
    params: Tree, run: Decoder, tokenizer: Tokenizer, prompt: str | list[int], options: GenerateOptions
) -> Iterator[str]:
    """The continuation of a prompt in pieces of whole characters; a stop id ends it and is not part of it.

    An empty prompt is the beginning of a document.
    """
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
    made = tokens.generate(params, ids or [tokenizer.bos_id], run, options)
    return tokenizers.stream(tokenizer, (token for token in made if token not in options.stop_ids))


def generate(
    params: Tree, config: ModelConfig, tokenizer: Tokenizer, prompt: str = "", compile: bool = False, **options: Any
) -> str:
    """`prompt` and its continuation; `options` are those of `GenerateOptions` (max_tokens, temperature, seed, ...).

    It ends where the model ends its document. For many prompts make a `decoder` once and call `stream`.
    """
    how = GenerateOptions(**{"stop_ids": (tokenizer.eos_id,), **options})
    run = tokens.decoder(config, compile, truncating=how.truncates)
    return prompt + "".join(stream(params, run, tokenizer, prompt, how))
