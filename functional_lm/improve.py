"""`python -m functional_lm improve`: rounds in which a model learns from the best of its own answers.

A round samples several answers to each of some prompts, scores them, keeps the best of each prompt, fine-tunes a copy
on those (by `finetune`, or `lora-finetune`) and puts it in the model's place only if its held-out score rises.
Everything is asked as chats are learned. Parse, wire, print; the parts of a round are in `evolution/improvement.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from functional_lm import console, files, run_folder, surroundings, training_flags
from functional_lm.cli import Command, main_single
from functional_lm.errors import DataError, FunctionalLMError, UsageError
from functional_lm.improve_asking import Asker, asker_of
from functional_lm.improve_flags import ImproveFlags

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from functional_lm.evolution.improvement import Answer
    from functional_lm.folder import Model
    from functional_lm.tree import Tree

LOG, RECORD = "rounds.jsonl", "improve.json"
# What a model folder is made of; nothing else of a run is carried over.
PARTS = (
    "config.json", "generation_config.json", "tokenizer.model", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "model.safetensors",
)  # fmt: skip
FREE = ("out", "rounds", "timeout", "override")  # what may change when rounds go on


def run(options: ImproveFlags) -> int:
    """All rounds; returns the exit code. What cannot be meant is refused before anything is written."""
    from functional_lm import folder, run_saving, seal, tree
    from functional_lm.text import conversations, corpus

    out, source = Path(options.out), Path(options.model)
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file; name a folder")
    if out.resolve() == source.resolve():
        raise UsageError(f"--out {out} is the --model, which stays as it is; choose another folder")
    found = corpus.find(options.data)
    options = training_flags.on_this_machine(options)
    if options.least is None and options.score == "exact":
        options = dataclasses.replace(options, least=1.0)
    model = folder.load(source, options.device)
    conversations.require_markers(model.tokenizer, options.model)
    digest = tree.digest(model.params)
    text = hashlib.sha256("".join(map(seal.sha256, found.files)).encode()).hexdigest()
    asker = asker_of(options, model, found)
    functions = surroundings.digests([options.score])
    before = _opened(options, out, digest, text, functions)
    if before is None and out.is_dir() and not all(map(run_folder.left_over, out.iterdir())):
        raise UsageError(f"{out} holds something else; choose another --out")
    files.make_folder(out)
    busy = f"another process is improving {out}; wait for it, or choose another --out"
    with files.locked(out / run_folder.LOCK, busy), run_saving.unwritten("the round was not written"):
        files.sweep(out)
        record, log = before or (_record(options, digest, text, functions), [])
        files.write_json(out / RECORD, record)
        _settle(out, source, log)
        with _room(options):
            return _rounds(options, out, model, asker, log, record["since"])


@contextlib.contextmanager
def _room(options: ImproveFlags) -> Iterator[None]:
    """Where memory does not hold what is computed, what needs less is said. Raises FunctionalLMError."""
    from functional_lm.trainer import out_of_memory

    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise FunctionalLMError(
            f"out of memory with --at_once {options.at_once} and --batch_size {options.batch_size}; smaller ones need "
            "less"
        ) from error


# Which rounds there are -----------------------------------------------------------------------------------------------


def _record(options: ImproveFlags, digest: str, text: str, functions: Mapping[str, str]) -> dict[str, Any]:
    """Under which flags rounds are, since which one, and what they began with."""
    flags = run_folder.as_json(dataclasses.asdict(options))
    return {"flags": flags, "digest": digest, "text": text, "functions": functions, "since": 0, "earlier": []}


def _opened(
    options: ImproveFlags, out: Path, digest: str, text: str, functions: Mapping[str, str]
) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
    """The record and the rounds to go on from, None for a new run.

    With `--override` the record becomes that of these flags, `since` so many rounds; what was measured does not compare
    with what will be. The one before is the last of `earlier`.
    """
    if not (out / RECORD).is_file():
        return None
    try:
        record = {"since": 0, "earlier": [], "functions": {}, **files.read_json(out / RECORD)}
        before, base = record["flags"], record["digest"]
        kinds = ((before, dict), (base, str), (record["since"], int), (record["earlier"], list))
        if not isinstance(record["functions"], dict) or not all(isinstance(value, kind) for value, kind in kinds):
            raise TypeError
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{out / RECORD} is damaged; choose another --out") from error
    if base != digest:
        raise DataError(f"{out} began with another model ({base[:12]}) than the one in {options.model} ({digest[:12]})")
    changes = [
        f"--{name} was {before.get(name)}, is {now}"
        for name, now in run_folder.as_json(dataclasses.asdict(options)).items()
        if name not in FREE and not run_folder.same(name, before.get(name), now)
    ]
    if record.get("text", text) != text:  # rounds of an earlier version did not note it
        changes.append("the text has changed")
    changes += surroundings.changed_functions(functions, record)
    run_folder.agree(f"{out} holds other rounds", changes, options.override, "another --out starts beside them")
    log = _log(out)
    if not changes:
        return record, log
    last = {name: record.get(name) for name in ("flags", "text", "functions", "since")}
    return {**_record(options, digest, text, functions), "since": len(log), "earlier": [*record["earlier"], last]}, log


def _log(out: Path) -> list[dict[str, Any]]:
    """The rounds so far. A last line that was cut off is a round that is done again."""
    if not (out / LOG).is_file():
        return []
    whole = (out / LOG).read_bytes().split(b"\n")[:-1]
    rounds = []
    for number, line in enumerate(whole, 1):
        try:
            rounds.append(files.parse_json(line))
            if not _is_round(rounds[-1], number):
                raise ValueError
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{out / LOG}, line {number} is not that of round {number}; choose another --out") from None
    return rounds


def _is_round(entry: dict[str, Any], number: int) -> bool:
    """Whether a line says what `_settle` and the next round go on from."""
    held_out, digest = entry["held_out"], entry["digest"]
    measured = held_out is None or isinstance(held_out, float)
    return entry["round"] == number and measured and entry["accepted"] is isinstance(digest, str)


def _settle(out: Path, source: Path, log: list[dict[str, Any]]) -> None:
    """The model in `out` is that of the last accepted round, or the one to begin with."""
    from functional_lm import tree

    last = next((entry for entry in reversed(log) if entry["accepted"]), None)
    there = (out / "model.safetensors").is_file()
    if last is None:
        if not there:
            _install(source, out)
    elif not there or tree.digest(tree.load(out / "model.safetensors")) != last["digest"]:
        made = _place(out, last["round"]) / "model"
        if not (made / "model.safetensors").is_file():
            raise DataError(f"{out} lost the model of round {last['round']}; choose another --out")
        _install(made, out, PARTS[-1:])
    for entry in log:
        _clear(out, entry["round"])


def _clear(out: Path, number: int) -> None:
    """A round that is written down needs its trained model no more."""
    for name in ("model", "run"):
        files.remove(_place(out, number) / name)


def _install(source: Path, out: Path, parts: Sequence[str] = PARTS) -> None:
    """The parts of a model folder, byte for byte; the weights last."""
    for name in parts:
        if (source / name).is_file():
            with (source / name).open("rb") as original, files.writing(out / name) as copy:
                shutil.copyfileobj(original, copy)


def _place(out: Path, number: int) -> Path:
    return out / "rounds" / f"{number:03d}"


# A round --------------------------------------------------------------------------------------------------------------


def _rounds(options: ImproveFlags, out: Path, model: Model, asker: Asker, log: list[dict[str, Any]], since: int) -> int:
    from functional_lm import folder

    params = folder.load(out, options.device).params
    known = log[-1]["held_out"] if len(log) > since else None
    value = asker.held_out(params) if known is None else known
    if log:
        console.say(f"going on with {out} from round {len(log) + 1}")
    console.say(f"{options.score} of {len(asker.asked.validation)} held-out rows: {value:.4f}")
    for number in range(len(log) + 1, options.rounds + 1):
        started, place = time.perf_counter(), _place(out, number)
        files.remove(place)
        given = _answers(options, asker, params, number)
        kept = _kept(options, given, place)
        after = float("nan")
        if kept:
            _learn(options, out, place, number)
            found = folder.load(place / "model", options.device).params
            after = asker.held_out(found)
        accepted = after > value or (after == after and value != value)
        entry = _entry(options, number, given, kept, value, after, accepted, place, time.perf_counter() - started)
        length = (out / LOG).read_bytes().rfind(b"\n") + 1 if (out / LOG).exists() else None
        files.grow(out / LOG, json.dumps(entry) + "\n", length)
        if accepted:
            _install(place / "model", out, PARTS[-1:])
            params, value = found, after
        _clear(out, number)
        console.say(_said(entry, options))
    gained = sum(1 for entry in _log(out) if entry["accepted"])
    console.say(f"{options.rounds} rounds, {gained} accepted; the model is in {out}; go on with: "
                f"python -m functional_lm.chat --model {out}")  # fmt: skip
    return 0


def _answers(options: ImproveFlags, asker: Asker, params: Tree, number: int) -> list[Answer]:
    """`samples` answers to each prompt of a round, side by side, with their scores."""
    from functional_lm import keys
    from functional_lm.evolution import improvement, task

    chosen = task.drawn(asker.asked, number, min(options.prompts, len(asker.asked.train)), options.seed)
    rows = [row for row in chosen for _ in range(options.samples)]
    key = keys.fold_in(keys.fold_in_name(keys.key(options.seed, options.device), "improve"), number)
    texts = asker.sample(params, rows, key)
    scores = asker.rate(params, rows, texts)
    return [improvement.Answer(*found) for found in zip(rows, texts, scores, strict=True)]


def _kept(options: ImproveFlags, given: list[Answer], place: Path) -> list[Answer]:
    """The best answers, written down beside all of them."""
    from functional_lm.evolution import improvement

    kept = improvement.best(given, options.samples, options.least)
    chosen = set(map(id, kept))
    lines = [
        {"prompt": one.row["prompt"], "response": one.text, "score": one.score if one.score == one.score else None,
         "kept": id(one) in chosen}
        for one in given
    ]  # fmt: skip
    files.write_text(place / "answers.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    learned = [{"prompt": one.row["prompt"], "response": one.text} for one in kept]
    files.write_text(place / "kept.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in learned))
    return kept


def _learn(options: ImproveFlags, out: Path, place: Path, number: int) -> None:
    """`finetune` (or `lora-finetune`, merged) on the kept answers, into `place/model`."""
    from functional_lm import finetune, folder
    from functional_lm.adaptation_flags import FinetuneOptions, LoraOptions
    from functional_lm.interop.peft import load_adapter
    from functional_lm.model import lora

    common: dict[str, Any] = {
        "model": str(out), "data": str(place / "kept.jsonl"), "val_fraction": 0.0, "epochs": options.epochs,
        "learning_rate": options.learning_rate, "batch_size": options.batch_size, "seed": options.seed + number,
        "dtype": options.dtype, "device": options.device, "compile": options.compile, "eval_every": 0,
        "save_every": 0, "sample_tokens": 0,
    }  # fmt: skip
    rank, said = options.lora_rank, io.StringIO()
    with contextlib.redirect_stdout(said):  # it speaks of a folder that does not stay
        if not rank:
            finetune.run(FinetuneOptions(**common, out=str(place / "model")))
        else:
            finetune.run(LoraOptions(**common, out=str(place / "run"), lora_rank=rank, lora_alpha=float(rank)))
    files.write_text(place / "learning.log", said.getvalue())
    if not rank:
        return
    base = folder.load(out, options.device)
    params = lora.merge(base.params, load_adapter(place / "run", base.params, device=options.device))
    folder.save(place / "model", params, base.config, base.tokenizer)


def _entry(
    options: ImproveFlags, number: int, given: list[Answer], kept: list[Answer], before: float, after: float,
    accepted: bool, place: Path, seconds: float,
) -> dict[str, Any]:  # fmt: skip
    from functional_lm import tree

    finite = [one.score for one in given if one.score == one.score]
    return {
        "round": number,
        "answers": len(given),
        "kept": len(kept),
        "score_mean": sum(finite) / len(finite) if finite else None,
        "score_kept": sum(one.score for one in kept) / len(kept) if kept else None,
        "held_out_before": before if before == before else None,
        "held_out_after": after if after == after else None,
        "accepted": accepted,
        "held_out": after if accepted else before if before == before else None,
        "digest": tree.digest(tree.load(place / "model" / "model.safetensors")) if accepted else None,
        "seconds": round(seconds, 3),
    }


def _said(entry: dict[str, Any], options: ImproveFlags) -> str:
    mean = "none finite" if entry["score_mean"] is None else f"{entry['score_mean']:.4f} on average"
    if not entry["kept"]:
        return f"round {entry['round']}: of {entry['answers']} answers ({mean}) none is worth learning"
    return (
        f"round {entry['round']}: {entry['kept']} of {entry['answers']} answers kept ({mean}); held out "
        f"{_shown(entry['held_out_before'])} -> {_shown(entry['held_out_after'])}: "
        + ("accepted" if entry["accepted"] else "rejected, the model stays")
    )


def _shown(value: float | None) -> str:
    return "no number" if value is None else f"{value:.4f}"


COMMAND = Command(
    "improve",
    "rounds of learning from the best of a model's own answers",
    ImproveFlags,
    run,
    details="example:\n  improve --model runs/assistant --data questions.jsonl --score exact --rounds 5",
)

if __name__ == "__main__":
    sys.exit(main_single(COMMAND, prog="python -m functional_lm.improve"))
