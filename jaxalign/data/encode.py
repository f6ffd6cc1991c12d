"""Prompts and completions as token ids with a loss mask."""

import bisect
import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int

from jaxalign.core.types import Completions
from jaxalign.data.tokenizer import Tokenizer
from jaxalign.errors import UserError
from jaxalign.text import templates


@dataclasses.dataclass(frozen=True)
class Encoded:
  """One text as ids, unpadded."""

  ids: tuple[int, ...]  # prompt, then completion
  prompt_length: int  # ids of the prompt
  loss_mask: tuple[bool, ...]  # True = predicting this id counts in the loss
  complete: bool  # False where the completion was cut at `max_length`

  def __len__(self) -> int:
    return len(self.ids)


FILLER = Encoded((), 0, (), True)  # an empty row


@dataclasses.dataclass(frozen=True)
class EncodedRows:
  """Encoded rows and the indices of the inputs they came from."""

  rows: tuple[Encoded, ...]
  kept: tuple[int, ...]  # input index of each row
  skipped: int  # inputs whose prompt fills the context


def encode_rows(
  tokenizer: Tokenizer,
  prompts: Sequence[str],
  completions: Sequence[str],
  *,
  max_length: int,
  loss: str = "completion",
  train_eos: bool | Sequence[int | None] = False,
  overlong: str = "error",
  prompt_ids: Mapping[str, list[int]] | None = None,
  turns: Sequence[Sequence[tuple[int, int]]] | None = None,
) -> EncodedRows:
  """Encodes prompts with their completions for training.

  A text is tokenised whole, so the space before the completion belongs to it.
  Where a token would straddle the seam, the completion is tokenised by itself,
  because the sampler starts from the prompt's own ids.

  Args:
    tokenizer: the model's.
    prompts: where one is empty, the loss counts the whole text.
    completions: as many; one ends at the end that it has, without the
      whitespace that a chat template writes after it.
    max_length: ids per row at most; the completion is cut on the right.
    loss: `completion`: only its ids count; `all`: all but the first id.
    train_eos: append the eos id to completions that were not cut and do not
      end in it already, and count it, so that the model learns to stop; or of
      each row the id to append, None = none. The 2023 code did not.
    overlong: what to do with a prompt that leaves no room for one id of the
      completion: `error`, or `skip` and count it.
    prompt_ids: of every prompt, where they are known already.
    turns: of each row the character ranges `[start, end)` of the joined text
      that count, in order, the first of them where the completion begins; none
      = all of the completion. Only with `loss="completion"`. The token that
      ends a turn counts, whitespace after it does not.

  Raises:
    UserError: an overlong prompt under `error`, or `train_eos` with a
      tokenizer that has no eos token.
  """
  if train_eos is True and tokenizer.eos_id is None:
    raise UserError(
      f"train_eos needs an eos token, {tokenizer.name} has none; turn it off"
    )
  if isinstance(train_eos, bool):
    train_eos = [tokenizer.eos_id if train_eos else None] * len(prompts)
  # The prompts by themselves, as the sampler reads them.
  if prompt_ids is None:
    distinct = list(dict.fromkeys(prompts))  # one often has many completions
    prompt_ids = dict(
      zip(distinct, tokenizer.encode_prompts(distinct), strict=True)
    )
  # The whole texts, which are cut and masked one by one.
  texts = [
    templates.join(*both) for both in zip(prompts, completions, strict=True)
  ]
  rows, kept = [], []
  for index, ids in enumerate(tokenizer.encode_prompts(texts)):
    prompt = prompts[index]
    start = prompt_ids[prompt]
    if len(start) >= max_length:
      if overlong == "skip":
        continue
      raise UserError(
        f"the prompt of row {index + 1} has {len(start)} tokens, the context "
        f"holds {max_length} with at least one for the completion; filter "
        f"prompts by length or skip them: {prompt[:60]!r}"
      )
    # Where a token straddles the seam, the prompt keeps its own ids.
    if ids[: len(start)] != start:
      ids = start + tokenizer.encode(texts[index][len(prompt) :])
    parts = turns[index] if turns else ()
    spans: list[tuple[int, int]] = []
    if parts:
      ids, spans = _spans(tokenizer, texts[index], ids, len(start), parts)
    # A text that is cut gets no eos id: it did not end there. Nor does one that
    # has an end already, of a chat template or its own.
    eos, stop = train_eos[index], _end_of(tokenizer, ids[len(start) :])
    end = [] if eos is None or stop else [eos]
    # The sampler stops there, so what a template writes after it is not read.
    if stop and loss == "completion" and not spans:
      ids = ids[: len(start) + stop]
    length = len(ids)
    complete = len(ids) + len(end) <= max_length
    ids = (ids + end if complete else ids)[:max_length]
    # Nothing predicts the first id, so it never counts.
    first = max(1, len(start) if loss == "completion" else 1)
    mask = tuple(position >= first for position in range(len(ids)))
    if spans and loss == "completion":
      # An end that is appended belongs to the turn before it.
      counts = {i for a, b in spans for i in range(max(a, 1), b)}
      if spans[-1][1] == length:
        counts |= {length}
      mask = tuple(position in counts for position in range(len(ids)))
    rows.append(Encoded(tuple(ids), len(start), mask, complete))
    kept.append(index)
  return EncodedRows(tuple(rows), tuple(kept), len(texts) - len(rows))


