"""A folder of everything that can be wrong with a file, for the calls of test_wrong_calls."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from training_runs import FLAGS, command

from functional_lm import files, folder, tree
from functional_lm.text import dataset, storage

TINY = {name: FLAGS[name] for name in ("d_model", "n_layers", "n_heads", "d_ff", "max_len")}
QUICK = {"compile": "false", "dtype": "float32", "device": "cpu", "steps": 1, "batch_size": 2, "sample_tokens": 0}
QUICK |= {"warmup_steps": 1, "val_fraction": 0}


FOREIGN: tuple[dict[str, object], ...] = (
    {"model_type": ["llama"]},
    {"hidden_size": "wide"},
    {"num_attention_heads": [2]},
    {"num_key_value_heads": 0},
    {"rope_scaling": 5},
    {"rope_scaling": {"rope_type": "llama3", "factor": "x", "low_freq_factor": 1, "high_freq_factor": 4}},
    {"rope_parameters": {"rope_type": ["default"]}},
    {"attention_bias": "maybe"},
    {"model_type": "qwen2", "layer_types": 5},
)


def lines(path: Path, *rows: object) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make(root: Path) -> None:
    """Sound things first: `text.txt words/ tokens.bin model/ adapter/ chats.jsonl pairs.jsonl arch.json`."""
    texts(root)
    assert command("train-tokenizer", data=root / "text.txt", out=root / "words", vocab_size=320) == 0
    assert command("train-tokenizer", data=root / "text.txt", out=root / "others", vocab_size=330) == 0
    assert command("prepare", data=root / "text.txt", out=root / "tokens", tokenizer=root / "words") == 0
    flags = {"data": root / "tokens.bin", "tokenizer": root / "words", "out": root / "model"}
    assert command("pretrain", **{**TINY, **QUICK, **flags}) == 0
    shutil.rmtree(root / "model" / "tensorboard")
    chats(root)
    flags = {"data": root / "chats.jsonl", "model": root / "model", "out": root / "adapter", "lora_rank": 2}
    assert command("lora-finetune", **{**QUICK, **flags}) == 0
    assert command("create-config", output=root / "arch.json") == 0
    broken_datasets(root)
    broken_models(root)
    broken_adapters(root)
    broken_foreigners(root)
    configurations(root)


def texts(root: Path) -> None:
    (root / "text.txt").write_text(
        "".join(f"line {i}: {i * i % 97} foxes jump over {i % 13} lazy dogs.\n" for i in range(150))
    )
    (root / "empty.txt").touch()
    (root / "blank.txt").write_text(" \n\n\t\n")
    (root / "binary.txt").write_bytes(bytes(range(256)) * 64)
    (root / "latin1.txt").write_bytes("Gr\xfc\xdfe aus K\xf6ln\n".encode("latin-1") * 40)
    (root / "nul.txt").write_bytes(bytes(4000))
    (root / "short.txt").write_text("short")
    (root / "file").write_text("a file where a folder is needed")
    (root / "folder").mkdir()
    (root / "folder" / "letter.txt").write_text("dear reader, this is no run\n" * 9)
    (root / "nothing").mkdir()


def chats(root: Path) -> None:
    turns = [{"role": "user", "content": "say it"}, {"role": "assistant", "content": "it is said"}]
    lines(root / "chats.jsonl", *({"messages": turns} for _ in range(8)))
    lines(root / "asked.jsonl", *({"prompt": f"{i}", "response": "yes"} for i in range(40)))
    lines(root / "pairs.jsonl", *({"prompt": "a", "chosen": "good", "rejected": "bad"} for _ in range(8)))
    lines(root / "roles.jsonl", {"messages": [{"role": "nobody", "content": "x"}]})
    lines(root / "wordless.jsonl", {"messages": [{"role": "user"}]})
    lines(root / "numbers.jsonl", 1, 2, 3)
    lines(root / "titles.jsonl", {"title": "a"}, {"title": "b"})
    lines(root / "null.jsonl", {"text": None})
    lines(root / "silent.jsonl", {"messages": [{"role": "user", "content": "no answer"}]})
    (root / "garbage.jsonl").write_text('{"messages": [\n')
    (root / "deep.jsonl").write_text("[" * 100_000 + "\n")


def broken_datasets(root: Path) -> None:
    def copied(name: str) -> tuple[Path, Path]:
        for suffix in (".bin", ".index"):
            shutil.copy(root / f"tokens{suffix}", root / f"{name}{suffix}")
        return root / f"{name}.bin", root / f"{name}.index"

    data, _ = copied("cut")
    data.write_bytes(data.read_bytes()[:-4])
    _, index = copied("cutindex")
    index.write_bytes(index.read_bytes()[:100])
    _, index = copied("foreign")
    index.write_bytes(b"MMIDIDX\x00\x00" + bytes(300))
    data, _ = copied("swapped")
    data.write_bytes(np.fromfile(data, "<i4").astype(">i4").tobytes())
    data, _ = copied("beyond")
    tokens = np.fromfile(data, "<i4")
    tokens[5] = 70_000
    data.write_bytes(tokens.tobytes())
    shutil.copy(root / "beyond.bin", copied("resealed")[0])
    resealed(root / "resealed", "<")
    copied("bigendian")
    resealed(root / "bigendian", ">")
    (root / "alone.bin").write_bytes(bytes(400))
    with dataset.writing(root / "wide", 100_000, 0, "ab" * 32) as writer:
        writer.append(np.full(200, 99_999))


def resealed(name: Path, order: str) -> None:
    """An index (of one block) with digests of what is there now, its header in this order of bytes."""
    index = name.with_suffix(".index")
    raw, block = index.read_bytes(), hashlib.blake2b(name.with_suffix(".bin").read_bytes(), digest_size=16)
    rest = block.digest() + raw[storage.HEADER_BYTES + 16 :]
    header = (*storage.FIELDS.unpack(raw[: storage.FIELDS.size])[:-1], hashlib.blake2b(rest, digest_size=32).digest())
    fields = struct.pack(storage.FIELDS.format.replace("<", order), *header)
    index.write_bytes(fields + hashlib.blake2b(fields, digest_size=16).digest() + rest)


def broken_models(root: Path) -> None:
    def copied(name: str) -> Path:
        shutil.copytree(root / "model", root / name, ignore=shutil.ignore_patterns("checkpoints", "data", "*.jsonl"))
        return root / name

    params = folder.load(root / "model").params
    weights = tree.flatten(params)
    weights["model.norm.weight"][0] = torch.nan
    tree.save(tree.unflatten(weights), copied("nan") / "model.safetensors")
    weights["model.norm.weight"][0] = 1.0
    path = copied("truncated") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    path = copied("bigheader") / "model.safetensors"
    path.write_bytes(path.read_bytes()[7::-1] + path.read_bytes()[8:])
    turn(copied("bigweights") / "model.safetensors")
    path = copied("bighalves") / "model.safetensors"  # of float32 that was bfloat16 no number is NaN when it is turned
    tree.save(tree.cast(tree.cast(params, torch.bfloat16), torch.float32), path)
    turn(path)
    (copied("headless") / "model.safetensors").write_bytes(b"\xff" * 400)
    tree.save(tree.select(params, "*mlp*"), copied("partial") / "model.safetensors")
    (copied("wordless") / "tokenizer.model").unlink()
    (root / "wordless" / "tokenizer.json").unlink()
    shutil.copy(root / "others" / "tokenizer.model", copied("mixed") / "tokenizer.model")
    (copied("noconfig") / "config.json").unlink()
    (copied("badconfig") / "config.json").write_text('{"functional_lm": [1]}')
    values = files.read_json(copied("heads") / "config.json")
    values["functional_lm"]["n_heads"], values["functional_lm"]["head_dim"] = 3, 0
    files.write_json(root / "heads" / "config.json", values)
    (root / "pickled").mkdir()
    shutil.copy(root / "model" / "config.json", root / "pickled" / "config.json")
    (root / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x04\x95")
    (root / "bare").mkdir()
    shutil.copy(root / "adapter" / "adapter_config.json", root / "bare" / "adapter_config.json")
    (root / "bare" / "adapter_model.bin").write_bytes(b"\x80\x04\x95")
    weights["model.norm"] = torch.ones(3)
    save_file(weights, copied("clash") / "model.safetensors")
    (root / "badwords").mkdir()
    (root / "badwords" / "tokenizer.model").write_bytes(b"\x00\x01 this is no SentencePiece model")
    for name, text in {"objectwords": "{}", "listwords": "[]", "emptywords": ""}.items():
        files.write_text(root / name / "tokenizer.json", text)


def broken_adapters(root: Path) -> None:
    def copied(name: str) -> Path:
        return Path(shutil.copytree(root / "adapter", root / name, ignore=shutil.ignore_patterns("check*", "*.jsonl")))

    (copied("badadapter") / "adapter_config.json").write_text('{"r": "many"}')
    for name, change in {
        "targets": {"target_modules": 5},
        "rate": {"lora_dropout": "much"},
        "switch": {"use_rslora": "maybe"},
        "based": {"base_model_name_or_path": 5},
    }.items():
        path = copied(f"bad{name}") / "adapter_config.json"
        files.write_json(path, {**files.read_json(path), **change})
    tensors = load_file(copied("intadapter") / "adapter_model.safetensors")
    save_file(
        {name: leaf.to(torch.int32) for name, leaf in tensors.items()}, root / "intadapter/adapter_model.safetensors"
    )
    save_file({}, copied("emptyadapter") / "adapter_model.safetensors")


def broken_foreigners(root: Path) -> None:
    """Folders of other programs, which are here for their `config.json` alone."""
    values = files.read_json(root / "model" / "config.json")
    for number, change in enumerate(FOREIGN, 1):
        files.write_json(root / f"foreign{number}" / "config.json", {**values, **change})


def turn(path: Path) -> None:
    """The float32 numbers of a safetensors file, big-endian."""
    raw = path.read_bytes()
    begin = 8 + int.from_bytes(raw[:8], "little")
    path.write_bytes(raw[:begin] + np.frombuffer(raw[begin:], "<f4").astype(">f4").tobytes())


def configurations(root: Path) -> None:
    (root / "list.json").write_text("[1, 2]")
    (root / "half.json").write_text('{"d_model": 3')
    (root / "unknown.json").write_text('{"d_modell": 32}')
    (root / "types.json").write_text('{"d_model": "wide"}')
    (root / "null.json").write_text("null")
    (root / "scaled.json").write_text('{"rope_scaling": ["x", 1, 2, 3]}')
    (root / "huge.json").write_text('{"d_model": 1e400}')
    (root / "undecodable.json").write_bytes(b'{"d_model": "\xff"}')
    (root / "deep.json").write_text("[" * 100_000)
