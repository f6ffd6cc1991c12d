"""Checks sampling settings and packs them for the sampler."""

import numbers
from collections.abc import Sequence

import numpy as np

from jaxalign.core.types import SamplingParams
from jaxalign.data.tokenizer import MOST_ENDS
from jaxalign.errors import UserError

# Fixed sizes of the tables, which are traced: see `SamplingParams`.
EOS_SLOTS = MOST_ENDS
STOP_SLOTS = 8
STOP_WIDTH = 16


def fitting(stops: Sequence[Sequence[int]]) -> list[Sequence[int]]:
  """The stops that the sampler has room for; texts are cut at all of them."""
  return [ids for ids in stops if 1 <= len(ids) <= STOP_WIDTH][:STOP_SLOTS]


def make(
  *,
  temperature: float | int = 1.0,
  top_p: float | int = 1.0,
  top_k: int = 0,
  repetition_penalty: float | int = 1.0,
  no_repeat_ngram: int = 0,
  min_new_tokens: int = 0,
  max_new_tokens: int = 64,
  eos_ids: Sequence[int] = (),
  stops: Sequence[Sequence[int]] = (),
  pad_id: int = 0,
) -> SamplingParams:
  """Checks the settings and packs them for the sampler.

  Args:
    temperature: divides the logits; 0 takes the likeliest token.
    top_p: draw from the likeliest tokens that have this much probability.
    top_k: draw from the k likeliest tokens; 0 = all.
    repetition_penalty: divides the positive and multiplies the negative logits
      of tokens that occur in the prompt or the sample so far.
    no_repeat_ngram: no run of this many tokens occurs twice; 0 = off.
    min_new_tokens: end-of-text is not drawn before this many tokens.
    max_new_tokens: a sample ends after this many tokens.
    eos_ids: ids that end a sample; at most `EOS_SLOTS`.
    stops: token sequences that end a sample and stay in it; at most
      `STOP_SLOTS`, each of at most `STOP_WIDTH` tokens.
    pad_id: written after a sample's end.

  Raises:
    UserError: a value is out of its range.
  """
  # Checking the ranges.
  for name, value in (
    ("top_k", top_k),
    ("no_repeat_ngram", no_repeat_ngram),
    ("min_new_tokens", min_new_tokens),
    ("max_new_tokens", max_new_tokens),
  ):
    _check(name, value, isinstance(value, numbers.Integral), "a whole number")
  for name, value in (
    ("temperature", temperature),
    ("top_p", top_p),
    ("repetition_penalty", repetition_penalty),
  ):
    _check(name, value, isinstance(value, numbers.Real), "a number")
  _check("pad_id", pad_id, isinstance(pad_id, numbers.Integral), "a token id")
  _check("eos_ids", eos_ids, _are_ids(eos_ids), "a list of token ids")
  ok = isinstance(stops, Sequence) and all(map(_are_ids, stops))
  _check("stops", stops, ok, "a list of lists of token ids")
  _check("temperature", temperature, temperature >= 0, ">= 0")
  _check("top_p", top_p, 0 < top_p <= 1, "in (0, 1]")
  _check("top_k", top_k, top_k >= 0, ">= 0 (0 = off)")
  ok = repetition_penalty > 0
  _check("repetition_penalty", repetition_penalty, ok, "> 0 (1 = off)")
  _check("no_repeat_ngram", no_repeat_ngram, no_repeat_ngram >= 0, ">= 0")
  _check("min_new_tokens", min_new_tokens, min_new_tokens >= 0, ">= 0")
  _check("max_new_tokens", max_new_tokens, max_new_tokens >= 1, ">= 1")
  ok = min_new_tokens <= max_new_tokens
  rule = f"at most max_new_tokens={max_new_tokens}"
  _check("min_new_tokens", min_new_tokens, ok, rule)
  ok = len(eos_ids) <= EOS_SLOTS
  _check("eos_ids", list(eos_ids), ok, f"at most {EOS_SLOTS} ids")
  ok = len(stops) <= STOP_SLOTS and all(
    1 <= len(s) <= STOP_WIDTH for s in stops
  )
  rule = f"at most {STOP_SLOTS} sequences of 1 to {STOP_WIDTH} tokens"
  _check("stops", [list(s) for s in stops], ok, rule)

  # Filling the tables; stop sequences are compared from their last token.
  table = np.full((STOP_SLOTS, STOP_WIDTH), -1, np.int32)
  for row, stop in zip(table, stops, strict=False):
    row[STOP_WIDTH - len(stop) :] = stop
  # No token has the id -1, so an unused entry ends nothing.
  ends = np.full(EOS_SLOTS, -1, np.int32)
  ends[: len(eos_ids)] = eos_ids

  # numpy scalars: Python's are weakly typed, which would trace a new program.
  def traced(value, off, dtype):
    return None if value == off else np.asarray(value, dtype)

  greedy = temperature == 0
  return SamplingParams(
    temperature=None if greedy else traced(temperature, 1, np.float32),
    top_p=traced(top_p, 1, np.float32),
    top_k=traced(top_k, 0, np.int32),
    repetition_penalty=traced(repetition_penalty, 1, np.float32),
    min_new_tokens=traced(min_new_tokens, 0, np.int32),
    max_new_tokens=np.asarray(max_new_tokens, np.int32),
    eos_ids=ends,
    stops=table,
    pad_id=np.asarray(pad_id, np.int32),
    greedy=bool(greedy),
    no_repeat_ngram=int(no_repeat_ngram),
  )


def _are_ids(value: object) -> bool:
  """Whether a value is a list of whole numbers, or an array of them."""
  return isinstance(value, Sequence | np.ndarray) and all(
    isinstance(token, numbers.Integral) for token in value
  )


def _check(name: str, value: object, ok: bool, rule: str) -> None:
  if not ok:
    raise UserError(
      f"sampling.{name} must be {rule}, got {value}; change it in the sampling"
      " settings"
    )
