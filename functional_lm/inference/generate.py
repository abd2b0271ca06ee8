"""Generation as two pure functions over a cache, `prefill` and `decode_step`, and a plain loop that drives them.

A slot's next token is a function of (params, its tokens, its key, its settings) alone: the draw for the token at
position n uses `fold_in(slot key, n)`, so that neither its neighbours nor its slot change what it says.

Axes: S slots, T time, V vocabulary, C cache length.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from functional_lm import keys, tree
from functional_lm.compile import compiled
from functional_lm.inference import cache as kv
from functional_lm.inference.sampling import Penalties, Sampling, sample
from functional_lm.model.config import ModelConfig
from functional_lm.model.linear import precision
from functional_lm.model.transformer import forward_cached, hidden, project_logits
from functional_lm.tree import Tree

# Tokens that one prefill call takes, a graph each. A processor is busy with 64; a shorter prompt need not wait as long.
CHUNKS, ACCELERATOR_CHUNKS = (16, 64), (32, 128, 512)


class Slots(NamedTuple):
    """What the running sequences know besides the cache. A pytree.

    `tokens` [S] are the last ones, not yet in the cache; they stand at `positions` [S]. `drawn` [S] counts the tokens
    that the sequence has drawn so far, and selects the draw of the next. Without `penalties` there are none; with
    `adapters` [S] each names the entry of a bank that its slot goes through (`lora.select`).
    """

    tokens: Int[Tensor, "S"]
    positions: Int[Tensor, "S"]
    drawn: Int[Tensor, "S"]
    keys: Int[Tensor, "S 2"]
    sampling: Sampling
    penalties: Penalties | tuple[()] = ()
    adapters: Int[Tensor, "S"] | tuple[()] = ()


class Scores(NamedTuple):
    """Natural log-likelihoods under the model itself, before temperature and penalties. N rows, the K likeliest."""

    chosen: Float[Tensor, "N"]
    values: Float[Tensor, "N K"]
    ids: Int[Tensor, "N K"]


ALTERNATIVES = 20  # K, or V if that is less


def score(logits: Float[Tensor, "N V"], tokens: Int[Tensor, "N"]) -> Scores:
    """How likely each row's token was, and which ones were likeliest."""
    likely = torch.log_softmax(logits.float(), -1)
    values, ids = likely.topk(min(ALTERNATIVES, likely.shape[-1]), -1)
    return Scores(likely.gather(-1, tokens[:, None])[:, 0], values, ids)


def chunks(config: ModelConfig, device: torch.device) -> tuple[int, ...]:
    """How many tokens calls of `prefill` take, from few to many; the cache's length is a multiple of the last.

    A prompt is read in the largest, and its rest in the smallest that holds it: two prompts that begin with the same
    whole chunks have read them by the same calls, and so to the same bits.
    """
    sizes = CHUNKS if device.type == "cpu" else ACCELERATOR_CHUNKS
    return tuple(sorted({min(size, config.max_len) for size in sizes}))


def fitting(rest: int, sizes: tuple[int, ...]) -> int:
    """The chunk in which the next of `rest` tokens are read."""
    return next((size for size in sizes if size >= rest), sizes[-1])


def prefill(
    params: Tree,
    cache: Tree,
    tokens: Int[Tensor, "S T"],
    positions: Int[Tensor, "S"],
    last: Int[Tensor, "S"],
    config: ModelConfig,
) -> tuple[Tree, Float[Tensor, "S V"]]:
    """Put T tokens per slot into the cache from `positions` on; logits behind column `last` of each row.

    Columns after `last` are padding: the rows they write are hidden by causality until real tokens replace them.
    """
    written, x = _read(params, cache, tokens, positions, config)
    return written, project_logits(params, x[torch.arange(x.shape[0], device=x.device), last], config)


def prefill_slot(
    params: Tree,
    cache: Tree,
    tokens: Int[Tensor, "1 T"],
    slot: Int[Tensor, "1"],
    position: Int[Tensor, "1"],
    last: Int[Tensor, "1"],
    config: ModelConfig,
) -> tuple[Tree, Float[Tensor, "1 V"]]:
    """`prefill` of one slot of a cache that others use meanwhile: only its rows from `position` on are written."""
    cache, x = _read_slot(params, cache, tokens, slot, position, config)
    return cache, project_logits(params, x[0, last], config)


