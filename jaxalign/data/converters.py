"""Named converters: published data sets to this project's columns.

`SOURCE@NAME` reads a source through one of them. A converter is a plain
function, one row in, any number of rows out, in TRL's columns. Texts become
role lists, so that the policy's own format renders them.
"""

import dataclasses
import html
import math
import re
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jaxalign.errors import UserError
from jaxalign.text.templates import Message

Row = dict[str, Any]  # JSON; `fields` checks the values

_SPEAKERS = {
  **dict.fromkeys(("human", "user"), "user"),
  **dict.fromkeys(("gpt", "assistant", "model", "bot", "chatgpt"), "assistant"),
  **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
  "function_call": "assistant",
  "system": "system",
  "developer": "developer",
}
_ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")
_HELPSTEER_TURN = re.compile(r"\n<extra_id_1>(User|Assistant)\n")
_TAG = re.compile(r"<[^>]+>")
SHP_RATIO = 2.0  # its card trains on such pairs alone


def alpaca(row: Row) -> list[Row]:
  """An instruction, perhaps with an input after it, and its output."""
  asked = row["instruction"]
  if not isinstance(asked, str):
    raise ValueError("the instruction is not text")
  if row.get("input"):
    asked = f"{asked}\n\n{row['input']}"
  return [
    {
      "prompt": [*_system(row), _user(asked)],
      "completion": [_assistant(row["output"])],
    }
  ]


def sharegpt(row: Row) -> list[Row]:
  """A dialogue of `from` and `value`; with two answers it is a preference."""
  messages = _system(row)
  messages += [_turn_of_sharegpt(turn) for turn in row["conversations"]]
  rest = {k: row[k] for k in ("tools", "label") if row.get(k) is not None}
  if row.get("chosen") and row.get("rejected"):
    both = {k: [_turn_of_sharegpt(row[k])] for k in ("chosen", "rejected")}
    return [{"prompt": messages} | both | rest]
  return [{"messages": messages} | rest]


def ultrafeedback(row: Row) -> list[Row]:
  """The best completion against another one of a lower rating."""
  rated = _rated(row)
  best = max(rated, key=_reward)
  # A tie gives two equal completions, which are counted as no preference.
  worse = [x for x in rated if x["reward"] < best["reward"]] or [best]
  # Any of the others, as Zephyr's (Tunstall 2023); the same one every time.
  other = worse[zlib.crc32(row["instruction"].encode()) % len(worse)]
  return [_pair(best["prompt"], best, other)]


def ultrafeedback_rewards(row: Row) -> list[Row]:
  """Every completion with its rating."""
  return _rated(row)


def ultrafeedback_binarized(row: Row) -> list[Row]:
  """Role lists that repeat the prompt, with their scores."""
  better, worse = (
    _first(row, f"score_{side}", f"{side}-rating")
    for side in ("chosen", "rejected")
  )
  pair = {k: row[k] for k in ("chosen", "rejected")}
  if isinstance(row["chosen"], str):
    pair["prompt"] = row["prompt"]
  if better is None or worse is None:
    return [pair]
  # A tie is no preference, whichever of the two stands in `chosen`.
  if better == worse:
    return [pair | {"rejected": pair["chosen"]}]
  return [pair | {"margin": better - worse}]


def helpsteer2(row: Row) -> list[Row]:
  """The two responses to a prompt, by helpfulness."""
  rated = [x for one in row["rows"] for x in helpsteer2_rewards(one)]
  best, worst = max(rated, key=_reward), min(rated, key=_reward)
  return [_pair(best["prompt"], best, worst)]


def helpsteer2_rewards(row: Row) -> list[Row]:
  """A response with its helpfulness, 0 to 4."""
  # A prompt of several turns is one text with marks.
  first, *rest = _HELPSTEER_TURN.split(row["prompt"])
  prompt = [_user(first)]
  for role, content in zip(rest[::2], rest[1::2], strict=True):
    prompt.append({"role": role.lower(), "content": content})
  if prompt[-1]["role"] == "assistant":  # the mark that the response follows
    prompt.pop()
  return [_answer(prompt, row["response"], float(row["helpfulness"]))]


