"""`tokenizer.json` and its settings for vocabularies of this project: plain JSON, which Hugging Face's tools read.

The vocabulary is written with real spaces, so that nothing has to be replaced in a text and a literal U+2581 is what it
is: a character that may be unknown, and then its bytes. A text is cut where this project cuts it. Special tokens are
listed as such; Hugging Face's tools, unlike this project, find them in a text that spells them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from functional_lm.text.interface import ASSISTANT, CHAT, END, SYSTEM, TOKENIZERS_FILE, USER

FILE = TOKENIZERS_FILE
Json = dict[str, Any]
# The layout of `chat.py` for Hugging Face's `apply_chat_template`; here nothing reads it. `chat.prompt` gives its ids.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    + "".join(
        f"{{% {'if' if role == 'system' else 'elif'} message['role'] == '{role}' %}}{{{{ '{marker}' }}}}"
        for role, marker in (("system", SYSTEM), ("user", USER), ("assistant", ASSISTANT))
    )
    + "{% else %}{{ raise_exception('a role is system, user or assistant, not ' + message['role']) }}{% endif %}"
    f"{{{{ message['content'] + '{END}' }}}}{{% endfor %}}"
    f"{{% if add_generation_prompt %}}{{{{ '{ASSISTANT}' }}}}{{% endif %}}"
)


def bpe(pieces: Sequence[str], texts: Iterable[str], unknown: str) -> Json:
    """A BPE model over `pieces` (by id). `texts` are those that text is made of, in the order of their merging.

    Every way to merge two of them into a third is listed. Of two ways to the same piece, a long left part goes first:
    runs of one character are merged from the left.
    """
    ranked = list(texts)
    known = set(ranked)
    merges = [
        [text[:cut], text[cut:]]
        for text in ranked
        for cut in range(len(text) - 1, 0, -1)
        if text[:cut] in known and text[cut:] in known
    ]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    return {"type": "BPE", "unk_token": unknown, "byte_fallback": True, "vocab": vocabulary, "merges": merges}


def unigram(pieces: Sequence[str], score: Callable[[int], float | None], unknown: int) -> Json:
    """A unigram model: pieces with their scores; None for those that no text has (bytes, special tokens).

    Hugging Face adds the scores in another precision than SentencePiece: the ids of a text may differ where two ways
    to cut it are equally likely (" " and "  " in one order or the other).
    """
    never = -1e4  # cheaper to be avoided than any text, and not so low that sums with it would lose their digits
    vocabulary = [
        [piece, never if value is None else value] for number, piece in enumerate(pieces) for value in [score(number)]
    ]
    return {"type": "Unigram", "unk_id": unknown, "byte_fallback": True, "vocab": vocabulary}


def document(model: Json, special: Mapping[str, int], segment: str, prefix: str = "") -> Json:
    """The whole file around a model. `segment` is the expression whose matches are encoded one by one.

    A unigram model there would read a text that spells a byte piece (`<0x41>`) as that byte: it is cut after the `<`.
    """
    cuts = [r"<(?=0x[0-9A-F]{2}>)"] * (model["type"] == "Unigram") + [segment]
    splits = [{"type": "Split", "pattern": {"Regex": cut}, "behavior": "Isolated", "invert": False} for cut in cuts]
    decoders: list[Json] = [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if prefix:
        decoders.append({"type": "Strip", "content": prefix, "start": len(prefix), "stop": 0})
    token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, "content": name, **token} for name, number in special.items()],
        "normalizer": {"type": "Prepend", "prepend": prefix} if prefix else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": splits},
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": model,
    }


def settings(special: Mapping[str, int], bos: int, eos: int, unknown: int | None) -> Json:
    """`tokenizer_config.json`: `AutoTokenizer` then takes `tokenizer.json` as it is and adds no token."""
    names = {number: name for name, number in special.items()}
    roles = {"bos_token": bos, "eos_token": eos, "unk_token": unknown}
    named = {role: names[number] for role, number in roles.items() if number is not None}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
        "additional_special_tokens": [name for name in special if name not in named.values()],
        "model_input_names": ["input_ids", "attention_mask"],
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        **({"chat_template": CHAT_TEMPLATE} if set(CHAT) <= special.keys() else {}),
    }
