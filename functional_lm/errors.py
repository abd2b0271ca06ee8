"""The two ways a command refuses: the user asked for something wrong, or something went wrong on the way.

Both print as one line (the value, the limit, the remedy) without a traceback; their exit codes differ.
"""

from __future__ import annotations

from typing import Any

KINDS = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list",
         dict: "an object"}  # fmt: skip


class FunctionalLMError(Exception):
    """Base of the errors that a command reports in one line."""

    exit_code = 1


class UsageError(FunctionalLMError):
    """A flag, value or combination that cannot be meant: exit code 2, before any work begins."""

    exit_code = 2


class DataError(FunctionalLMError):
    """A file or its contents cannot be used (missing, foreign, damaged, inconsistent): exit code 1."""


def json_kind(value: Any) -> str:
    """What a value of a file is, in JSON's words rather than Python's: null, a list, an object, ..."""
    return KINDS.get(type(value), type(value).__name__)
