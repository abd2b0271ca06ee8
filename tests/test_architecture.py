"""`create-config` and `inspect`: files that read back to what was asked for, tables that hold the account's numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from strategies import SEEDS, configs, weights

from functional_lm import console, files, folder, keys, tree
from functional_lm.__main__ import COMMANDS
from functional_lm.cli import main
from functional_lm.errors import DataError
from functional_lm.model import account, transformer
from functional_lm.model import config as model_config
from functional_lm.model.config import PRESETS, ModelConfig, preset
from functional_lm.text import tokenizer as tokenizers

Capture = pytest.CaptureFixture[str]


def said(capsys: Capture, *words: object) -> str:
    capsys.readouterr()
    assert main(COMMANDS, [str(word) for word in words]) == 0
    return capsys.readouterr().out


def refused(capsys: Capture, *words: object, code: int = 2) -> str:
    capsys.readouterr()
    assert main(COMMANDS, [str(word) for word in words]) == code
    out, err = capsys.readouterr()
    assert (out, err.count("\n"), err[:7]) == ("", 1, "error: ")
    return err


# create-config --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize(
    "changes",
    [{}, {"n_heads": 2, "n_kv_heads": 1, "rope_scaling": (8.0, 1.0, 4.0, 64.0)}, {"d_ff": 100, "norm_eps": 1e-6}],
)
def test_a_written_configuration_is_read_back(
    tmp_path: Path, capsys: Capture, name: str, changes: dict[str, Any]
) -> None:
    path = tmp_path / "new folder" / "my model.json"
    words = [
        f"--{field}={','.join(map(str, value)) if isinstance(value, tuple) else value}"
        for field, value in changes.items()
    ]
    printed = said(capsys, "create-config", "--type", name, "--output", path, *words)
    assert model_config.read(path) == preset(name, **changes)
    assert f"the configuration is in {path}" in printed
    assert f"--config '{path}'" in printed
    assert list(path.parent.iterdir()) == [path]


def test_widths_that_follow_from_others_still_do(tmp_path: Path, capsys: Capture) -> None:
    """A written file can be trained with another width: what was not said is not fixed."""
    path = tmp_path / "model.json"
    said(capsys, "create-config", "--type", "gpt2", "--output", path, "--n_kv_heads", "4")
    values = json.loads(path.read_text())
    assert values.keys() == {*model_config.NAMES} - {"head_dim", "d_ff"}
    assert model_config.from_json({**values, "d_model": 96}).head_dim == 8


def test_what_is_there_is_not_written_over(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "model.json"
    said(capsys, "create-config", "--output", path)
    before = path.read_bytes()
    assert "is there already" in refused(capsys, "create-config", "--type", "tiny", "--output", path)
    assert path.read_bytes() == before
    said(capsys, "create-config", "--type", "tiny", "--output", path, "--overwrite")
    assert model_config.read(path) == preset("tiny")
    assert "is a folder" in refused(capsys, "create-config", "--output", tmp_path, "--overwrite")
    assert "it can be nano, tiny" in refused(capsys, "create-config", "--type", "huge", "--output", tmp_path / "x")
    wrong = refused(capsys, "create-config", "--output", tmp_path / "x", "--n_heads", "3")
    assert "d_model 256 is not a multiple of n_heads 3" in wrong
    assert [*tmp_path.iterdir()] == [path]


# inspect --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("flags", [(), ("--no-compile", "--dtype", "float32", "--device", "cuda")])
def test_a_preset_is_described_in_100_columns(capsys: Capture, name: str, flags: tuple[str, ...]) -> None:
    printed, some = said(capsys, "inspect", "--preset", name, *flags), preset(name)
    assert max(map(len, printed.splitlines())) <= 100
    parts = [part.parameters for part in account.parts(some) if part.parameters]
    for number in (*parts, account.parameters(some)):
        assert f" {number:,}" in printed
    for field in model_config.NAMES:
        assert f"{field} " in printed
    for cost in (account.flops, account.training_flops):
        assert f" {console.count(cost(some, some.max_len))}" in printed
    assert console.size(account.decoding_memory(some, 1, 1000, 4 if flags else 2).cache) in printed
    need = account.training_memory(
        some, 8, some.max_len, 4 if flags else 2, device="cuda" if flags else "cpu", compiled=not flags
    )
    assert [line.split("  ")[-1].strip() for line in printed.splitlines() if "at most at once" in line] == [
        console.size(need.total)
    ]


def test_fields_and_files_change_what_is_described(tmp_path: Path, capsys: Capture) -> None:
    some = preset("tiny", n_layers=3)
    said(capsys, "create-config", "--type", "tiny", "--output", tmp_path / "x.json", "--n_layers", "3")
    for words in (("--preset", "tiny", "--n_layers", "3"), ("--config", tmp_path / "x.json")):
        assert f"{account.parameters(some):,}" in said(capsys, "inspect", *words)
    assert "Architecture nano" in said(capsys, "inspect")
    assert "both name" in refused(capsys, "inspect", "--preset", "tiny", "--config", tmp_path / "x.json")
    assert "is longer than the model's --max_len 512" in refused(capsys, "inspect", "--preset=tiny", "--block_size=513")
    assert "no configuration at" in refused(capsys, "inspect", "--model", tmp_path, code=1)


def test_a_model_folder_is_described_from_its_headers(tmp_path: Path, capsys: Capture) -> None:
    tokenizer = tokenizers.train(["Text goes in, and text comes out.\n" * 20], vocab_size=290)
    some = ModelConfig(vocab_size=290, d_model=16, n_layers=2, n_heads=2, max_len=32, tie_embeddings=False)
    params = transformer.init(some, keys.key(0))
    folder.save(tmp_path / "model", tree.cast(params, model_dtype("bfloat16")), some, tokenizer)
    path = tmp_path / "model" / "model.safetensors"
    printed = said(capsys, "inspect", "--model", tmp_path / "model")
    assert f"{tree.size(params):,}" in printed
    assert f"{len(tree.flatten(params))} tensors, BF16, {console.size(path.stat().st_size)}" in printed
    assert "--n_layers cannot change it" in refused(capsys, "inspect", "--model", tmp_path / "model", "--n_layers", "3")
    values = json.loads((tmp_path / "model" / "config.json").read_text())
    values["functional_lm"]["n_layers"] = 3
    (tmp_path / "model" / "config.json").write_text(json.dumps(values))
    assert "its config.json describes" in refused(capsys, "inspect", "--model", tmp_path / "model", code=1)


def model_dtype(name: str) -> Any:
    import torch

    return getattr(torch, name)


@given(some=configs(), seed=SEEDS)
def test_the_header_of_a_file_names_its_tensors(
    tmp_path_factory: pytest.TempPathFactory, some: ModelConfig, seed: int
) -> None:
    path = tmp_path_factory.mktemp("header") / "model.safetensors"
    params = weights(some, seed)
    tree.save(params, path, {"note": 1})
    found = {name: (entry["shape"], entry["dtype"]) for name, entry in files.safetensors_header(path).items()}
    assert found == {name: (list(leaf.shape), "F32") for name, leaf in tree.flatten(params).items()}
    whole = path.read_bytes()
    for damaged in (b"", whole[:7], whole[:50], whole[:-1], whole + b"x", b"[]" * 20, b"\x02" + bytes(7) + b"[]"):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="is not a whole safetensors file"):
            files.safetensors_header(path)
    path.unlink()
    with pytest.raises(DataError, match="no file"):
        files.safetensors_header(path)


SCRIPT = """
import sys
from functional_lm.__main__ import COMMANDS
from functional_lm.cli import main
code = main(COMMANDS, sys.argv[1:])
assert "torch" not in sys.modules
sys.exit(code)
"""


def test_neither_waits_for_torch(tmp_path: Path) -> None:
    for words in (["create-config", "--output", str(tmp_path / "x.json")], ["inspect", "--preset", "xl"]):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, *words], cwd=Path(__file__).parents[1], capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"),
        (1023.6, "1 KiB"),
        (1536, "1.5 KiB"),
        (1000 * 2**20, "1000 MiB"),
        (2**30, "1 GiB"),
        (3e12, "2.73 TiB"),
    ],
)
def test_sizes_are_read_at_a_glance(number: float, text: str) -> None:
    assert console.size(number) == text
