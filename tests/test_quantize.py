"""Quantised trees: how far a weight may move, that every form of a product computes the same, and what GPTQ gains."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import SEEDS, assert_close, configs, numbers, token_rows, weights

from functional_lm import folder, keys, tree
from functional_lm.__main__ import COMMANDS
from functional_lm.cli import main
from functional_lm.compile import compiled
from functional_lm.errors import DataError, UsageError
from functional_lm.inference.generate import GenerateOptions, decoder, generate
from functional_lm.model import gptq, lora, packed, quantize, transformer
from functional_lm.model.compute import compute_copy, decoding_copy
from functional_lm.model.config import ModelConfig
from functional_lm.model.linear import embed, linear, unembed
from functional_lm.model.quantize import Plan
from functional_lm.model.transformer import abstract, forward, init
from functional_lm.text import tokenizer as tokenizers
from functional_lm.tree import Tree

BITS = st.sampled_from([8, 4])


@st.composite
def quantizable(draw: st.DrawFn, **fixed: Any) -> tuple[ModelConfig, Plan]:
    """Architectures whose widths groups of two divide."""
    config = draw(configs(**fixed))
    config = dataclasses.replace(config, d_ff=2 * config.d_ff, d_model=config.d_model + config.d_model % 2)
    assume(config.n_heads * config.head_dim % 2 == 0)
    return config, Plan(draw(BITS), 2, embeddings=draw(st.booleans()))


# Numbers ------------------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    seed=SEEDS,
    bits=BITS,
    rows=st.integers(1, 5),
    groups=st.integers(1, 4),
    half=st.integers(1, 9),
    size=st.sampled_from([1e-30, 1e-3, 1.0, 1e30]),
    shift=st.sampled_from([0.0, 1.0, -5.0]),
)
def test_no_weight_moves_further_than_half_a_step(
    seed: int, bits: int, rows: int, groups: int, half: int, size: float, shift: float
) -> None:
    weight = size * (numbers((rows, 2 * half * groups), seed) + shift)
    leaves = packed.nearest(weight, bits, 2 * half)
    back = packed.dequantize(leaves)
    step = leaves["scales"].double()[..., None]
    error = (back.double() - weight.double()).unflatten(-1, (groups if bits == 4 else 1, -1)).abs()
    assert (error <= (step if bits == 4 else step[:, None]) * (0.5 + 1e-5)).all()
    assert packed.shape(leaves) == weight.shape
    # The grid is no coarser than its range asks for, but for the rounding of the scale to bfloat16.
    if bits == 8:
        assert (leaves["scales"] <= weight.abs().amax(-1) / 127 * (1 + 2**-7)).all()
    assert torch.equal(leaves["scales"].to(torch.bfloat16).float(), leaves["scales"].float())


@settings(max_examples=40)
@given(seed=SEEDS, bits=BITS, rows=st.integers(1, 5), half=st.integers(1, 9))
def test_what_stands_on_a_grid_comes_back_exactly(seed: int, bits: int, rows: int, half: int) -> None:
    """Grids that are used from end to end: a row of which no place is taken may get a finer one."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.randint(0, 16 if bits == 4 else 255, (rows, 2 * half), generator=generator).float()
    places[:, 0], places[:, -1] = 0, 15 if bits == 4 else 254
    zeros = torch.randint(0, 16, (rows, 1), generator=generator).to(torch.uint8)
    scales = numbers((rows, 1), seed).abs().add(0.01).to(torch.bfloat16).float()
    leaves = packed.assemble(places - (0 if bits == 4 else 127), scales, zeros, bits)
    weight = packed.dequantize(leaves)
    again = packed.nearest(weight, bits, 2 * half)
    assert torch.equal(packed.dequantize(again), weight)
    assert tree.digest(again) == tree.digest(leaves)


