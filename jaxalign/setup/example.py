"""One example of what a run reads, as its model sees it."""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

from jaxalign.data.encode import Encoded
from jaxalign.data.tokenizer import Tokenizer

SHOWN = 400  # characters of a part; of a longer one both ends
OPEN, CLOSE = "⟦", "⟧"  # around what the loss counts


def example_of(
  rows: object,
  tokenizer: Tokenizer,
  head: str = "lm",
  encoding: str = "",
  pad_id: int = -1,
) -> str:
  """The first text of a run with its special tokens, on one line.

  Args:
    rows: see `RunSpec.rows`: encoded texts, or prompts to complete.
    tokenizer: of the policy.
    head: of the policy; a reward model reads its score at some token.
    encoding: of a reward model, "concat" or "pair".
    pad_id: of its config.

  Returns:
    A training text, the part that counts in the loss in ⟦brackets⟧, or the
    token that the score is read at; or what a completion is sampled after. ""
    where there is no row.
  """
  first = _first(rows, Encoded) or _first(rows)
  form = tokenizer.format
  name = form.name
  # Plain strings are joined as they are, whatever the format is.
  if isinstance(first, Encoded) and name != "raw":
    prompt = first.ids[: first.prompt_length] or first.ids
    # All of it: a dialogue may begin with the assistant.
    text = tokenizer.inner.decode(list(first.ids))
    if not (
      any(turn.strip() in text for turn in form.turns)
      or set(form.ends) & set(prompt)
    ):
      name = f"as written, not in turns; prompt_format={name} writes turns"
  if isinstance(first, Encoded):
    shown, ids, mask = "", first.ids, first.loss_mask
    start = 0
    for i in range(1, len(ids) + 1):
      if i == len(ids) or mask[i] != mask[start]:
        part = _text(tokenizer, ids[start:i])
        shown += f"{OPEN}{part}{CLOSE}" if mask[start] else part
        start = i
    return f"first text ({name}; the loss counts {OPEN}{CLOSE}): {shown}"
  if isinstance(first, str):
    (ids,) = tokenizer.encode_prompts([first])
    return f"first prompt ({name}): {_text(tokenizer, ids)}"
  if isinstance(first, tuple):
    # Two segments are the bare question and its answer.
    name = "a pair of segments" if encoding == "pair" else name
    at = _score_position(first, tokenizer, head, pad_id)
    if at is None:
      how = "; the score is the mean of all tokens" * (head == "score_mean")
      return f"first text ({name}{how}): {_text(tokenizer, first)}"
    before, token, after = (
      _text(tokenizer, part)
      for part in (first[:at], first[at : at + 1], first[at + 1 :])
    )
    shown = f"{before}{OPEN}{token}{CLOSE}{after}"
    return f"first text ({name}; the score is read at {OPEN}{CLOSE}): {shown}"
  return ""


def _score_position(
  ids: Sequence[int], tokenizer: Tokenizer, head: str, pad_id: int
) -> int | None:
  """Which token a score head reads, see `heads.pool`; None = not one."""
  if head == "score_context":
    return 0
  if (
    head == "score_eos"
    and tokenizer.eos_id is not None
    and (tokenizer.eos_id in ids)
  ):
    return list(ids).index(tokenizer.eos_id)
  if head not in ("score_eos", "score_last"):
    return None
  real = [i for i, x in enumerate(ids) if head == "score_eos" or x != pad_id]
  return max(real, default=0)


def _first(
  rows: object, kind: type | None = None
) -> Encoded | str | tuple[int, ...] | None:
  """The first text, prompt or list of ids in nested rows; or of a `kind`."""
  if isinstance(rows, kind or Encoded | str):
    return rows
  if isinstance(rows, list | tuple):
    if kind is None and rows and isinstance(rows[0], int):
      return tuple(rows)
    parts = rows
  elif dataclasses.is_dataclass(rows):
    parts = vars(rows).values()
  else:
    return None
  # Of many rows the first says what kind they are.
  found = (_first(part, kind) for part in itertools.islice(parts, 100))
  return next((x for x in found if x is not None), None)


def _text(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
  r"""Ids as text with special tokens, line breaks written as \n."""
  text = tokenizer.inner.decode(list(ids), clean_up_tokenization_spaces=False)
  text = text.replace("\\", "\\\\").replace("\n", "\\n")
  if len(text) > SHOWN:
    text = f"{text[: SHOWN // 2]} […] {text[-SHOWN // 2 :]}"
  return text
