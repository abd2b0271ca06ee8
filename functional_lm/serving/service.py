"""What the routes know: the engine, its tokenizer, the names of the model and its adapters, and the limits."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from functional_lm import sampling_settings
from functional_lm.errors import FunctionalLMError, UsageError
from functional_lm.inference.engine import Engine, Request, TooMuch
from functional_lm.serving import forms
from functional_lm.text import chat
from functional_lm.text.interface import ASSISTANT
from functional_lm.text.tokenizer import Tokenizer
from functional_lm.tree import Tree

LONGEST_BREATH = 0.1  # seconds: to a reader ten pieces a second still flow
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")  # of an adapter: it is no path and stands in one line


class NotFound(FunctionalLMError):
    """A model of that name is not served."""

    def __init__(self, name: str, names: Sequence[str]) -> None:
        super().__init__(f"there is no model {name[:80]!r}; there is {', '.join(names)}")


_numbers = itertools.count()


def unique() -> str:
    """A name that no other request has: 15 hexadecimal digits of the clock, the process and a count. Not a secret."""
    return hashlib.sha256(f"{time.time_ns()} {os.getpid()} {next(_numbers)}".encode()).hexdigest()[:15]


@dataclass
class Service:
    """One model behind the routes."""

    engine: Engine
    tokenizer: Tokenizer
    given: tuple[str, ...]  # names of the model, then of the adapters that the engine's bank began with
    api_keys: Sequence[str] = ()
    seconds: float = 300.0  # longest time of a request
    body_bytes: int = 4 << 20
    max_tokens: int | None = None  # most that a request may ask for
    origins: Sequence[str] = ()  # whose pages may ask ("*": everybody's)
    patience: float = 60.0  # seconds without a turn of the engine after which it is not healthy
    pause: float = 0.0  # seconds between two events of a stream: what is written meanwhile goes out together
    settings: Mapping[str, float] = field(default_factory=dict)  # how the model wants its tokens chosen
    open_adapter: Callable[[str], Tree] | None = None  # reads an adapter's folder while the server runs
    draining: bool = False
    started: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self._adapters = {name: number for number, name in enumerate(self.given)}
        self._changing = threading.Lock()

    @property
    def names(self) -> list[str]:
        """Of the model, then of its adapters."""
        return list(self._adapters)

    def breath(self) -> float:
        """Seconds between two events of a stream now: `pause`, and longer (up to LONGEST_BREATH) while others wait.

        Where more ask than there are slots, what an event costs is taken from those who wait.
        """
        return max(self.pause, min(LONGEST_BREATH, self.pause * self.engine.crowding))

    @property
    def obstacle(self) -> str | None:
        """Why nobody is served; None while all is well."""
        if self.engine.failure is not None:
            return f"the engine has stopped: {self.engine.failure}"
        if self.draining:
            return "the server is going down and finishes what is being written"
        if self.engine.stalled > self.patience:
            return f"the engine has delivered nothing for {self.engine.stalled:.0f} s"
        return None

    def named(self, given: str | None) -> int:
        """The engine's number of the adapter that a request means. Raises NotFound."""
        number = self._adapters.get(given) if given is not None else 0
        if number is None:
            raise NotFound(str(given), self.names)
        return number

    # Adapters that come and go ----------------------------------------------------------------------------------------

    def load_adapter(self, name: str, path: str) -> None:
        """Serve the adapter in a folder as a model. Raises UsageError for a name or a path that cannot be meant."""
        if self.open_adapter is None:
            raise UsageError("this server loads no adapters; start it with --adapter_folder and --max_adapters")
        if not NAME.fullmatch(name):
            raise UsageError("lora_name can be up to 128 of A-Z a-z 0-9 . _ : - and begins with a letter or a digit")
        with self._changing:
            if name in self._adapters:
                raise UsageError(f"there is a model {name!r} already; unload it first")
            self._adapters[name] = self.engine.load_adapter(self.open_adapter(path))

    def unload_adapter(self, name: str) -> None:
        """Serve an adapter no more. Raises NotFound, and UsageError for the model itself."""
        with self._changing:
            if self.named(name) == 0:
                raise UsageError(f"{name!r} is the model itself, which stays")
            self.engine.unload_adapter(self._adapters.pop(name))

    # From a form to the engine ----------------------------------------------------------------------------------------

    def ids(self, prompt: str | list[int]) -> tuple[int, ...]:
        """Token ids of a prompt; an empty one is the beginning of a document."""
        found = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        return tuple(found) or (self.tokenizer.bos_id,)

    def chat_ids(self, messages: Sequence[forms.Message]) -> tuple[int, ...]:
        """The messages as the model has learned chats, up to where the assistant begins."""
        self.chat_stops()
        return tuple(chat.prompt(self.tokenizer, [chat.turn(one.role, one.content) for one in messages]))

    def chat_stops(self) -> tuple[int, ...]:
        """What ends an answer. Raises UsageError where the tokenizer has no tokens for roles."""
        if ASSISTANT not in self.tokenizer.special_ids:
            raise UsageError("this model's tokenizer has no tokens for the roles of a chat")
        return chat.stops(self.tokenizer)

    def room(self, answers: int) -> None:
        """Raise TooMuch for more answers than the queue has places, which might never be taken."""
        if answers > self.engine.waiting:
            raise TooMuch(f"{answers} answers at once are more than the {self.engine.waiting} that may wait here")

    def request(
        self,
        form: forms.Sampled,
        prompt: tuple[int, ...],
        max_tokens: int | None,
        choice: int = 0,
        ends: Sequence[int] = (),
        logprobs: int | None = None,
        echo: bool = False,
    ) -> Request:
        """What a form asks of the engine; `choice` numbers the answers to one prompt, which differ by their seeds."""
        most = self.max_tokens if self.max_tokens is not None else self.engine.longest
        if self.max_tokens is not None and max_tokens is not None and max_tokens > self.max_tokens:
            raise TooMuch(f"max_tokens is {max_tokens}; this server writes {self.max_tokens} at most")
        seed = form.seed if form.seed is not None else int(unique(), 16)
        room = self.engine.longest - len(prompt)
        return Request(
            prompt,
            max(1, min(most if max_tokens is None else max_tokens, room)),
            **{name: self._setting(form, name) for name in sampling_settings.USUAL},
            logit_bias={self._token(name): value for name, value in (form.logit_bias or {}).items()},
            seed=(seed + choice) % 2**63,
            stop_ids=(self.tokenizer.eos_id, *ends),
            seconds=self.seconds,
            logprobs=logprobs,
            prompt_logprobs=echo and logprobs is not None,
            adapter=self.named(form.model),
        )

    def _setting(self, form: forms.Sampled, name: str) -> Any:
        """What the request says, else what the model's folder says, else the form's own."""
        asked = getattr(form, name)
        return asked if name in form.model_fields_set else self.settings.get(name, asked)

    @staticmethod
    def _token(name: str) -> int:
        if not (name.isascii() and name.isdecimal() and len(name) < 12):
            raise UsageError(f"logit_bias: {name[:40]!r} is no token id")
        return int(name)