def test_rows_of_zeros_and_of_one_number() -> None:
    for bits in (8, 4):
        for value in (0.0, 0.25, -3.0):
            weight = torch.full((2, 4), value)
            assert_close(packed.dequantize(packed.nearest(weight, bits, 4)), weight, 0.05)
            assert value or not packed.dequantize(packed.nearest(weight, bits, 4)).any()


# Products -------------------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(
    seed=SEEDS,
    bits=BITS,
    count=st.sampled_from([1, 3, packed.FEW, packed.FEW + 1, 40]),
    outputs=st.sampled_from([64, 192]),
    groups=st.sampled_from([(2, 32), (3, 64), (1, 128), (4, 16)]),
)
def test_the_kernel_computes_what_the_reference_does(
    seed: int, bits: int, count: int, outputs: int, groups: tuple[int, int]
) -> None:
    inputs = groups[0] * groups[1]
    x, weight = numbers((2, count, inputs), seed, torch.bfloat16), numbers((outputs, inputs), seed + 1) / inputs**0.5
    leaves = packed.nearest(weight, bits, groups[1])
    exact = x.double() @ packed.dequantize(leaves, torch.float64).mT
    assert_close(packed.product(leaves, x.float()), exact, 1e-5)
    fast = packed.for_decoding(leaves, torch.bfloat16)
    assert ("packed" in fast) == (bits == 8 or groups[1] != 16)
    for form in (leaves, fast):
        y = packed.product(form, x)
        assert y.dtype == x.dtype
        assert_close(y, exact, 2e-2)
    assert packed.for_decoding(leaves, torch.float32) is leaves  # its kernels are the slower ones there


@settings(max_examples=60)
@given(seed=SEEDS, outputs=st.integers(1, 9), inputs=st.integers(1, 100), count=st.integers(1, 3), bits=BITS)
def test_no_kernel_reads_beyond_a_row(seed: int, outputs: int, inputs: int, count: int, bits: int) -> None:
    """torch's int8 kernel does where the inputs fill no stride: such matrices keep the plain product."""
    inputs = inputs if bits == 8 else 2 * inputs
    leaves = packed.nearest(numbers((outputs, inputs), seed), bits, inputs)
    fast = packed.for_decoding(leaves, torch.bfloat16)
    assert ("packed" in fast) <= (inputs % packed.KERNEL_INPUTS == 0)
    x = numbers((count, inputs), seed, torch.bfloat16)
    assert_close(packed.product(fast, x), packed.product(leaves, x.double()), 5e-2)


@settings(max_examples=25)
@given(chosen=quantizable(), seed=SEEDS)
def test_a_quantised_model_is_the_model_of_its_dequantised_weights(chosen: tuple[ModelConfig, Plan], seed: int) -> None:
    config, plan = chosen
    params, tokens = weights(config, seed), token_rows(config, (2, 5), seed)
    quantised = quantize.quantize(params, plan)
    plain = quantize.dequantize(quantised)
    assert tree.flatten(plain).keys() == tree.flatten(params).keys()
    assert list(tree.flatten(quantised)) == list(tree.flatten(tree.unflatten(tree.flatten(quantised))))
    expected = forward(plain, tokens, config)
    assert_close(forward(quantised, tokens, config), expected, 1e-4)
    fused = compute_copy(quantised, torch.float32)
    assert_close(forward(fused, tokens, config), expected, 1e-4)
    assert forward(compute_copy(quantised, torch.bfloat16), tokens, config).dtype == torch.bfloat16
    options = GenerateOptions(4, temperature=0)
    run = decoder(config, False, False)
    assert list(generate(decoding_copy(quantised, torch.float32), [0, 1], run, options)) == list(
        generate(fused, [0, 1], run, options)
    )
    described = quantize.quantize(abstract(config), plan)
    assert {n: (x.shape, x.dtype) for n, x in tree.flatten(described).items()} == {
        n: (x.shape, x.dtype) for n, x in tree.flatten(quantised).items()
    }


