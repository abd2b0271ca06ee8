"""The studies in experiments/, each run as a person would, but small: its table and its plot are there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from functional_lm.errors import DataError
from functional_lm.text import download

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "experiments"))
PNG = b"\x89PNG"
# The first column of each table, and the plot; (c) has none.
STUDIES: dict[str, tuple[list[str], list[str], str | None]] = {
    "study_evolution": (
        ["--pretraining", "2", "--sft", "2", "--budget", "20000", "--members", "4", "--prompts", "4"],
        ["supervised fine-tuning, where the ways part", "then more supervision", "then REINFORCE", "then EGGROLL"],
        "evolution.png",
    ),
    "study_gradient": (
        ["--steps", "2", "--width", "8", "--sizes", "4,8", "--blocks", "2"],
        ["4", "8", "0.001", "0.003", "0.01", "0.03", "0.1"],
        "gradient.png",
    ),
    "study_merge": (
        [
            *("--books", "first.txt,second.txt", "--vocab", "400", "--width", "16", "--pretraining", "2"),
            *("--tuning", "2", "--members", "4", "--generations", "1", "--rows", "4"),
        ],
        [
            *("base", "fine-tuned on first", "fine-tuned on second", "soup: equal shares", "task arithmetic, 1 each"),
            *("TIES, density 0.2, 1 each", "evolved linear", "evolved linear, by layer", "evolved task arithmetic"),
            *("evolved task arithmetic, by layer", "evolved TIES, density too", "one model fine-tuned on both"),
        ],
        None,
    ),
    "study_pbt": (
        ["--data", "text.txt", "--steps", "2", "--every", "1", "--batch_size", "2"],
        ["grid of constant rates", "grid of cosines", "population-based training"],
        "pbt.png",
    ),
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("studies")
    library = Path(sysconfig.get_paths()["stdlib"])
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(library.glob("[a-d]*.py")))
    for name, part in (("first", text[:60_000]), ("second", text[60_000:120_000]), ("text", text[:300_000])):
        (place / f"{name}.txt").write_text(part, encoding="utf-8")
    return place


def test_the_books_of_study_merge_are_downloaded_or_parts_of_the_library(
    texts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One command wherever it runs; which texts it took is said, and in the table."""
    import study_merge

    asked: list[str] = []

    def fetch(address: str, downloads: Any) -> Path:
        asked.append(address)
        return (
            texts / f"{Path(urlsplit(address).path).stem.replace('Emma', 'first').replace('Moby-Dick', 'second')}.txt"
        )

    def refused(address: str, downloads: Any) -> Path:
        raise DataError(f"{address} cannot be downloaded: nobody there")

    monkeypatch.setattr(download, "fetch", fetch)
    assert list(study_merge.texts_of(study_merge.BOOKS)) == ["first", "second"]
    assert [re.sub(".*/|#sha256=[0-9a-f]{64}$", "", address) for address in asked] == ["Emma.md", "Moby-Dick.md"]
    monkeypatch.setattr(download, "fetch", refused)
    taken = study_merge.texts_of(study_merge.BOOKS)
    assert "Emma.md" in (said := capsys.readouterr().out)
    assert "nobody there; two parts of Python's own library take the place of the books" in said
    assert taken == study_merge.texts_of("stdlib")
    assert 300_000 < len(taken["reference"]) == len(taken["source"])
    with pytest.raises(DataError, match="nobody there"):
        study_merge.texts_of("https://host/a,https://host/b")


@pytest.mark.long
@pytest.mark.parametrize("name", STUDIES)
def test_a_study_ends_in_a_table_and_a_plot(name: str, texts: Path) -> None:
    """Eagerly: what is compiled elsewhere need not be here."""
    flags, rows, plot = STUDIES[name]
    command = [sys.executable, str(ROOT / "experiments" / f"{name}.py"), *flags]
    out = texts / name
    command += ["--out", str(out)] if plot else []
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    done = subprocess.run(command, cwd=texts, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in done.stdout.splitlines()
        if line.startswith("|")
    ]
    lines = {first: more for first, *more in cells}
    assert [first for first, *_ in cells if first in rows] == rows
    assert all(re.search(r"\d", " ".join(lines[row])) for row in rows)
    assert "nan" not in done.stdout
    if plot:
        assert (out / plot).read_bytes().startswith(PNG)
