"""Folders of other programs: older forms are read, damaged ones are refused in one line and leave nothing."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import CONFIG, bpe, edit, llama, save
from safetensors.torch import load_file, save_file

import functional_lm
from functional_lm import folder, tree
from functional_lm.__main__ import COMMANDS
from functional_lm.cli import main
from functional_lm.errors import DataError, UsageError
from functional_lm.interop import hugging_face
from functional_lm.model.config import ModelConfig
from functional_lm.model.transformer import abstract
from functional_lm.text.tokenizer import Tokenizer

__all__ = ["bpe", "llama"]  # fixtures


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(path / "model.safetensors"))


def shard(path: Path) -> Path:
    """Split a folder's tensors into two shards with an index; the index is returned."""
    found = tensors(path)
    names = sorted(found)
    places = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(places.values()):
        save_file({name: found[name] for name in names if places[name] == file}, path / file)
    (path / "model.safetensors").unlink()
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index


def change_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    found = tensors(path)
    change(found)
    save_file(found, path / "model.safetensors")


def change_index(path: Path, change: Callable[[dict[str, str]], Any]) -> None:
    index = shard(path)
    values = json.loads(index.read_text())
    change(values["weight_map"])
    index.write_text(json.dumps(values))


def poison(found: dict[str, torch.Tensor]) -> None:
    found["model.norm.weight"][3] = float("nan")


def to_pickle(path: Path) -> None:
    torch.save(tensors(path), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()


def lie(path: Path) -> None:
    """A header that gives a tensor more rows than the file has bytes."""
    file = path / "model.safetensors"
    data = file.read_bytes()
    assert b'"shape":[290,16]' in data
    file.write_bytes(data.replace(b'"shape":[290,16]', b'"shape":[299,16]'))


NORM, UP = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"
DAMAGES: dict[str, Callable[[Path], Any]] = {
    rf"lacks the tensor '{UP}' that its config\.json": lambda p: change_tensors(p, lambda found: found.pop(UP)),
    r"holds 'model\.extra\.weight', which its config\.json does not ask for": lambda p: change_tensors(
        p, lambda found: found.update({"model.extra.weight": torch.zeros(1)})
    ),
    rf"'{NORM}' is \[17\]; config\.json asks for \[16\]": lambda p: change_tensors(
        p, lambda found: found.update({NORM: torch.zeros(17)})
    ),
    rf"'{NORM}' holds NaN or infinite numbers": lambda p: change_tensors(p, poison),
    rf"'{NORM}' is stored as I8; only F64": lambda p: change_tensors(
        p, lambda found: found.update({NORM: torch.zeros(16, dtype=torch.int8)})
    ),
    r"pytorch_model\.bin is a pickle, .* never opened; .*save_pretrained": to_pickle,
    r"no model\.safetensors and no": lambda p: (p / "model.safetensors").unlink(),
    r"model\.safetensors is not a whole safetensors file": lie,
    r"names the shard '\.\./x\.safetensors'": lambda p: change_index(
        p, lambda places: places.update({NORM: "../x.safetensors"})
    ),
    r"names the shard '/etc/passwd'": lambda p: change_index(p, lambda places: places.update({NORM: "/etc/passwd"})),
    r"names the shard 'a\\\\b\.safetensors'": lambda p: change_index(
        p, lambda places: places.update({NORM: "a\\b.safetensors"})
    ),
    r"no file .*model-9\.safetensors": lambda p: change_index(
        p, lambda places: places.update({NORM: "model-9.safetensors"})
    ),
    r"promises the tensor 'more'": lambda p: change_index(
        p, lambda places: places.update(more="model-00001-of-00002.safetensors")
    ),
    rf"holds '{NORM}', and model\.safetensors\.index\.json does not say so": lambda p: change_index(
        p, lambda places: places.pop(NORM)
    ),
    r"has model\.safetensors and model\.safetensors\.index\.json": lambda p: (
        p / "model.safetensors.index.json"
    ).write_text("{}"),
    "is no index of shards": lambda p: shard(p).write_text("[]"),
    "tie_word_embeddings is true .* 'lm_head.weight' is not the embedding": lambda p: edit(p, tie_word_embeddings=True),
    "'rope_type' is 'yarn'": lambda p: edit(p, rope_scaling={"type": "yarn"}),
    "no tokenizer in": lambda p: [(p / name).unlink() for name in ("tokenizer.model", "tokenizer.json")],
    "the tokenizer has 290 ids and the model 200": lambda p: (
        edit(p, vocab_size=200),
        change_tensors(
            p,
            lambda found: found.update({name: leaf[:200].clone() for name, leaf in found.items() if len(leaf) == 290}),
        ),
    ),
    "no configuration at": lambda p: (p / "config.json").unlink(),
    "is not JSON": lambda p: (p / "config.json").write_text("{"),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_a_damaged_folder_is_refused_in_one_line_and_leaves_nothing(
    message: str, llama: Path, tmp_path: Path, capsys: Any
) -> None:
    DAMAGES[message](llama)
    with pytest.raises(DataError, match=message) as caught:
        hugging_face.load_folder(llama)
    assert "\n" not in str(caught.value)
    assert main(COMMANDS, ["import", "--from", str(llama), "--out", str(tmp_path / "out" / "here")]) == 1
    assert capsys.readouterr().err == f"error: {caught.value}\n"
    assert [entry for entry in tmp_path.rglob("*") if "out" in entry.parts and entry.is_file()] == []
    assert not (tmp_path / "out" / "here").exists()


def test_shards_and_older_files_are_read(llama: Path, tmp_path: Path) -> None:
    expected = tree.digest(hugging_face.load_folder(llama).params)
    bare = {name.removeprefix("model."): leaf for name, leaf in tensors(llama).items()}
    bare["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    whole = shutil.copytree(llama, tmp_path / "whole")
    save_file(bare, whole / "model.safetensors")
    shard(llama)
    for path in (llama, whole):
        assert tree.digest(hugging_face.load_folder(path).params) == expected
    tied = {**tensors(whole), "lm_head.weight": tensors(whole)["embed_tokens.weight"].clone()}
    save_file(tied, whole / "model.safetensors")
    edit(whole, tie_word_embeddings=True)
    assert "lm_head" not in hugging_face.load_folder(whole).params


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox"])
def test_files_of_the_bare_model_and_with_masks_are_read(name: str, tmp_path: Path, bpe: Tokenizer) -> None:
    old = {"norm": "layernorm", "bias": "all", "feed_forward": "gelu", "tie_embeddings": name == "gpt2"}
    old |= {"positions": "learned"} if name == "gpt2" else {}
    save(tmp_path / "ours", ModelConfig(**{**CONFIG, "n_kv_heads": 4, **old}), bpe)
    hugging_face.export(tmp_path / "ours", path := tmp_path / "theirs", name)
    expected = tree.digest(hugging_face.load_folder(path).params)
    base, place = ("transformer.", "h.1.attn") if name == "gpt2" else ("gpt_neox.", "layers.1.attention")
    found = {key.removeprefix(base).replace("embed_out", "lm_head"): leaf for key, leaf in tensors(path).items()}
    found |= {f"{place}.bias": torch.ones(1, 1, 4, 4), f"{place}.masked_bias": torch.tensor(-1e4)}
    save_file(found, path / "model.safetensors")
    assert tree.digest(hugging_face.load_folder(path).params) == expected
    if name == "gpt_neox":
        save_file({**found, "embed_out.weight": torch.ones(290, 16)}, path / "model.safetensors")
        with pytest.raises(DataError, match=r"'embed_out\.weight' and 'lm_head\.weight' have the same place"):
            hugging_face.load_folder(path)


def test_the_keys_of_a_family_win_over_ours(llama: Path, bpe: Tokenizer) -> None:
    config = ModelConfig(**CONFIG, tie_embeddings=False, dropout=0.1, attention="flash")
    save(llama, config, bpe)
    values = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**values, "rope_theta": 5.0}))
    assert hugging_face.load_folder(llama).config == dataclasses.replace(config, rope_theta=5.0)