def test_decoding_compiles_into_one_graph_and_equals_the_eager_form() -> None:
    config = ModelConfig(96, d_model=64, n_layers=1, n_heads=2, d_ff=128, max_len=64)
    params = quantize.quantize(weights(config, 0), Plan(4, 32))
    copy = decoding_copy(params, torch.bfloat16)
    names = tree.flatten(copy)
    assert "model.layers.0.self_attn.qkv_proj.grids" in names  # 4 bits
    assert "model.embed_tokens.packed" in names  # 8 bits
    tokens = torch.tensor([[5]])
    run = compiled(lambda p: forward(p, tokens, config), backend="aot_eager")
    assert torch.equal(run(copy), forward(copy, tokens, config))


@settings(max_examples=10)
@given(chosen=quantizable(attention="standard"), seed=SEEDS)
def test_an_adapter_on_a_quantised_base_learns(chosen: tuple[ModelConfig, Plan], seed: int) -> None:
    """Its gradient is that on the dequantised base, and reaches adapters below quantised layers."""
    config, plan = chosen
    base = quantize.quantize(weights(config, seed), plan)
    (queries, inner), width = (config.n_heads * config.head_dim, config.d_ff), config.d_model
    parts = {"self_attn.q_proj": (queries, width), "mlp.down_proj": (width, inner)}
    adapter: dict[str, torch.Tensor] = {}
    for layer in range(config.n_layers):
        for number, (part, (outputs, inputs)) in enumerate(parts.items()):
            place = f"model.layers.{layer}.{part}."
            adapter[f"{place}lora_A"] = numbers((2, inputs), seed + number)
            adapter[f"{place}lora_B"] = numbers((outputs, 2), seed + number + 1)
            adapter[f"{place}lora_scale"] = torch.tensor(0.1)
    tokens = token_rows(config, (2, 6), seed)
    batch = {"tokens": tokens, "targets": tokens.roll(-1, -1)}

    def nll(adapter: Tree, base: Tree) -> torch.Tensor:
        return transformer.loss(tree.overlay(base, adapter), batch, config)[0]

    leaves = tree.unflatten(adapter)
    found = torch.func.grad(nll)(leaves, base)
    expected = torch.func.grad(nll)(leaves, quantize.dequantize(base))
    for name, leaf in tree.flatten(found).items():
        assert_close(leaf, tree.flatten(expected)[name], 1e-3, name)
    assert tree.norm(found) > 0


def test_adapters_are_made_for_quantised_bases() -> None:
    """`lora.init` needs their shapes alone; what needs their numbers is refused."""
    config = ModelConfig(20, d_model=8, n_layers=1, n_heads=2, d_ff=12)
    params, tokens = weights(config, 0), token_rows(config, (2, 5), 0)
    base = quantize.quantize(params, Plan(4, 4))
    adapter = lora.init(base, ("all-linear", "embed_tokens"), 2, keys.key(1))
    plain = lora.init(params, ("all-linear", "embed_tokens"), 2, keys.key(1))
    assert tree.digest(adapter) == tree.digest(plain)
    lora.check(base, adapter)
    changed = tree.map_named(lambda name, leaf: leaf + 0.1 if name.endswith("lora_B") else leaf, adapter)
    expected = forward(lora.merge(quantize.dequantize(base), changed), tokens, config)
    assert_close(forward(lora.attach(base, changed), tokens, config), expected, 1e-4)
    copy = decoding_copy(lora.attach(base, changed), torch.float32)
    assert_close(forward(copy, tokens, config), expected, 1e-4)
    with pytest.raises(UsageError, match="is quantised; leave out dora"):
        lora.init(base, "q_proj", 2, keys.key(1), dora=True)
    with pytest.raises(DataError, match="nothing can be merged into it; attach the adapter"):
        lora.merge(base, adapter)