def pku_saferlhf(row: Row) -> list[Row]:
  """The two responses, the more helpful one chosen."""
  return _by_index(row, row["better_response_id"])


def pku_saferlhf_safer(row: Row) -> list[Row]:
  """The two responses, the safer one chosen."""
  return _by_index(row, row["safer_response_id"])


def shp(row: Row) -> list[Row]:
  """Two comments to a post, the one with more votes chosen."""
  first, second = (
    {"completion": [_assistant(row[f"human_ref_{side}"])], "reward": 0.0}
    for side in "AB"
  )
  better, worse = (first, second) if int(row["labels"]) else (second, first)
  pair = _pair([_user(row["history"])], better, worse)
  ratio = row.get("score_ratio")
  return [pair | {"margin": math.log(ratio) if ratio else 0.0}]


def shp_clear(row: Row) -> list[Row]:
  """`shp`, but only where one has at least twice the votes of the other."""
  (pair,) = shp(row)
  clear = row["score_ratio"] >= SHP_RATIO
  # Equal completions are counted as no preference.
  return [pair if clear else pair | {"rejected": pair["chosen"]}]


def stack_exchange(row: Row) -> list[Row]:
  """The best answer against each that has a lower score."""
  prompt = [_user(_plain(row["question"]))]
  rated = [
    _answer(prompt, _plain(answer["text"]), float(answer["pm_score"]))
    for answer in row["answers"]
  ]
  best = max(rated, key=_reward)
  worse = [x for x in rated if x["reward"] < best["reward"]] or [best]
  return [_pair(prompt, best, x) for x in worse]


@dataclasses.dataclass(frozen=True)
class Converter:
  """A converter and what it reads."""

  convert: Callable[[Row], list[Row]]
  needs: tuple[str, ...]  # columns that the source must have
  # Rows with the same value of this column are read as one, {"rows": [...]}.
  by: str = ""


_ULTRAFEEDBACK = ("instruction", "completions")
_PKU = ("prompt", "response_0", "response_1")
_SHP = ("history", "human_ref_A", "human_ref_B", "labels")
_HELPSTEER = ("prompt", "response", "helpfulness")
CONVERTERS: Mapping[str, Converter] = {
  "alpaca": Converter(alpaca, ("instruction", "output")),
  "sharegpt": Converter(sharegpt, ("conversations",)),
  "ultrafeedback": Converter(ultrafeedback, _ULTRAFEEDBACK),
  "ultrafeedback_rewards": Converter(ultrafeedback_rewards, _ULTRAFEEDBACK),
  "ultrafeedback_binarized": Converter(
    ultrafeedback_binarized, ("prompt", "chosen", "rejected")
  ),
  "helpsteer2": Converter(helpsteer2, _HELPSTEER, by="prompt"),
  "helpsteer2_rewards": Converter(helpsteer2_rewards, _HELPSTEER),
  "pku_saferlhf": Converter(pku_saferlhf, (*_PKU, "better_response_id")),
  "pku_saferlhf_safer": Converter(
    pku_saferlhf_safer, (*_PKU, "safer_response_id")
  ),
  "shp": Converter(shp, _SHP),
  "shp_clear": Converter(shp_clear, (*_SHP, "score_ratio")),
  "stack_exchange_preferences": Converter(
    stack_exchange, ("question", "answers")
  ),
}


def split_name(source: str) -> tuple[str, str]:
  """`SOURCE@NAME` as its two parts; the name is "" where there is none.

  Raises:
    UserError: there is no such converter.
  """
  head, mark, name = source.rpartition("@")
  if not mark:
    return source, ""
  if name not in CONVERTERS:
    raise UserError(
      f"data source {source}: there is no converter {name!r}; after @ comes "
      f"one of {', '.join(CONVERTERS)}"
    )
  return head, name


