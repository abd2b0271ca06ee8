"""Rewrite the README's tables of flags from the commands themselves: `python tools/readme.py`.

A test holds them equal. A table stands between `<!-- flags: VERB -->` and `<!-- end -->`.
"""

from __future__ import annotations

import re
from pathlib import Path

from functional_lm import files
from functional_lm.__main__ import COMMANDS
from functional_lm.cli import table

README = Path(__file__).resolve().parent.parent / "README.md"
BLOCK = re.compile(r"(<!-- flags: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def renewed(text: str) -> str:
    """The text with every table of flags made anew."""
    commands = {command.name: command for command in COMMANDS}
    return BLOCK.sub(lambda found: f"{found[1]}\n{table(commands[found[2]]).strip()}\n\n{found[3]}", text)


if __name__ == "__main__":
    files.write_text(README, renewed(README.read_text(encoding="utf-8")))