def test_a_foreign_folder_has_to_be_brought_in_first(llama: Path) -> None:
    with pytest.raises(DataError, match=rf"'llama' of another program; .* import --from {llama} --out DIR"):
        functional_lm.load(llama)


def test_nothing_that_exists_is_replaced(llama: Path, tmp_path: Path) -> None:
    for function in (hugging_face.import_folder, hugging_face.export):
        with pytest.raises(UsageError, match="exists; remove it or choose another place"):
            function(llama, llama)
    (tmp_path / "empty").mkdir()
    hugging_face.import_folder(llama, tmp_path / "empty")
    with pytest.raises(DataError, match="no model folder at"):
        hugging_face.import_folder(tmp_path / "nowhere", tmp_path / "new")


def test_the_commands(llama: Path, tmp_path: Path, bpe: Tokenizer, capsys: Any) -> None:
    def run(*words: Any) -> int:
        return main(COMMANDS, [str(word) for word in words])

    assert run("import", "--from", llama, "--out", tmp_path / "in") == 0
    assert run("export", "--model", tmp_path / "in", "--out", tmp_path / "out") == 0
    assert "as a llama" in capsys.readouterr().out
    assert tree.digest(folder.load(tmp_path / "in").params) == tree.digest(hugging_face.load_folder(llama).params)
    assert run("export", "--format", "gpt2", "--model", tmp_path / "in", "--out", tmp_path / "gpt2") == 1
    assert "is no gpt2: n_kv_heads is 2 and a gpt2 has 4" in capsys.readouterr().err
    odd = ModelConfig(**CONFIG, logit_softcap=3.0)
    save(tmp_path / "odd", odd, bpe)
    assert run("export", "--model", tmp_path / "odd", "--out", tmp_path / "never") == 1
    assert "no family of Hugging Face computes this model: logit_softcap is 3.0" in capsys.readouterr().err
    assert not (tmp_path / "never").exists()
    assert sum(leaf.numel() for leaf in tree.flatten(abstract(odd)).values()) > 0