def _spans(
  tokenizer: Tokenizer,
  text: str,
  ids: list[int],
  first: int,
  parts: Sequence[tuple[int, int]],
) -> tuple[list[int], list[tuple[int, int]]]:
  """Finds the ids of parts of a text.

  Every part begins with an id of its own, as it does for the sampler, which
  reads the ids of the text before it: where a token straddles that seam, the
  text is tokenised in two. The token that straddles the end of a part belongs
  to it, because it holds its last characters.

  Args:
    tokenizer: of the text.
    text: what the ids say.
    ids: of the whole text.
    first: ids before the first part.
    parts: character ranges `[start, end)` in order.

  Returns:
    The ids, tokenised again where they had to be, and the ranges `[a, b)` of
    the parts in them.
  """
  known, offsets = tokenizer.encode_with_offsets(text)
  shift = len(ids) - len(known)  # by the bos token
  # Ids up to the last seam where the text was tokenised in two, and its place.
  fixed, seam = [], 0
  if ids[shift:] != known:
    offsets, fixed, seam = [], ids[:first], parts[0][0]

  def ids_before(place: int) -> tuple[int, list[int] | None]:
    """How many ids lie before a character; those of its text if they differ."""
    i = bisect.bisect_left(offsets, (place, 0))
    if offsets and (i == 0 or offsets[i - 1][1] == place):
      return i + shift, None
    # A token straddles it, or the tokenizer does not say.
    if seam:
      found = fixed + tokenizer.encode(text[seam:place])
    else:
      found = tokenizer.encode_prompts([text[:place]])[0]
    alike = (x == y for x, y in zip(ids, found, strict=False))
    same = sum(itertools.takewhile(bool, alike))
    return same, None if same == len(found) else found

  spans: list[tuple[int, int]] = []
  for number, (start, end) in enumerate(parts):
    a, before = ids_before(start) if number else (first, None)
    if before is not None:
      ids = before + tokenizer.encode(text[start:])
      a, offsets, fixed, seam = len(before), [], before, start
    b = len(ids)
    if end < len(text):
      b, differs = ids_before(end)
      b += differs is not None
    # Up to the end of the turn, which a template's marks may leave out.
    ends = [i for i in range(a, b) if ids[i] in tokenizer.end_ids]
    if ends and not tokenizer.decode(ids[ends[-1] + 1 : b]).strip():
      b = ends[-1] + 1
    elif b < len(ids) and ids[b] in tokenizer.end_ids:
      b += 1
    spans.append((a, b))
  return ids, spans


def _end_of(tokenizer: Tokenizer, ids: Sequence[int]) -> int:
  """Ids of a completion up to its end if only whitespace follows; else 0."""
  places = [at for at, i in enumerate(ids) if i in tokenizer.end_ids]
  if places and not tokenizer.decode(ids[places[-1] + 1 :]).strip():
    return places[-1] + 1
  return 0


def encode_completions(
  tokenizer: Tokenizer,
  completions: Completions,
  indices: Int[np.ndarray, " N"],
  max_length: int,
  train_eos: bool,
) -> tuple[Encoded, ...]:
  """Some of the policy's own completions as the texts to train on.

  Args:
    tokenizer: of the policy.
    completions: of one step; their prompts fit into `max_length`.
    indices: flat, of the completions to encode.
    max_length: ids a row at most.
    train_eos: append the id that ended a completion, or the eos id where its
      text was cut at a turn; nothing where it reached the length limit.
  """
  # Row p S + s is sample s of prompt p.
  each, samples = completions.samples_per_prompt, completions.samples

  def end_of(i: np.integer) -> int | None:
    if not (train_eos and completions.ended[i]):
      return None
    last = int(samples.tokens[i][max(samples.lengths[i] - 1, 0)])
    return last if last in tokenizer.end_ids else tokenizer.eos_id

  known = zip(completions.prompts, completions.prompt_ids, strict=True)
  return encode_rows(
    tokenizer,
    [completions.prompts[i // each] for i in indices],
    [completions.texts[i] for i in indices],
    max_length=max_length,
    train_eos=[end_of(i) for i in indices],
    prompt_ids=dict(known),
  ).rows