def prefill_scored(
    params: Tree,
    cache: Tree,
    tokens: Int[Tensor, "1 T"],
    following: Int[Tensor, "T"],
    slot: Int[Tensor, "1"],
    position: Int[Tensor, "1"],
    last: Int[Tensor, "1"],
    config: ModelConfig,
) -> tuple[Tree, tuple[Float[Tensor, "1 V"], Scores]]:
    """`prefill_slot`, and how likely the token `following` each of these was."""
    cache, x = _read_slot(params, cache, tokens, slot, position, config)
    logits = project_logits(params, x[0], config)
    return cache, (logits[last], score(logits, following))


def _read(
    params: Tree, cache: Tree, tokens: Int[Tensor, "S T"], positions: Int[Tensor, "S"], config: ModelConfig
) -> tuple[Tree, Float[Tensor, "S T D"]]:
    at = positions[:, None] + torch.arange(tokens.shape[-1], device=tokens.device)
    x, written = hidden(params, tokens, config, cache=cache, positions=at)
    assert written is not None
    return written, x


def _read_slot(
    params: Tree, cache: Tree, tokens: Tensor, slot: Tensor, position: Tensor, config: ModelConfig
) -> tuple[Tree, Float[Tensor, "1 T D"]]:
    own, x = _read(params, tree.map(lambda rows: rows.index_select(0, slot), cache), tokens, position, config)
    at = position + torch.arange(tokens.shape[-1], device=tokens.device)

    def put(rows: Tensor, new: Tensor) -> Tensor:
        head = torch.arange(rows.shape[1], device=rows.device)[:, None]
        return rows.index_put((slot[:, None], head, at[None, :]), new[0].index_select(-2, at))

    return tree.map(put, cache, own), x


def choose(logits: Float[Tensor, "S V"], slots: Slots, truncating: bool) -> Int[Tensor, "S"]:
    """The next token of each slot."""
    drawn = torch.vmap(keys.fold_in)(slots.keys, slots.drawn)
    return sample(logits, drawn, slots.sampling, truncating, slots.penalties or None)


def decode_step(
    state: tuple[Tree, Slots], params: Tree, config: ModelConfig, truncating: bool = True
) -> tuple[tuple[Tree, Slots], Int[Tensor, "S"]]:
    """One more token for every slot: `((cache, slots), params) -> ((cache, slots), tokens)`, sampling inside."""
    state, tokens, _ = _decode(state, params, config, truncating)
    return state, tokens


def decode_scored(
    state: tuple[Tree, Slots], params: Tree, config: ModelConfig, truncating: bool = True
) -> tuple[tuple[Tree, Slots], tuple[Int[Tensor, "S"], Scores]]:
    """`decode_step`, and how likely the tokens were."""
    state, tokens, logits = _decode(state, params, config, truncating)
    return state, (tokens, score(logits, tokens))


def _decode(
    state: tuple[Tree, Slots], params: Tree, config: ModelConfig, truncating: bool
) -> tuple[tuple[Tree, Slots], Int[Tensor, "S"], Float[Tensor, "S V"]]:
    cache, slots = state
    cache, logits = forward_cached(params, cache, slots.tokens[:, None], slots.positions, config)
    tokens = choose(logits[:, -1], slots, truncating)
    slots = slots._replace(tokens=tokens, positions=slots.positions + 1, drawn=slots.drawn + 1)
    if slots.penalties:
        slots = slots._replace(penalties=slots.penalties.counted(tokens))
    return (cache, slots), tokens, logits[:, -1]