def test_embeddings_with_adapters() -> None:
    table = packed.nearest(numbers((7, 6), 0), 8, 2)
    low_rank = {"lora_A": numbers((2, 7), 1), "lora_B": numbers((6, 2), 2), "lora_scale": torch.tensor(0.5)}
    plain = {"weight": packed.dequantize(table)}
    tokens, x = torch.arange(7), numbers((3, 6), 3)
    assert_close(embed({**table, **low_rank}, tokens), embed({**plain, **low_rank}, tokens))
    assert_close(unembed({**table, **low_rank}, x), unembed({**plain, **low_rank}, x))
    assert_close(linear({**table, "bias": numbers((7,), 4)}, x), linear({**plain, "bias": numbers((7,), 4)}, x))


# GPTQ -----------------------------------------------------------------------------------------------------------------


def gptq_reference(weight: torch.Tensor, hessian: torch.Tensor, bits: int, size: int) -> torch.Tensor:
    """Rounding in order with the exact update of those to come (equations 2 and 3), the inverse shrunk step by step."""
    w, damping = weight.double().clone(), gptq.DAMPING * hessian.double().diagonal().mean()
    rest = hessian.double() + damping * torch.eye(len(hessian)).double()
    result = torch.zeros_like(w)
    for i in range(w.shape[1]):
        if i % size == 0:
            scale, zero = packed.grid(w[:, i : i + size].float() if bits == 4 else weight, bits)
        place = packed.snap(w[:, i].float(), scale, zero, bits)
        result[:, i] = (place.double() - zero.double()) * scale.double()
        inverse = torch.linalg.inv(rest[i:, i:])
        error = (w[:, i] - result[:, i]) / inverse[0, 0]
        w[:, i + 1 :] -= error[:, None] * inverse[0, 1:]
    return result


@settings(max_examples=20)
@given(seed=SEEDS, bits=BITS, rows=st.integers(1, 4), groups=st.sampled_from([(2, 4), (3, 6), (1, 12)]))
def test_gptq_is_the_papers(seed: int, bits: int, rows: int, groups: tuple[int, int]) -> None:
    size = groups[0] * groups[1]
    weight, inputs = numbers((rows, size), seed), numbers((50, size), seed + 1) @ numbers((size, size), seed + 2)
    hessian = gptq._hessian(inputs[None])
    found = packed.dequantize(gptq.rounded(weight, hessian, bits, groups[1])).double()
    expected = gptq_reference(weight, hessian, bits, groups[1] if bits == 4 else size)
    # Where a number lies on the border of two places, another order of sums decides for the other one.
    assert ((found - expected).abs() < 1e-4).double().mean() > 0.7


