"""Who reads files, and sound ones for each: what `tools/fuzz.py` changes bytes of.

`parsers(folder)` writes a sound file of every kind there is, with the package's own writers, and says what reads it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch


class Parser(NamedTuple):
    """A sound file, what reads it (the path of the file as mutated), and what mends the digest that guards it."""

    name: str
    sound: Path
    read: Callable[[Path], object]
    mend: Callable[[bytes], bytes] | None = None


def parsers(root: Path) -> list[Parser]:
    """Sound files of every kind, made here, and who reads them."""
    import numpy as np
    import torch

    from functional_lm import files, folder, keys, seal, tree
    from functional_lm.interop import gguf, hugging_face, peft
    from functional_lm.model import config as model_config
    from functional_lm.model import lora, transformer
    from functional_lm.text import conversations, corpus, dataset, readers, storage
    from functional_lm.text import tokenizer as tokenizers
    from functional_lm.training import checkpoint, record
    from functional_lm.training.step import TrainState

    text = [f"line {i}: {i * i % 97} foxes jump over {i % 13} lazy dogs.\n" for i in range(200)]
    for kind in tokenizers.TRAINERS:
        tokenizers.train(text, kind, 295).save(root / kind)
    with dataset.writing(root / "data", 300, 0, "ab" * 32) as writer:
        for length in (3, 9, 1, 20):
            writer.append(np.arange(length))
    config = model_config.ModelConfig(vocab_size=262, d_model=8, n_layers=1, n_heads=2, d_ff=8, max_len=8)
    params = transformer.init(config, keys.key(0))
    folder.save(root / "model", params, config, tokenizers.train((), "bytes"))
    adapter = lora.init(params, ("q_proj",), 2, keys.key(1), 2.0)
    peft.save(root / "adapter", adapter, peft.Settings(2, 2.0, ("q_proj",), 0.0, False, False, "x", ""), params)
    values = files.read_json(root / "adapter" / peft.CONFIG)
    patterns = {"rank_pattern": {"layers.0.*q_proj": 2}, "alpha_pattern": {"nothing": 3}}
    (root / "adapter" / peft.CONFIG).write_text(json.dumps({**values, **patterns}))
    state = TrainState(torch.tensor(3), torch.tensor(0), {"w": torch.ones(2)}, {}, {}, {}, torch.tensor([1, 2]), {})
    saved = checkpoint.save(root / "run", state, None, tokenizers.train((), "bytes"), {"best": {"value": 1.5}})
    theirs = model_config.ModelConfig(vocab_size=295, d_model=8, n_layers=1, n_heads=2, d_ff=8, max_len=8)
    folder.save(root / "theirs", transformer.init(theirs, keys.key(0)), theirs, tokenizers.load(root / "bpe"))
    (root / "theirs" / "tokenizer.model").unlink()  # their programs have the other form
    values = files.read_json(root / "theirs" / "config.json")
    (root / "theirs" / "config.json").write_text(json.dumps({k: v for k, v in values.items() if k != "functional_lm"}))
    turns = [{"role": "user", "content": "say"}, {"role": "assistant", "content": "said"}]
    rows: dict[str, list[dict[str, Any]]] = {
        "text.jsonl": [{"text": line} for line in text[:5]],
        "chats.jsonl": [{"messages": turns}, {"prompt": "a", "response": "b"}, {"conversation": turns}],
        "sharegpt.jsonl": [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}],
        "pairs.jsonl": [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2,
        "metrics.jsonl": [{"step": i, "loss": 1.5} for i in range(4)],
        "prompts.jsonl": [{"prompt": "a", "id": 1, "top_k": 3, "stop": ["b"]}, {"prompt": "a", "seed": 2}],
        "questions.jsonl": [{"prompt": "a", "response": "b", "more": [1]}] * 3,
    }
    for name, lines in rows.items():
        (root / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (root / "chats.json").write_text(json.dumps(rows["chats.jsonl"]))
    (root / "text.txt").write_text("".join(text[:5]))

    def opened(path: Path) -> None:
        storage.verify(storage.open_dataset(path))

    def words(path: Path) -> None:
        loaded = tokenizers.load(path.parent)
        loaded.decode(loaded.encode("a fox \U0001f98a jumps"))

    def texts(path: Path) -> None:
        for _ in corpus.texts(str(path)):
            pass

    def tensors(path: Path) -> None:
        with contextlib.suppress(files.DataError):
            files.safetensors_header(path)
        tree.load(path)

    return [
        Parser("index", root / "data.index", opened, mended_index),
        Parser("tokens", root / "data.bin", opened),
        Parser("safetensors", root / "model" / "model.safetensors", tensors),
        Parser("model", root / "model" / "model.safetensors", lambda path: folder.load(path.parent)),
        Parser("configuration", root / "model" / "config.json", lambda path: model_config.read(path)),
        *(Parser(kind, next((root / kind).glob("tokenizer.[mbw]*")), words) for kind in tokenizers.TRAINERS),
        Parser("text", root / "text.txt", texts),
        Parser("jsonl", root / "text.jsonl", texts),
        *(
            Parser(name, root / name, lambda path: conversations.read(corpus.find(str(path))))
            for name in ("chats.jsonl", "chats.json", "sharegpt.jsonl")
        ),
        Parser("pairs", root / "pairs.jsonl", lambda path: conversations.read_preferences(corpus.find(str(path)))),
        Parser("rows", root / "chats.jsonl", lambda path: [*readers.rows(path)]),
        Parser("checkpoint", saved / "training.json", lambda path: checkpoint.load(path.parent, state), mended_seal),
        Parser("checkpoints", saved / "training.json", lambda path: checkpoint.newest(path.parents[1]), mended_seal),
        Parser("seal", saved / "training.json", lambda path: seal.read(path.parent, path.name, 2), mended_seal),
        Parser(
            "adapter",
            root / "adapter" / "adapter_config.json",
            lambda path: peft.load_adapter(path.parent, params, True),
        ),
        Parser(
            "adapter weights",
            root / "adapter" / peft.WEIGHTS,
            lambda path: peft.load_adapter(path.parent, params, True),
        ),
        Parser("theirs", root / "theirs" / "config.json", lambda path: hugging_face.examine(path.parent)),
        Parser("tokenizer.json", root / "theirs" / "tokenizer.json", lambda path: hugging_face.examine(path.parent)),
        Parser("metrics", root / "metrics.jsonl", lambda path: record.read(path)),
        *packed(root, text, texts),
        *records(root),
        *asked(root),
        *noted(root),
        Parser("shards", shards(root / "shards", root / "theirs"), lambda path: hugging_face.examine(path.parent)),
        Parser(
            "tokenizer_config.json",
            root / "theirs" / "tokenizer_config.json",
            lambda path: hugging_face.examine(path.parent),
        ),
        Parser("template", root / "theirs" / "tokenizer_config.json", lambda path: gguf.chat_template(path.parent)),
    ]


def packed(root: Path, text: Sequence[str], texts: Callable[[Path], object]) -> list[Parser]:
    """Text in columns, and text that is compressed."""
    import gzip

    import pyarrow
    import zstandard
    from pyarrow import parquet

    whole = "".join(text).encode()
    (root / "text.txt.gz").write_bytes(gzip.compress(whole, mtime=0))
    (root / "text.txt.zst").write_bytes(zstandard.ZstdCompressor().compress(whole))
    # Plain, so that what is changed is the text itself.
    parquet.write_table(
        pyarrow.table({"text": list(text[:20])}), root / "text.parquet", compression="none", use_dictionary=False
    )
    return [
        Parser("gzip", root / "text.txt.gz", texts),
        Parser("zstandard", root / "text.txt.zst", texts),
        Parser("parquet", root / "text.parquet", texts),
    ]


def asked(root: Path) -> list[Parser]:
    """Rows that a model is to answer."""
    from functional_lm import batch, folder, keys, sampling_settings
    from functional_lm.evolution import task
    from functional_lm.generate import GenerateFlags
    from functional_lm.text import corpus

    model, usual = folder.load(root / "model"), dict[str, Any](sampling_settings.USUAL)

    def prompts(path: Path) -> None:
        for row, how in batch.read(str(path), GenerateFlags(model="m", **usual)):
            batch.asked(row, how, model.tokenizer)

    def questions(path: Path) -> None:
        found = corpus.find(str(path))
        if task.is_rows(found):
            made = task.questions(found, model, 0.5, 0, False, 1)
            task.read(made, made.train, model.tokenizer, task.longest(made, model.tokenizer), keys.key(0).device)

    return [
        Parser("prompts", root / "prompts.jsonl", prompts),
        Parser("questions", root / "questions.jsonl", questions),
    ]


def noted(root: Path) -> list[Parser]:
    """What is noted of a dataset and of a download: all of it is believed, or nothing."""
    from functional_lm import files, seal
    from functional_lm.text import download, prepare
    from functional_lm.text import tokenizer as tokenizers

    words, note, file = tokenizers.train((), "bytes"), root / "noted.json", root / "downloaded" / "text.txt"
    files.write_text(file, "some text")
    known = [prepare.prepare(str(file), root / "noted", words, progress=False) for _ in range(2)][1]
    inputs = {name: files.read_json(note)[name] for name in ("recipe", "files", "tokenizer", "deduplicate")}
    files.write_json(file.parent / "record.json", {"address": "a", "sha256": seal.sha256(file), "size": 9})

    def kept(path: Path) -> None:
        assert prepare._kept(path, inputs, words) in (None, known)

    def cached(path: Path) -> None:
        download._is_cached(file, path, None)
        assert not download._is_cached(file, path, "0" * 64)

    return [
        Parser("dataset note", note, kept),
        Parser("record.json", file.parent / "record.json", cached),
    ]


def records(root: Path) -> list[Parser]:
    """What runs write of themselves, and what reads it when they go on."""
    import dataclasses

    import torch

    from functional_lm import (
        files,
        improve,
        run_best,
        run_end,
        run_folder,
        sampling_settings,
        seal,
        training_flags,
        tree,
        unfinished,
    )
    from functional_lm.evolution import journal as journals
    from functional_lm.evolution import loop
    from functional_lm.improve_flags import ImproveFlags
    from functional_lm.model.config import ModelConfig
    from functional_lm.training import checkpoint

    flags = training_flags.TrainingFlags(steps=3, override=True)
    summary = {"budget": training_flags.budget(flags), "steps": 3, "val_loss": 1.5, "ended": "steps"}
    run = {"options": dataclasses.asdict(flags), "overrides": {}, "budget": summary["budget"], "kind": "training"}
    files.write_json(root / "begun" / "run.json", {**run, "versions": {"torch": torch.__version__, "threads": 1}})
    files.write_json(root / "ended" / "summary.json", summary)
    with files.writing_folder(root / "ended" / "step-00000003") as folder:
        seal.seal(folder, checkpoint.NOTES, checkpoint.FORMAT, {"step": 3, "run": run})
    files.write_json(root / "sampled" / sampling_settings.NAME, {**sampling_settings.USUAL, "eos_token_id": 1})
    rounds = ImproveFlags(model="m", data="d", out=str(root / "improved"))
    files.write_json(
        root / "improved" / improve.RECORD,
        {"flags": run_folder.as_json(dataclasses.asdict(rounds)), "digest": "a", "text": "t"},
    )
    tree.save({"w": torch.ones(2)}, root / "improved" / "model.safetensors")
    line = {"round": 1, "accepted": True, "digest": tree.digest({"w": torch.ones(2)}), "held_out": 0.5}
    files.write_text(root / "improved" / improve.LOG, json.dumps(line) + "\n")
    journal = journals.begin(root / "evolved" / journals.NAME, {"flags": {}, "digest": "a"})
    for number in range(3):
        journal = journals.append(journal, journals.entry(number, (1, 2), [0.5, [1.0, 2.0]], 1.0))
    outcome = loop.Outcome(Measured(torch.tensor(3), torch.ones(2)), journal)
    loop.save(root / "evolved", outcome, 1)
    run_best.keep(root / "bested", 3, lambda folder: files.write_text(folder / "file", "text"))
    held = unfinished.Journal(root / "begun", "key")
    held.open("names").write(b"held")
    held.commit([1, 2, 3])
    held.close()

    def measured(path: Path) -> None:
        for entry in journals.read(path).generations:
            journals.fitness_of(entry)

    def gone_on(path: Path) -> None:
        note = unfinished.Journal(path.parent, "key")
        assert note.memory in (None, [1, 2, 3])  # all of it, or nothing
        note.close()

    def again(path: Path) -> None:
        for_now = dataclasses.replace(rounds, out=str(path.parent))
        _, log = improve._opened(for_now, path.parent, "a", "t", {}) or ({}, [])
        improve._settle(path.parent, path.parent, log)

    step = root / "ended" / "step-00000003"
    return [
        Parser("journal", root / "evolved" / journals.NAME, measured),
        Parser(
            "state",
            root / "evolved" / "checkpoints" / "step-00000003" / loop.NOTES,
            lambda path: loop.newest(root / "evolved"),
            mended_seal,
        ),
        Parser(
            "best",
            root / "bested" / "best" / "step-00000003" / run_best.NOTES,
            lambda path: run_best.kept(root / "bested", 3),
            mended_seal,
        ),
        Parser("journal.json", root / "begun" / "journal.json", gone_on),
        Parser(
            "run",
            root / "begun" / "run.json",
            lambda path: run_folder.checkpoint_to_resume(flags, {}, path.parent, lambda vocab_size: ModelConfig()),
        ),
        Parser("summary", root / "ended" / "summary.json", lambda path: run_end.is_complete(flags, step, path.parent)),
        Parser(
            "generation_config",
            root / "sampled" / sampling_settings.NAME,
            lambda path: sampling_settings.of_folder(path.parent),
        ),
        Parser("improve", root / "improved" / improve.RECORD, again),
        Parser("rounds", root / "improved" / improve.LOG, again),
    ]


def shards(folder: Path, whole: Path) -> Path:
    """The index of a model folder of one shard."""
    shutil.copytree(whole, folder)
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    from functional_lm import files

    names = files.safetensors_header(folder / "model-1.safetensors")
    index = folder / "model.safetensors.index.json"
    files.write_json(index, {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "model-1.safetensors")})
    return index


class Measured(NamedTuple):
    """What `loop.save` reads of an evolution's state."""

    generation: torch.Tensor
    centre: torch.Tensor


def mended_index(data: bytes) -> bytes:
    """With digests of the tables and of the header as they are now."""
    head, rest = data[:128], data[144:]
    head = head[:96] + hashlib.blake2b(rest, digest_size=32).digest()
    return head + hashlib.blake2b(head, digest_size=16).digest() + rest


def mended_seal(data: bytes) -> bytes:
    try:
        notes = json.loads(data)
        notes.pop("sha256", None)
        return json.dumps(
            {**notes, "sha256": hashlib.sha256(json.dumps(notes, sort_keys=True).encode()).hexdigest()}
        ).encode()
    except (ValueError, TypeError, AttributeError, RecursionError):
        return data
