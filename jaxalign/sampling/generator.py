"""Prompts in, completions out: the one way to generate text.

The Python API, `chat`, the online methods and their evaluations use it.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from jaxalign.core.types import Completions, Params, SamplingParams
from jaxalign.data.tokenizer import Tokenizer
from jaxalign.parallel import hosts
from jaxalign.parallel.program import Program
from jaxalign.sampling.sampler import Sampler
from jaxalign.text import templates, truncate

UNFINISHED = "\ufffd"  # what decoding gives for a part of a character


@dataclasses.dataclass(frozen=True)
class Generator:
  """Generates completions of prompts.

  Attributes:
    sampler: of a causal language model.
    tokenizer: the model's.
    settings: see `sampling.settings.make`.
    truncation: where a completion's text is cut, see `text.truncate`; None =
      not at all, and whitespace around it stays.
    batch_prompts: prompts per call of the sampler; 0 = all.
    whole_tokens: cut completions at a token boundary, so that a text is exactly
      what its first `Completions.num_tokens` tokens decode to. PPO needs this,
      because it must train on exactly what was rewarded.
  """

  sampler: Sampler
  tokenizer: Tokenizer
  settings: SamplingParams
  truncation: str | None = None
  batch_prompts: int = 0
  whole_tokens: bool = False

  def __call__(
    self,
    params: Params,
    prompts: Sequence[str],
    samples: int,
    key: jax.Array,
    *,
    first_prompt: int = 0,
  ) -> Completions:
    """Draws completions of each prompt.

    Args:
      params: the model's parameters.
      prompts: P texts of at least one token each. The tokenizer's bos token is
        put before those that no chat template wrote; nothing else is added.
      samples: S, completions of each prompt.
      key: consumed. A completion depends on it, on its prompt's place in the
        list and on its own number, not on the other prompts.
      first_prompt: place of the first of them, where they are a part of a list.

    Returns:
      P S completions, those of a prompt next to each other.

    Raises:
      UserError: a prompt is empty or does not fit into the context.
    """
    # Drawing tokens. The prompts' ids count over all batches, so that the
    # random keys do not depend on `batch_prompts`.
    ids = self.tokenizer.encode_prompts(prompts)
    size = self.batch_prompts or len(ids)
    parts = [
      self.sampler(
        params,
        ids[start : start + size],
        self.settings,
        key,
        samples_per_prompt=samples,
        prompt_numbers=[
          first_prompt + i for i in range(start, min(start + size, len(ids)))
        ],
      )
      for start in range(0, len(ids), size)
    ]
    drawn = jax.tree.map(lambda *x: np.concatenate(x), *parts)

    # Decoding, and cutting the texts.
    tokens = [
      row[:length].tolist()
      for row, length in zip(drawn.tokens, drawn.lengths, strict=True)
    ]
    # Of several hosts each decodes its part.
    decoded = hosts.spread(self.tokenizer.decode_batch, tokens)
    texts, ended = decoded, drawn.finish.astype(bool).tolist()
    if self.truncation is not None:
      turns = self.tokenizer.format.turns
      texts = [
        truncate.truncate(text, self.truncation, turns) for text in decoded
      ]
      # A completion whose text was cut had ended by itself.
      ended = [
        end or text != whole.strip()
        for end, text, whole in zip(ended, texts, decoded, strict=True)
      ]

    # Cutting the tokens to what the texts say.
    counts = [len(row) for row in tokens]
    if self.whole_tokens:
      pairs = list(zip(tokens, texts, strict=True))
      cut = hosts.spread(self._cut, pairs)
      counts, texts = [n for n, _ in cut], [text for _, text in cut]
    if self.truncation is not None:
      # After a role delimiter a space is the format's; elsewhere it was drawn.
      each = [prompt for prompt in prompts for _ in range(samples)]
      texts = [
        text
        if prompt.endswith(templates.ASSISTANT)
        else _lead(whole, text) + text
        for prompt, whole, text in zip(each, decoded, texts, strict=True)
      ]
    return Completions(list(prompts), ids, texts, drawn, ended, counts)

  def programs(
    self, params: Params, prompts: int, tokens: int, samples: int
  ) -> list[Program]:
    """The programs that a call runs, and how often.

    Args:
      params: as shapes with shardings.
      prompts: P, of the call.
      tokens: of the longest prompt.
      samples: S.
    """
    size = self.batch_prompts or prompts
    calls = -(-prompts // size)  # rounded up
    return self.sampler.programs(
      params, size, tokens, self.settings, samples, calls
    )

  def _cut(
    self, rows: Sequence[tuple[list[int], str]]
  ) -> list[tuple[int, str]]:
    return [cut_tokens(self.tokenizer, ids, text) for ids, text in rows]

  def stream(
    self, params: Params, prompt: str, key: jax.Array
  ) -> Iterator[str]:
    """Yields one completion in pieces, up to the next turn of the dialogue.

    An ending that may be the start of a role delimiter or a part of a
    character is held back until more tokens are drawn.
    """
    (ids,) = self.tokenizer.encode_prompts([prompt])
    turns = self.tokenizer.format.turns
    seen: list[int] = []
    shown, text = 0, ""
    for token in self.sampler.stream(params, ids, self.settings, key):
      seen.append(token)
      # All tokens again: a token alone may be half a character or lose a space.
      # Delimiters begin with the newlines that a shown text loses.
      whole = self.tokenizer.decode(seen)
      found = [at for turn in turns if (at := whole.find(turn)) >= 0]
      text = whole[: min(found, default=None)].lstrip()
      if found:
        break
      # Trailing whitespace waits as well: the end of the text is stripped.
      settled = min(len(text) - _unsettled(whole, turns), len(text.rstrip()))
      if settled > shown:
        yield text[shown:settled]
        shown = settled
    # What was held back belongs to the text after all.
    if rest := text[shown:].rstrip():
      yield rest


def _lead(whole: str, text: str) -> str:
  """The whitespace that a text began with; "" where nothing is left."""
  return whole[: len(whole) - len(whole.lstrip())] if text else ""


def _unsettled(text: str, turns: Sequence[str]) -> int:
  """Length of the ending that later tokens may change or cut off."""
  whole = text.rstrip(UNFINISHED)
  # The longest ending that a delimiter may begin with comes first.
  for size in range(max(map(len, turns), default=0), 0, -1):
    ending = whole[-size:]
    if ending and any(turn.startswith(ending) for turn in turns):
      return len(text) - len(whole) + min(size, len(whole))
  return len(text) - len(whole)


def cut_tokens(
  tokenizer: Tokenizer, ids: Sequence[int], text: str
) -> tuple[int, str]:
  """How many of the ids make up `text`, and what they decode to.

  Args:
    tokenizer: decodes the ids.
    ids: of a completion.
    text: the start of what they decode to, stripped.

  Returns:
    The number of ids, and their text, stripped: `text`, or
    slightly less of it where the cut falls inside a token.
  """
  if tokenizer.decode(ids).strip() == text:
    return len(ids), text
  # Bisection: the decoded length grows with the number of ids.
  low, high = 0, len(ids)
  while low < high:
    middle = (low + high) // 2
    if len(tokenizer.decode(ids[:middle]).strip()) < len(text):
      low = middle + 1
    else:
      high = middle
  decoded = tokenizer.decode(ids[:low]).strip()
  if decoded == text or low == 0:
    return low, decoded
  # The cut is inside token `low`, which is left out.
  return low - 1, tokenizer.decode(ids[: low - 1]).strip()