# The loop ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GenerateOptions:
    """How to continue a text. Temperature 0 is greedy; top_k 0, top_p 1, min_p 0 and repetition_penalty 1 are off, and
    so are the other penalties at 0."""

    max_tokens: int = 200
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    @property
    def penalizes(self) -> bool:
        """Whether a slot has to remember what it has seen (or to compare with the likeliest)."""
        off = (0.0, 1.0, 0.0, 0.0)
        return (self.min_p, self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != off

    @property
    def truncates(self) -> bool:
        """Whether sampling needs the logits in order."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1)


class Decoder(NamedTuple):
    """The two functions of a generation, compiled or not; made once for a model and used for many texts."""

    prefill: Callable[..., tuple[Tree, Float[Tensor, "S V"]]]
    decode: Callable[..., tuple[tuple[Tree, Slots], Int[Tensor, "S"]]]
    config: ModelConfig
    truncating: bool


def decoder(config: ModelConfig, compile: bool = True, truncating: bool = True) -> Decoder:
    """`prefill` and `decode_step` for one architecture, with the cache donated where compiled."""
    config = dataclasses.replace(config, dropout=0.0, checkpoint_activations=False)
    fill = partial(_prefill_into, config=config)
    step = partial(decode_step, config=config, truncating=truncating)
    return Decoder(
        compiled(fill, donate=True, enabled=compile),
        compiled(step, donate=True, enabled=compile),
        config,
        truncating,
    )


def _prefill_into(
    cache: Tree,
    params: Tree,
    tokens: Int[Tensor, "S T"],
    positions: Int[Tensor, "S"],
    last: Int[Tensor, "S"],
    config: ModelConfig,
) -> tuple[Tree, Float[Tensor, "S V"]]:
    return prefill(params, cache, tokens, positions, last, config)


def generate(params: Tree, prompt: list[int], run: Decoder, options: GenerateOptions) -> Iterator[int]:
    """The continuation of `prompt`, token by token, until a stop id or `max_tokens`.

    When the model's longest context is full, the newer half of it is read again and generation goes on from there.
    The values of `params` decide the precision. Raises ValueError for an empty prompt, and for top_k or top_p with a
    decoder that was made without them.
    """
    if not prompt:
        raise ValueError("generation needs at least one token to go on from")
    if options.truncates and not run.truncating:
        raise ValueError("top_k and top_p need a decoder made with truncating=True")
    device = tree.leaves(params["model"]["embed_tokens"])[0].device
    longest = run.config.max_len
    text = list(prompt[-longest:])
    cache, logits = read(params, text, run, device)
    slots = Slots(
        torch.zeros(1, dtype=torch.int64, device=device),
        torch.tensor([len(text)], device=device),
        torch.zeros(1, dtype=torch.int64, device=device),
        keys.key(options.seed, device)[None],
        Sampling.uniform(1, options.temperature, options.top_k, options.top_p, device),
        _penalties(prompt, run.config.vocab_size, options, device) if options.penalizes else (),
    )
    slots, token = _chosen(logits, slots, run.truncating)
    for count in range(1, options.max_tokens + 1):
        yield token
        if token in options.stop_ids or count == options.max_tokens:
            return
        text.append(token)
        drawn = torch.tensor([count], device=device)
        if len(text) > longest:
            text = text[-(longest // 2 + 1) :]
            cache, logits = read(params, text, run, device)
            slots = slots._replace(positions=torch.tensor([len(text)], device=device), drawn=drawn)
            slots, token = _chosen(logits, slots, run.truncating)
        else:
            position = torch.tensor([len(text) - 1], device=device)
            slots = slots._replace(tokens=torch.tensor([token], device=device), positions=position, drawn=drawn)
            (cache, slots), tokens = run.decode((cache, slots), params)
            token = int(tokens)


def _chosen(logits: Float[Tensor, "1 V"], slots: Slots, truncating: bool) -> tuple[Slots, int]:
    """The token behind what has been read, counted."""
    token = choose(logits, slots, truncating)
    if slots.penalties:
        slots = slots._replace(penalties=slots.penalties.counted(token))
    return slots, int(token)


def _penalties(prompt: list[int], vocab_size: int, options: GenerateOptions, device: torch.device) -> Penalties:
    none = Penalties.none(1, vocab_size, device)
    seen = torch.tensor(prompt, device=device)
    return none._replace(
        min_p=none.min_p + options.min_p,
        repetition=none.repetition * options.repetition_penalty,
        presence=none.presence + options.presence_penalty,
        frequency=none.frequency + options.frequency_penalty,
        prompted=none.prompted.index_put((torch.zeros_like(seen), seen), torch.ones((), dtype=torch.bool)),
    )


def read(params: Tree, tokens: list[int], run: Decoder, device: torch.device) -> tuple[Tree, Float[Tensor, "1 V"]]:
    """A fresh cache of one slot that holds `tokens`, and the logits behind them; chunk by chunk."""
    sizes = chunks(run.config, device)
    rows = -(-run.config.max_len // sizes[-1]) * sizes[-1]
    cache = kv.init(run.config, 1, rows, precision(params["model"]["embed_tokens"]), device)
    logits = None
    for start in range(0, len(tokens), sizes[-1]):
        part = tokens[start : start + sizes[-1]]
        padded = torch.tensor([part + [0] * (fitting(len(part), sizes) - len(part))], device=device)
        at, last = torch.tensor([start], device=device), torch.tensor([len(part) - 1], device=device)
        cache, logits = run.prefill(cache, params, padded, at, last)
    assert logits is not None
    return cache, logits
