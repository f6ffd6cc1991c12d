"""The typed rows that data sets are turned into."""

import dataclasses
from typing import Generic, TypeVar

from jaxalign.core.types import JsonObject
from jaxalign.text.templates import Message


@dataclasses.dataclass(frozen=True)
class PromptRow:
  """A prompt to complete."""

  prompt: str  # ready for the model, role delimiters included
  group: str = ""  # the prompt set it comes from
  # What a reader with another format renders for itself; () = plain text.
  messages: tuple[Message, ...] = ()
  # The row as the data have it, for reward functions; {} = nobody asks.
  columns: JsonObject = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class CompletionRow:
  """A prompt with one completion."""

  prompt: str  # "" where the whole text is trained on
  completion: str
  reward: float | None = None  # raw logit, higher is better
  label: bool | None = None  # True = desirable
  group: str = ""
  # Character ranges of the joined text to train on; () = all the completion.
  turns: tuple[tuple[int, int], ...] = ()


@dataclasses.dataclass(frozen=True)
class PreferenceRow:
  """A prompt with a better and a worse completion."""

  prompt: str
  chosen: str
  rejected: str
  margin: float = 0.0  # how much better, in units of the reward
  group: str = ""


TypedRow = TypeVar("TypedRow", bound=PromptRow | CompletionRow | PreferenceRow)


@dataclasses.dataclass(frozen=True)
class LoadedRows(Generic[TypedRow]):
  """Typed rows, and counts of what was left out."""

  rows: tuple[TypedRow, ...]
  read: int  # rows that the source held
  bad: tuple[str, ...] = ()  # `file:line what is wrong`, one a skipped row
  dropped: tuple[tuple[str, int], ...] = ()  # (reason, rows), not errors
  split_up: int = 0  # dialogues that gave a row for each assistant turn

  def __str__(self) -> str:
    counts = (("bad", len(self.bad)), *self.dropped)
    left_out = [f"{count} {reason}" for reason, count in counts if count]
    tail = f" (left out: {', '.join(left_out)})" if left_out else ""
    if self.split_up:
      tail += (
        f"; the chat template rewrites earlier turns of {self.split_up} "
        "dialogues, so each of their turns is a row"
      )
    return f"{len(self.rows)} rows from {self.read}{tail}"