@pytest.mark.parametrize(("bits", "size"), [(4, 6), (4, 64), (4, 96), (4, 192), (8, 64)])
def test_errors_are_carried_over_blocks(bits: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of inputs are a matter of speed: the result is that of one block."""
    weight, inputs = numbers((8, 384), 0), numbers((500, 384), 1)
    hessian = gptq._hessian((inputs + inputs.roll(1, -1))[None])
    found = packed.dequantize(gptq.rounded(weight, hessian, bits, size))
    monkeypatch.setattr(gptq, "BLOCK", 384)
    whole = packed.dequantize(gptq.rounded(weight, hessian, bits, size))
    assert ((found - whole).abs() < 1e-3).float().mean() > 0.97


def test_gptq_lessens_the_error_of_correlated_inputs_and_is_rounding_without() -> None:
    weight, mixing = numbers((16, 64), 0), numbers((64, 64), 1)
    hessian = gptq._hessian((numbers((1000, 64), 2) @ mixing)[None])
    nearest, by_gptq = packed.nearest(weight, 4, 16), gptq.rounded(weight, hessian, 4, 16)

    def error(leaves: Tree) -> float:
        difference = packed.dequantize(leaves) - weight
        return float(torch.einsum("oi,ij,oj->", difference, hessian, difference))

    assert error(by_gptq) < 0.6 * error(nearest)
    assert tree.digest(gptq.rounded(weight, torch.eye(64), 4, 16)) == tree.digest(nearest)
    dead = torch.diag(torch.arange(64) % 2).float()
    assert not packed.dequantize(gptq.rounded(weight, dead, 4, 16))[:, ::2].any()


@settings(max_examples=25)
@given(config=configs(dropout=0.0), seed=SEEDS)
def test_calibration_sees_what_each_projection_is_given(config: ModelConfig, seed: int) -> None:
    """The outputs made from those inputs are the block's."""
    params = weights(config, seed)
    layer, x = params["model"]["layers"]["0"], numbers((2, 5, config.d_model), seed)
    context = transformer.shared(config, torch.arange(5), 5, None, cached=False)
    stages = {place: inputs(layer, x, context) for places, inputs in gptq.stages(config) for place in places}
    attended = linear(layer["self_attn"]["o_proj"], stages["self_attn", "o_proj"])
    fed = linear(layer["mlp"]["down_proj"], stages["mlp", "down_proj"])
    if config.norm_placement == "post":
        y = stages["mlp", "up_proj"] + fed
        y = transformer.norm(layer["post_attention_layernorm"], y, config.norm, config.norm_eps)
    else:
        y = x + attended + fed
    assert_close(y, transformer.block(layer, x, context, config)[0], 1e-5)
    query = linear(layer["self_attn"]["q_proj"], stages["self_attn", "q_proj"])
    inside = stages["self_attn", "q_proj"]
    if config.norm_placement == "pre":
        inside = transformer.norm(layer["input_layernorm"], x, config.norm, config.norm_eps)
    assert_close(query, linear(layer["self_attn"]["q_proj"], inside))


@settings(max_examples=8)
@given(chosen=quantizable(), seed=SEEDS)
def test_gptq_of_any_model_has_the_leaves_of_its_plan(chosen: tuple[ModelConfig, Plan], seed: int) -> None:
    config, plan = chosen
    params, tokens = weights(config, seed), token_rows(config, (3, 8), seed)
    made = gptq.gptq(params, tokens, config, plan)
    folder.check(made, config, "here", plan)
    assert forward(made, tokens, config).isfinite().all()


# Folders and the command ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = "Fewer bits, the same words.\n"
    words = tokenizers.train([text * 20], vocab_size=290)
    config = ModelConfig(words.vocab_size, d_model=64, n_layers=2, n_heads=2, d_ff=64, max_len=16)
    root = tmp_path_factory.mktemp("quantize")
    folder.save(root / "model", init(config, keys.key(0)), config, words)
    (root / "text.txt").write_text(text * 60)
    return root


def call(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> str:
    assert main(COMMANDS, [str(word) for word in words]) == code
    said = capsys.readouterr()
    return said.err if code else said.out


@pytest.mark.parametrize("words", ["--bits 8", "--bits 4 --group_size 32 --method gptq --embeddings false"])
def test_the_command_writes_what_loads_and_generates(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str
) -> None:
    out = tmp_path / "out"
    said = call(
        capsys, "quantize", "--model", saved / "model", "--out", out, "--data", saved / "text.txt", *words.split()
    )
    assert "bits a parameter" in said
    assert "perplexity " in said
    with pytest.raises(DataError, match="are quantised; give the model that they were made from"):
        folder.load(out)
    model = folder.load(out, quantized=True)
    assert "tensors, F32, I8" in (described := call(capsys, "inspect", "--model", out)) or "U8" in described
    plan = folder.read_plan(out)
    assert plan is not None
    if plan.method == "rtn":
        assert tree.digest(model.params) == tree.digest(quantize.quantize(folder.load(saved / "model").params, plan))
    written = json.loads((out / "config.json").read_text())
    assert (written["model_type"], written["torch_dtype"]) == ("functional_lm", "float32")
    assert (out / "model.safetensors").stat().st_size < 0.5 * (saved / "model" / "model.safetensors").stat().st_size
    call(capsys, "generate", "--model", out, "--prompt", "Fewer", "--max_tokens", 4, "--compile", "false")
    assert "are quantised" in call(capsys, "export", "--model", out, "--out", tmp_path / "hf", code=1)
    assert "are quantised" in call(capsys, "quantize", "--model", out, "--out", tmp_path / "twice", code=1)
    bf16 = folder.load(out, dtype=torch.bfloat16, quantized=True).params
    assert torch.equal(
        quantize.dequantize(bf16)["model"]["layers"]["0"]["mlp"]["up_proj"]["weight"],
        quantize.dequantize(model.params)["model"]["layers"]["0"]["mlp"]["up_proj"]["weight"],
    )


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("--method gptq", 2, "--method gptq needs --data"),
        ("--bits 4 --group_size 48", 2, "group_size 48 does not divide the 64 inputs of 'model.layers.0.mlp.down_proj"),
        ("--bits 4 --group_size 48", 2, "give 32"),
        ("--bits 4 --group_size 3", 2, "group_size is 3; it has to be even"),
        ("--bits 5", 2, "it can be 8, 4"),
        ("--targets *.ffn.*", 2, "match no weight, such as"),
        ("--targets *norm.weight", 2, "which is no matrix of weights"),
        ("--model nowhere", 1, "no model folder at nowhere"),
    ],
)
def test_what_cannot_be_is_refused(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, code: int, message: str
) -> None:
    model = [] if "--model" in words else ["--model", saved / "model"]
    targets = ["--embeddings", "false"] if "--targets" in words else []
    said = call(capsys, "quantize", *model, "--out", tmp_path / "out", *words.split(), *targets, code=code)
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_and_its_record_have_to_agree(saved: Path, tmp_path: Path) -> None:
    params, config, words = folder.load(saved / "model")
    plan = Plan(4, 32)
    made = quantize.quantize(params, plan)
    with pytest.raises(ValueError, match="saved with the plan"):
        folder.save(tmp_path, made, config, words)
    with pytest.raises(ValueError, match="others without"):
        folder.save(tmp_path, params, config, words, plan)
    folder.save(tmp_path, made, config, words, plan)
    written = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"quantization": None}, r"holds a tensor 'model.embed_tokens.qweight'"),
        (
            {"quantization": plan.to_json() | {"group_size": 64}},
            r"'.*scales' is \[64, 2\]; config.json describes \[64, 1\]",
        ),
        ({"quantization": plan.to_json() | {"bits": 8}}, r"is \[64, 32\]; config.json describes \[64, 64\]"),
        ({"quantization": plan.to_json() | {"bits": 3}}, "'quantization' is not understood"),
        ({"quantization": {"way": 1}}, "'quantization' is not understood"),
        ({"quantization": 4}, "it has to be an object"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(written | change))
        with pytest.raises(DataError, match=message):
            folder.load(tmp_path, quantized=True)
    with pytest.raises(DataError, match=r"is of torch.float32; config.json describes torch.(u)?int8"):
        folder.check(tree.cast(tree.map(lambda leaf: leaf.float(), made), torch.float32), config, "here", plan)


def test_targets_choose() -> None:
    config = ModelConfig(20, d_model=8, n_layers=1, n_heads=2, d_ff=8)
    made = quantize.quantize(init(config, keys.key(0)), Plan(8, embeddings=False, targets="*.mlp.*"))
    changed = {name.rsplit(".", 1)[0] for name in tree.flatten(made) if name.endswith("qweight")}
    assert changed == {f"model.layers.0.mlp.{name}_proj" for name in ("up", "gate", "down")}
    with pytest.raises(UsageError, match="use 8 bits"):
        quantize.quantize({"model": {"layers": {"0": {"x_proj": {"weight": torch.zeros(2, 7)}}}}}, Plan(4))
