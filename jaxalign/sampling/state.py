"""The state that decoding carries from token to token."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxalign.core.types import SamplingParams
from jaxalign.models.cache import KV
from jaxalign.models.config import CausalConfig

LENGTH, EOS, STOP = 0, 1, 2  # values of `Samples.finish`


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fixed:
  """The part of the state that stays the same from the first token on."""

  past: tuple[KV, ...]  # prefix and prompts
  start: Int[Array, " B"]  # position of the first new token
  limit: Int[Array, " B"]  # new tokens a row may have
  keys: Array  # [B], one random key a row


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  """The part of the state that every drawn token changes."""

  drawn: Int[Array, ""]  # tokens drawn so far, the same for all rows
  history: Int[Array, "B W"]  # prompt, right-aligned, then N new tokens
  own: KV  # keys of the new tokens
  # True = token in prompt or sample; None without a repetition penalty.
  seen: Bool[Array, "B V"] | None
  done: Bool[Array, " B"]  # True = the row draws no more
  # As in `Samples`.
  lengths: Int[Array, " B"]
  finish: Int[Array, " B"]
  model_logps: Float[Array, "B N"]
  sampling_logps: Float[Array, "B N"]


def first_state(
  config: CausalConfig,
  context: Int[Array, "B C"],
  done: Bool[Array, " B"],
  settings: SamplingParams,
  capacity: int,
  stacked: bool = False,
) -> State:
  """The state before the first draw.

  Args:
    config: the model's.
    context: tokens before the first new one, right-aligned; -1 = none.
    done: rows that stay empty.
    settings: for the width of its stop sequences, and whether it has a
      repetition penalty.
    capacity: N, new tokens at most.
    stacked: whether the caches of all layers are one array.
  """
  rows, before = context.shape
  # A stop sequence may look back this far from the first new token.
  before = max(before, settings.stops.shape[1])
  history = jnp.full((rows, before + capacity), -1, jnp.int32)
  history = history.at[:, before - context.shape[1] : before].set(context)
  seen = None
  if settings.repetition_penalty is not None:
    # An id beyond the vocabulary is dropped by the scatter.
    ids = jnp.where(context >= 0, context, config.vocab_size)
    seen = jnp.zeros((rows, config.vocab_size), bool)
    seen = seen.at[jnp.arange(rows)[:, None], ids].set(True, mode="drop")
  # Updated in place in the loop.
  shape = (config.layers, rows, config.kv_heads, capacity, config.head_dim)
  zeros = jnp.zeros(shape, config.dtype)
  own = KV(
    zeros,
    zeros,
    jnp.zeros((rows, capacity), jnp.int32),
    jnp.zeros((rows, capacity), bool),
  )
  own = own if stacked else own.unstack()
  logps = jnp.zeros((rows, capacity), jnp.float32)
  # For both `lengths` and `finish`, where 0 is LENGTH.
  count = jnp.zeros(rows, jnp.int32)
  return State(
    jnp.zeros((), jnp.int32),
    history,
    own,
    seen,
    done,
    count,
    count,
    logps,
    logps,
  )


def last_tokens(state: State) -> Int[Array, " B"]:
  """The tokens drawn last."""
  return jax.lax.dynamic_index_in_dim(
    state.history, column_of(state) - 1, axis=1, keepdims=False
  )


def column_of(state: State) -> Int[Array, ""]:
  """Where in `history` the next token goes."""
  # The new tokens have the last N columns.
  capacity = state.model_logps.shape[1]
  return state.history.shape[1] - capacity + state.drawn


def ends_with_stop(
  history: Int[Array, "B W"],
  column: Int[Array, ""],
  drawn: Int[Array, ""],
  stops: Int[Array, "M U"],
) -> Bool[Array, " B"]:
  """Whether the token at `column` completes a stop sequence.

  The whole sequence must be drawn: `drawn` tokens come before `column`.
  """
  width = stops.shape[1]
  # The prompt part of `history` is at least as wide as a stop sequence.
  tail = jax.lax.dynamic_slice_in_dim(history, column - width + 1, width, 1)
  used = stops >= 0
  # An unused row of the table would match everything.
  fits = used.any(axis=1) & (used.sum(axis=1) <= drawn + 1)
  # Right-aligned: the unused entries before a shorter sequence match anything.
  equal = (tail[:, None] == stops) | ~used
  return (equal.all(axis=2) & fits).any(axis=1)


def row_keys(
  key: Array, prompt_numbers: Int[Array, " P"], sample_ids: Int[Array, " S"]
) -> Array:
  """A random key for each row, from its prompt's and its own number alone."""
  fold = jax.random.fold_in
  # Key -> prompt -> sample: the row's place in the batch does not matter.
  per_prompt = jax.vmap(lambda p: fold(key, p))(prompt_numbers)
  both = jax.vmap(jax.vmap(fold, (None, 0)), (0, None))
  return both(per_prompt, sample_ids).reshape(-1)
