"""Bytes that nobody meant, thrown at every parser: `python tools/fuzz.py --seconds 60`.

Each input is a sound file with some of its bytes changed, a pure function of (parser, number). A parser may return, or
raise an error of this package; anything else (another exception, a crash of the process, more than ten
seconds) is a finding: its number is printed. `--replay PARSER NUMBER` makes it again, and its line for
tests/data/fuzz_seeds.txt, where findings are kept with their bytes and tried first. Where a digest guards what lies
behind it, half of the inputs carry a new digest, so that what lies behind is reached.
"""

from __future__ import annotations

import argparse
import base64
import json
import mmap
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from fuzz_parsers import Parser, parsers

SEEDS = Path(__file__).resolve().parents[1] / "tests" / "data" / "fuzz_seeds.txt"
BATCH = 500  # inputs of a process
WORDS = [
    b"null", b"true", b"-1", b"0", b"1e999", b"NaN", b"-Infinity", b"99999999999999999999999", b"0.5", b'""', b"[]",
    b"{}", b'"\\ud800"', b"[" * 3000, b'{"a":' * 3000, b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\r\n", b"\n\n", b'"',
    b",", b":", b"\xe2\x96\x81", b"9" * 5000, b"/../../x",
]  # fmt: skip
NUMBERS = [0, 1, 7, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**64 - 1]


def mutated(parser: Parser, number: int, sound: bytes) -> bytes:
    draw = random.Random(f"{parser.name} {number}")
    data = bytearray(sound)
    for _ in range(draw.choice((1, 1, 1, 2, 3, 6))):
        place = draw.randrange(len(data) + 1)
        length = draw.choice((1, 1, 2, 4, 8, draw.randrange(1, 200)))
        match draw.randrange(9):
            case 0 if place < len(data):
                data[place] ^= 1 << draw.randrange(8)
            case 1 if place < len(data):
                data[place] = draw.randrange(256)
            case 2:
                del data[place : place + length]
            case 3:
                data[place:place] = draw.randbytes(length)
            case 4:
                data[place:place] = data[max(0, place - length) : place]
            case 5:
                data[place : place + draw.choice((0, length))] = draw.choice(WORDS)
            case 6:
                del data[place:]
            case 7:
                size = draw.choice((4, 8))
                packed = struct.pack("<Q", draw.choice(NUMBERS))[:size]
                place -= place % size
                data[place : place + size] = packed
            case 8:
                data[place : place + length] = bytes(len(data[place : place + length]))
    made = bytes(data)
    return parser.mend(made) if parser.mend is not None and number % 2 else made


# Running --------------------------------------------------------------------------------------------------------------


def attempt(parser: Parser, made: bytes) -> str | None:
    """What is wrong with how an input was taken; None if nothing is."""
    from functional_lm.errors import FunctionalLMError

    parser.sound.write_bytes(made)
    signal.alarm(10)
    try:
        parser.read(parser.sound)
    except FunctionalLMError:
        return None
    except BaseException:
        return traceback.format_exc()
    finally:
        signal.alarm(0)
    return None


def batch(parser: Parser, first: int, sound: bytes, place: mmap.mmap) -> Iterator[tuple[int, str]]:
    """Findings of BATCH inputs, made in a process that may die."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError("ten seconds")))
        with os.fdopen(writer, "w") as out, open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
            for number in range(first, first + BATCH):
                place[:8] = struct.pack("<Q", number)
                if finding := attempt(parser, mutated(parser, number, sound)):
                    out.write(json.dumps([number, finding]) + "\n")
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as found:
        for line in found:
            number, finding = json.loads(line)
            yield number, finding
    _, status = os.waitpid(child, 0)
    if status:
        yield struct.unpack("<Q", place[:8])[0], f"the process died ({status})"


def kept() -> list[tuple[str, int, bytes]]:
    """What was found before: parser, number, and the bytes that it had then (writers may write others by now)."""
    lines = SEEDS.read_text().splitlines() if SEEDS.is_file() else []
    parts = [line.rsplit(" ", 2) for line in lines if not line.startswith("#")]
    return [(name, int(number), zlib.decompress(base64.b64decode(packed))) for name, number, packed in parts]


def seed(parser: Parser, number: int, sound: bytes) -> str:
    """The line of the seeds for an input."""
    packed = base64.b64encode(zlib.compress(mutated(parser, number, sound), 9)).decode()
    return f"{parser.name} {number} {packed}"


def again(parser: Parser, sound: bytes) -> list[tuple[int, str]]:
    """Findings among the inputs that were findings before: as they were, and as they are today."""
    old = [(number, made) for name, number, made in kept() if name == parser.name]
    inputs = [*old, *((number, mutated(parser, number, sound)) for number, _ in old)]
    found = [(number, attempt(parser, made)) for number, made in inputs]
    parser.sound.write_bytes(sound)
    return [(number, finding) for number, finding in found if finding]


def fuzz(
    root: Path, seconds: float, begin: int = 0, inputs: int = 0, only: Sequence[str] = ()
) -> tuple[Counter[str], list[tuple[str, int, str]]]:
    """Inputs by parser, and findings, until the time is up or there were so many inputs."""
    made = [parser for parser in parsers(root) if not only or parser.name in only]
    counts, findings = Counter[str](), []
    place = mmap.mmap(-1, 8)
    contents = {parser.name: parser.sound.read_bytes() for parser in made}
    until = time.monotonic() + seconds
    for parser in made:
        findings += [(parser.name, number, finding) for number, finding in again(parser, contents[parser.name])]
    first = begin
    while time.monotonic() < until and (not inputs or sum(counts.values()) < inputs):
        for parser in made:
            for number, finding in batch(parser, first, contents[parser.name], place):
                findings.append((parser.name, number, finding))
            parser.sound.write_bytes(contents[parser.name])
            counts[parser.name] += BATCH
        first += BATCH
    return counts, findings


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seconds", type=float, default=60.0)
    options.add_argument("--inputs", type=int, default=0, help="stop after so many")
    options.add_argument("--begin", type=int, default=0, help="the first number")
    options.add_argument("--only", nargs="+", default=(), metavar="PARSER", help="these parsers alone")
    options.add_argument("--replay", nargs=2, metavar=("PARSER", "NUMBER"))
    given = options.parse_args()
    memory = Path("/dev/shm")
    root = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else None))
    started = time.monotonic()
    try:
        if given.replay:
            parser = next(parser for parser in parsers(root) if parser.name == given.replay[0])
            sound = parser.sound.read_bytes()
            print(made := mutated(parser, int(given.replay[1]), sound))
            print(seed(parser, int(given.replay[1]), sound))
            print(attempt(parser, made))
            return 0
        counts, findings = fuzz(root, given.seconds, given.begin, given.inputs, given.only)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    kinds: dict[tuple[str, str], int] = {}
    for name, number, finding in findings:
        key = name, finding.strip().splitlines()[-1]
        if key not in kinds:
            print(f"{name} {number}: {finding.strip()}\n", file=sys.stderr)
        kinds[key] = kinds.get(key, 0) + 1
    seconds = time.monotonic() - started
    print(f"{sum(counts.values()):,} inputs, {len(counts)} parsers, {len(findings)} findings in {seconds:.0f} s")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