def convert(
  name: str, source: str, rows: Iterable[Row], places: Iterable[str]
) -> tuple[list[Row], list[str], list[str]]:
  """Converts the rows of a source.

  Args:
    name: of the converter.
    source: as the user wrote it, for messages.
    rows: of the source.
    places: `file:line` of each row.

  Returns:
    The rows, their places, and `file:line what is wrong` of each row that could
    not be converted.

  Raises:
    UserError: no row has a column that the converter needs.
  """
  known = CONVERTERS[name]
  pairs = list(zip(rows, places, strict=True))
  found = {column for row, _ in pairs for column in row}
  lacking = [column for column in known.needs if column not in found]
  if lacking and pairs:
    raise UserError(
      f"{source} lacks the columns ({', '.join(lacking)}) that the converter "
      f"{name} reads; it has ({', '.join(sorted(found))})"
    )
  if known.by:
    # A group stands where its first row does.
    groups: dict[str, tuple[list[Row], str]] = {}
    for row, place in pairs:
      groups.setdefault(str(row.get(known.by)), ([], place))[0].append(row)
    pairs = [({"rows": members}, place) for members, place in groups.values()]
  made, where, bad = [], [], []
  for row, place in pairs:
    try:
      new = known.convert(row)
    # A value of another kind than the converter expects, deep in a row.
    except (
      ArithmeticError, AttributeError, LookupError, TypeError, ValueError,
    ) as error:  # fmt: skip
      problem = f"{type(error).__name__}: {error}"
      bad.append(f"{place} cannot be read by the converter {name} ({problem})")
      continue
    made += new
    where += [place] * len(new)
  return made, where, bad


def _user(content: str) -> Message:
  return {"role": "user", "content": content}


def _assistant(content: str) -> Message:
  return {"role": "assistant", "content": content}


def _system(row: Row) -> list[Message]:
  given = row.get("system")
  return [{"role": "system", "content": given}] if given else []


def _turn_of_sharegpt(turn: Row) -> Message:
  speaker = turn["from"]
  if speaker not in _SPEAKERS:
    raise ValueError(f"unknown speaker {speaker!r}")
  message = {"role": _SPEAKERS[speaker], "content": turn["value"]}
  return message | ({"weight": turn["weight"]} if "weight" in turn else {})


def _answer(prompt: list[Message], text: str, reward: float) -> Row:
  return {"prompt": prompt, "completion": [_assistant(text)], "reward": reward}


def _reward(row: Row) -> float:
  return row["reward"]


def _pair(prompt: list[Message], better: Row, worse: Row) -> Row:
  return {
    "prompt": prompt,
    "chosen": better["completion"],
    "rejected": worse["completion"],
    "margin": better["reward"] - worse["reward"],
  }


def _first(row: Row, *columns: str) -> float | None:
  return next((row[c] for c in columns if row.get(c) is not None), None)


def _rated(row: Row) -> list[Row]:
  """UltraFeedback's completions, by the mean of their four ratings.

  `overall_score` is known for 10s that should be 1s, so it only stands in.
  """
  prompt, rated = [_user(row["instruction"])], []
  for one in row["completions"]:
    notes = one.get("annotations") or {}
    given = [str((notes.get(x) or {}).get("Rating", "")) for x in _ASPECTS]
    ratings = [float(x) for x in given if x.replace(".", "").isdigit()]
    if ratings:
      score = sum(ratings) / len(ratings)
    else:
      score = float(one["overall_score"])
    rated.append(_answer(prompt, one["response"], score))
  return rated


def _by_index(row: Row, better: int) -> list[Row]:
  if better not in (0, 1):
    raise ValueError(f"a response is 0 or 1, not {better!r}")
  responses = [[_assistant(row[f"response_{i}"])] for i in (0, 1)]
  return [
    {
      "prompt": [_user(row["prompt"])],
      "chosen": responses[better],
      "rejected": responses[1 - better],
    }
  ]


def _plain(text: str) -> str:
  """What a web page's text says, without its tags."""
  return html.unescape(_TAG.sub("", text)).strip()
