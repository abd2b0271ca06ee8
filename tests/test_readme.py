"""The README is true: its snippets run as printed, in order, and its tables of flags are those of the commands."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from functional_lm import folder, keys
from functional_lm.model import transformer
from functional_lm.model.config import ModelConfig
from functional_lm.text import tokenizer as tokenizers

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
sys.path.insert(0, str(ROOT / "tools"))


def test_snippets_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = tokenizers.train([(ROOT / "functional_lm" / "tree.py").read_text(encoding="utf-8")], "bpe", 400)
    config = ModelConfig(vocab_size=tokenizer.vocab_size, d_model=16, n_layers=2, n_heads=2, max_len=32)
    folder.save(tmp_path / "runs" / "train", transformer.init(config, keys.key(0)), config, tokenizer)
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(snippets) >= 6
    names: dict[str, object] = {}
    for number, snippet in enumerate(snippets):
        exec(compile(snippet, f"README snippet {number}", "exec"), names)
    printed = capsys.readouterr().out
    assert "nats a token" in printed
    assert "ensemble logits [4, 2, 12," in printed


def test_tables_of_flags_are_current() -> None:
    import readme

    assert readme.BLOCK.search(README), "the README has no table of flags"
    assert readme.renewed(README) == README, "run python tools/readme.py"


def commands() -> list[str]:
    """The commands of the examples, each as one line, in order; a here-document with what it holds."""
    text = re.sub(r" \\\n +", " ", README)
    found = re.findall(r"^    \$ (cat > \S+ <<'END'\n(?:    .*\n)+?    END$|.*)", text, re.MULTILINE)
    return [re.sub("^    ", "", command, flags=re.MULTILINE) for command in found]


def given(command: str, flag: str) -> list[str]:
    found = re.search(rf"--{flag} (\S+)", command)
    return found[1].split(",") if found else []


def test_examples_of_evolution_name_what_is_there_by_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts and rows that a command on the page makes or fetches, models that one leaves, functions that ship."""
    from functional_lm.evolution import answers

    made, models = {"stdlib"}, {"runs/train", "runs/books"}  # of `make train`; the other's text is named beside it
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.delitem(sys.modules, "scores", raising=False)  # another test's
    printed = re.findall(r"^    \d+ \w+ in (\S+\.jsonl)(?:, \d+ in (\S+))?$", README, re.MULTILINE)
    rows = {name for names in printed for name in names if name}
    asked = 0
    for command in commands():
        if written := re.match(r"(?:curl -o|cat >) (\S+)", command):
            made.add(written[1])
            if "<<" in command:
                (tmp_path / written[1]).write_text(command.split("\n", 1)[1].rsplit("\n", 1)[0])
            else:
                (tmp_path / written[1]).write_text("some words")
            continue
        if command.startswith("python experiments/"):
            assert (ROOT / command.split()[1]).is_file()
            made |= rows
        if re.search(r"functional_lm(\.| )(evolve|improve)( |$)", command) and " replay " not in command:
            asked += 1
            assert set(given(command, "data")) <= made, command
            for path in [*given(command, "model"), *given(command, "models")]:
                assert any(path == one or path.startswith(f"{one}/checkpoints/") for one in models), command
            figures = [name for flag in ("fitness", "descriptor", "score") for name in given(command, flag)]
            for name in figures:
                if ":" in name:
                    assert len(answers.named(name)(["some words", ""], [{"prompt": "def f():\n"}] * 2)) == 2
        models |= set(given(command, "out"))
    assert asked > 12
    del sys.modules["scores"]


# What a fault of an evolution, or of rounds, says: pieces of the package's own sentences.
SAID = (
    "raised ", "numbers for ", "one number for each answer", "of a generation", "took more than", "give --timeout more",
    "generations in a row had a finite fitness", "cannot be imported", "holds another run", "antithetic pairs need",
    "merge models of one shape", "keeps a full covariance", "was cut off; its generation is measured again",
    "is not as it was written", "without its first line it cannot be read", "stands at", "began with another model",
    "began with another text", "passing over a damaged checkpoint", "a rank was lost", "are more than the",
    "all of them need the same", "none is worth learning", "nothing decides", "holds other rounds",
    "is not that of round", "of a round",
)  # fmt: skip


@pytest.mark.parametrize("piece", SAID)
def test_the_table_of_faults_has_what_evolution_says(piece: str) -> None:
    table = README.split("| what goes wrong | what happens, and what you see |")[1].split("\n\n")[0]
    assert piece in table
    assert any(piece in path.read_text(encoding="utf-8") for path in (ROOT / "functional_lm").rglob("*.py"))
