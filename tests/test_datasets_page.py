"""DATASETS.md is true: its shell blocks and its snippets run as printed, in order."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from functional_lm.text import dataset, tokenizer

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"```(sh|python)\n(.*?)```", re.DOTALL)


@pytest.mark.skipif(os.name != "posix", reason="the blocks are for a shell")
def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "DATASETS.md").read_text(encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        page = page.replace(":8000", f":{free.getsockname()[1]}").replace(" 8000 ", f" {free.getsockname()[1]} ")
    monkeypatch.chdir(tmp_path)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "no_proxy": "127.0.0.1"}
    names: dict[str, object] = {}
    blocks = BLOCK.findall(page)
    assert len(blocks) >= 6
    for language, block in blocks:
        if language == "python":
            exec(compile(block, "DATASETS.md", "exec"), names)
        else:
            done = subprocess.run(["bash", "-euc", block], env=env, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
    assert "(2, 16)" in capsys.readouterr().out
    words = tokenizer.load("words")
    first = dataset.open_dataset("made/first", words)
    assert first.documents == 7  # a duplicate is dropped
    assert words.decode(first.document(2)) == "What ends a turn?<|end|> does."
    mixed = dataset.open_dataset("made/mixed", words)
    assert [words.decode(mixed.document(0)), int(mixed.copies[0])] == ["A line,\nand another line.\n", 2]
    assert (dataset.open_dataset("made/web").documents, dataset.open_dataset("made/checked").documents) == (2, 4)
    assert {path.name for path in Path("downloads").rglob("*.json*")} >= {"rows.jsonl", "chats.jsonl", "record.json"}
