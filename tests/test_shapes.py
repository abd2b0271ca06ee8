"""Every shape hint is true: the model and its generation run, eagerly, with jaxtyping and beartype checking each call.

The hook rewrites modules as they are imported (and torch.compile cannot read what it makes), so that this happens in a
process of its own: this file, run as a program.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from beartype import BeartypeConf, beartype

ROOMS = tuple(f"functional_lm.{room}" for room in ("model", "inference", "keys", "threefry", "arithmetic", "tree"))
PASSED = "every hint held"

# PEP 484's numeric tower, as type checkers read it: an int is a float.
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))


def test_hints_hold() -> None:
    done = subprocess.run(
        [sys.executable, str(Path(__file__))], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert PASSED in done.stdout


def program() -> None:
    """Calls over all options, drawn by the same strategies as in the other tests."""
    from jaxtyping import TypeCheckError, install_import_hook

    with install_import_hook(ROOMS, "test_shapes.checked"):
        import torch
        from hypothesis import given, settings
        from hypothesis import strategies as st
        from strategies import SEEDS, configs, document_rows, token_rows, weights

        from functional_lm import keys, tree
        from functional_lm.inference import cache as kv
        from functional_lm.inference.generate import GenerateOptions, decoder, generate
        from functional_lm.model import lora, merge, quantize
        from functional_lm.model.compute import compute_copy, decoding_copy
        from functional_lm.model.config import ModelConfig
        from functional_lm.model.positions import restart
        from functional_lm.model.transformer import abstract, forward, forward_cached, init, loss

    @settings(max_examples=25, deadline=None, database=None)
    @given(config=configs(dropout=0.1, max_len=6), seed=SEEDS, batch=st.sampled_from([(), (1,), (2,), (2, 3)]))
    def everywhere(config: ModelConfig, seed: int, batch: tuple[int, ...]) -> None:
        params, tokens = weights(config, seed), token_rows(config, (*batch, 6), seed)
        documents = document_rows(6, 6, seed).flatten()[: tokens.numel()].view(tokens.shape)
        assert tree.size(init(config, keys.key(seed))) == tree.size(params) == tree.size(abstract(config))
        copy = compute_copy(params, torch.bfloat16)
        forward(params, tokens, config, keys.key(seed), documents)
        forward(copy, tokens, config)
        restart(documents)
        rows = {"tokens": tokens, "targets": tokens, "documents": documents}
        torch.func.grad(lambda p: loss(p, rows, config, keys.key(seed))[0])(params)
        at = torch.tensor([0, 1, 4])
        forward_cached(params, kv.init(config, 3, 8, torch.float32), token_rows(config, (3, 2), seed), at, config)
        options = GenerateOptions(9, top_k=seed % 3, seed=seed)
        list(generate(params, [0, 1], decoder(config, False, options.truncates), options))

    @settings(max_examples=10, deadline=None, database=None)
    @given(config=configs(max_len=6), seed=SEEDS, dora=st.booleans())
    def with_adapters(config: ModelConfig, seed: int, dora: bool) -> None:
        params, tokens = weights(config, seed), token_rows(config, (3, 4), seed)
        adapter = lora.init(params, lora.ALL_LINEAR if dora else "*", 2, keys.key(seed), dora=dora)
        forward(lora.attach(params, adapter), tokens, config)
        dropping = lora.keyed(lora.attach(params, lora.with_dropout(adapter, 0.5)), keys.key(1))
        forward(compute_copy(dropping, torch.bfloat16), tokens, config)
        bank = lora.select(lora.stack(params, [adapter]), torch.tensor([0, 1, 0]))
        forward(lora.attach(params, bank), tokens, config)
        forward(lora.merge(params, adapter), tokens, config)

    @settings(max_examples=10, deadline=None, database=None)
    @given(config=configs(max_len=6), seed=SEEDS)
    def merged_and_quantised(config: ModelConfig, seed: int) -> None:
        models, tokens = [weights(config, seed + i) for i in range(3)], token_rows(config, (2, 6), seed)
        w = torch.tensor([0.4, 0.5])
        merge.slerp(models[0], models[1], w)
        merge.linear(models[:2], w)
        merge.task_arithmetic(models[2], models[:2], w)
        merge.ties(models[2], models[:2], {"*": w}, torch.tensor(0.3))
        forward(merge.dare(models[2], models[:2], w, keys.key(seed)), tokens, config)
        plan = quantize.Plan(8)
        eight = quantize.quantize(models[0], plan)
        forward(decoding_copy(eight, torch.bfloat16), tokens, config)
        quantize.dequantize(eight)

    everywhere()
    with_adapters()
    merged_and_quantised()
    config = ModelConfig(64, d_model=64, n_layers=1, n_heads=2, d_ff=64, max_len=6)
    four = quantize.quantize(weights(config, 0), quantize.Plan(4))
    for form in (four, decoding_copy(four, torch.bfloat16)):
        forward(form, torch.zeros(1, 4).long(), config)

    # A check that checks nothing would also pass.
    config = ModelConfig(vocab_size=5, d_model=4, n_layers=1, n_heads=1)
    with pytest.raises(TypeCheckError):
        forward(weights(config, 0), torch.zeros(2, 3), config)
    with pytest.raises(TypeCheckError):
        forward_cached(
            weights(config, 0),
            kv.init(config, 2, 4, torch.float32),
            torch.zeros(2, 1).long(),
            torch.zeros(3).long(),
            config,
        )
    print(PASSED)


if __name__ == "__main__":
    program()
