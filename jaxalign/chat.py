"""Talk to a model in the terminal.

  python -m jaxalign.chat MODEL [--prompt TEXT] [--system TEXT]
    [--temperature 0.7] [--top_p 0.9] [--max_new_tokens 256] [--seed 0]
    [--reward_model MODEL [--best_of 16] [--encoding pair]]

MODEL is a Hugging Face folder, a hub id or `lab`. Turns are written as the
tokenizer's chat template says, or else with the role delimiters the models
were trained on. `--prompt` answers once and ends; a text that ends in the
answer's role delimiter already is continued as it stands.

With `--reward_model` an answer is the best of `--best_of`, and its score is
printed below it. One with a head for each group is named with their weights,
as in 'MODEL[alice=0.7,bob=0.3]'; without, all count alike. `--encoding` is how
that model was shown answers when it was trained; by default `pair` if it tells
segments apart, else `concat`.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from jaxalign.config import parse_groups, weighs_groups
from jaxalign.errors import UserError, exit_status, told
from jaxalign.text import templates, truncate

if TYPE_CHECKING:
  import jax

  from jaxalign import Loaded
  from jaxalign.core.types import SamplingParams
  from jaxalign.data.tokenizer import Tokenizer
  from jaxalign.sampling.sampler import Sampler

ENDS = (templates.HUMAN, templates.ASSISTANT)
UNFINISHED = "\ufffd"  # what decoding gives for half a character

Messages = list[templates.Message]


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns the exit status: 2 is a mistake in the input."""
  return exit_status(lambda: run(told(_parser()).parse_args(argv)))


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m jaxalign.chat", description="Talk to a model."
  )
  parser.add_argument("model", help="model folder, hub id, or lab")
  parser.add_argument("--prompt", help="answer this once and end")
  parser.add_argument("--system", default="", help="text before the first turn")
  parser.add_argument("--temperature", type=float, default=0.7)
  parser.add_argument("--top_p", type=float, default=0.9)
  parser.add_argument("--max_new_tokens", type=int, default=256)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--best_of", type=int, default=1, metavar="N")
  parser.add_argument("--reward_model", help="chooses the best of N answers")
  parser.add_argument("--encoding", choices=("concat", "pair"))
  return parser


def run(args: argparse.Namespace) -> None:
  """Answers `args.prompt`, or one line after another until end of input.

  Raises:
    UserError: no such model, no tokenizer, or a setting out of range.
  """
  # Imported late: a mistyped flag should not wait for jax.
  import jax

  import jaxalign
  from jaxalign.sampling import settings
  from jaxalign.sampling.sampler import Sampler

  # Checked before the model is loaded, which may take minutes.
  chosen = {
    "temperature": args.temperature,
    "top_p": args.top_p,
    "max_new_tokens": args.max_new_tokens,
  }
  settings.make(**chosen)
  _check_choice(args)
  dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
  loaded = jaxalign.load(args.model, dtype=dtype)
  tokenizer = _check(loaded, args.model)
  judge = _load_judge(args.reward_model, dtype) if args.reward_model else None
  reader = judge.tokenizer if judge else tokenizer
  eos = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
  drawn = settings.make(
    **chosen,
    eos_ids=eos,
    stops=tokenizer.encode_batch(ENDS) if judge else (),
    pad_id=tokenizer.pad_id,
  )
  sampler, key = Sampler(loaded.model), jax.random.key(args.seed)

  def reply(ids: list[int], seen: str, key: "jax.Array") -> str:
    if judge is None:
      return show(answer(sampler, loaded, ids, drawn, key))
    texts = draw(sampler, loaded, ids, drawn, key, args.best_of)
    return show_best(texts, rate(judge, seen, texts, args.encoding))

  system = [{"role": "system", "content": args.system}] if args.system else []
  if args.prompt is not None:
    ids = prompt_ids(tokenizer, system, args.prompt)
    reply(ids, prompt_text(reader, system, args.prompt), key)
    return
  messages = list(system)
  for turn, line in enumerate(_lines()):
    messages.append({"role": "user", "content": line})
    ids = fit(tokenizer, messages, loaded.model.config.max_positions)
    seen = reader.render_chat(messages, reply=True)
    said = reply(ids, seen, jax.random.fold_in(key, turn))
    messages.append({"role": "assistant", "content": said})


def _check(loaded: "Loaded", name: str) -> "Tokenizer":
  if loaded.model.config.head != "lm":
    raise UserError(
      f"{name} is a reward model (head {loaded.model.config.head}), which"
      " gives scores, not answers; name a language model"
    )
  return _tokenizer(loaded, name)


def _tokenizer(loaded: "Loaded", name: str) -> "Tokenizer":
  if loaded.tokenizer is None:
    raise UserError(
      f"{name} holds no tokenizer files; copy tokenizer.json next to the model"
    )
  return loaded.tokenizer


def _check_choice(args: argparse.Namespace) -> None:
  """A UserError if the flags of best-of-N do not go together."""
  if args.best_of < 1:
    raise UserError(f"--best_of must be >= 1, got {args.best_of}")
  if args.best_of > 1 and not args.reward_model:
    raise UserError(
      f"--best_of={args.best_of} needs something to choose by; add "
      "--reward_model with a folder, a hub id, or lab"
    )
  rule = weighs_groups("--reward_model", args.reward_model or "")
  if not rule.holds:
    raise UserError(
      f"{rule.field} {rule.must}, got {args.reward_model!r}; {rule.remedy}"
    )
  if args.best_of > 1 and args.temperature == 0:
    raise UserError(
      f"--best_of={args.best_of} needs answers that differ, and with "
      "--temperature=0 they are all the same; raise it"
    )


def _load_judge(name: str, dtype: str) -> "Loaded":
  """The reward model that a flag names, with its tokenizer."""
  import jaxalign
  from jaxalign.build import models
  from jaxalign.models import groups

  place, given = parse_groups(name)
  judge = jaxalign.load(models.locate(place, "reward-train"), dtype=dtype)
  if judge.model.config.head == "lm":
    raise UserError(
      f"--reward_model: {name} is a language model without a score head; name"
      " a sequence classifier, e.g. one trained with configs/reward_model.py"
    )
  _tokenizer(judge, name)
  where = f"--reward_model: {place}"
  weights = models.check_weights(judge.model, given, where)
  folded = groups.fold(judge.model, judge.params, weights)
  return jaxalign.Loaded(*folded, judge.tokenizer)


def prompt_text(tokenizer: "Tokenizer", messages: Messages, text: str) -> str:
  """What a one-shot answer to `text` continues."""
  if templates.is_prompt(text):
    return text
  messages = [*messages, {"role": "user", "content": text}]
  return tokenizer.render_chat(messages, reply=True)


def prompt_ids(
  tokenizer: "Tokenizer", messages: Messages, text: str
) -> list[int]:
  """Ids that a one-shot answer to `text` starts from."""
  return tokenizer.encode_prompts([prompt_text(tokenizer, messages, text)])[0]


def fit(tokenizer: "Tokenizer", messages: Messages, context: int) -> list[int]:
  """Ids of the dialogue; forgets the oldest turns once it fills the context.

  A quarter of the context stays free for the answer. The system text and the
  last turn are never dropped; `messages` is shortened in place.
  """
  first = 1 if messages[0]["role"] == "system" else 0
  while True:
    text = tokenizer.render_chat(messages, reply=True)
    ids = tokenizer.encode_prompts([text])[0]
    if 4 * len(ids) <= 3 * context or len(messages) <= first + 1:
      return ids
    del messages[first : first + 2]


def answer(
  sampler: "Sampler",
  loaded: "Loaded",
  ids: list[int],
  drawn: "SamplingParams",
  key: "jax.Array",
) -> Iterator[str]:
  """Pieces of the answer, as its tokens are drawn."""
  tokens = sampler.stream(loaded.params, ids, drawn, key)
  return pieces(tokens, loaded.tokenizer)


def draw(
  sampler: "Sampler",
  loaded: "Loaded",
  ids: list[int],
  drawn: "SamplingParams",
  key: "jax.Array",
  n: int,
) -> list[str]:
  """N whole answers, each up to the next turn of the dialogue."""
  found = sampler(loaded.params, [ids], drawn, key, samples_per_prompt=n)
  rows = zip(found.tokens, found.lengths, strict=True)
  whole = [loaded.tokenizer.decode(row[:size].tolist()) for row, size in rows]
  return [truncate.truncate(text) for text in whole]


def rate(
  judge: "Loaded", seen: str, texts: Sequence[str], encoding: str | None
) -> list[float]:
  """The judge's score of each answer to a prompt, as the judge reads it."""
  import jaxalign

  if encoding is None:
    segments = getattr(judge.model.config, "type_vocab_size", 0)
    encoding = "pair" if segments > 1 else "concat"
  asked = [seen] * len(texts)
  return jaxalign.score(judge, asked, texts, encoding=encoding).tolist()


def pieces(tokens: Iterable[int], tokenizer: "Tokenizer") -> Iterator[str]:
  """Text that can be shown for sure, up to the next turn of the dialogue.

  What may be the beginning of a role delimiter, and half a character, is held
  back until more tokens have come.
  """
  ids: list[int] = []
  shown, text = 0, ""
  for token in tokens:
    ids.append(token)
    text = tokenizer.decode(ids).lstrip()
    ends = [at for end in ENDS if (at := text.find(end)) >= 0]
    if ends:
      text = text[: min(ends)]
      break
    safe = min(len(text) - _doubtful(text), len(text.rstrip()))
    if safe > shown:
      yield text[shown:safe]
      shown = safe
  if rest := text[shown:].rstrip():
    yield rest


def _doubtful(text: str) -> int:
  """Length of the ending that later tokens may change or cut away."""
  whole = text.rstrip(UNFINISHED)
  for size in range(max(map(len, ENDS)), 0, -1):
    if any(end.startswith(whole[-size:]) for end in ENDS if whole[-size:]):
      return len(text) - len(whole) + min(size, len(whole))
  return len(text) - len(whole)


def show(reply: Iterable[str]) -> str:
  """Prints the pieces as they come; returns them as one stripped text."""
  text = ""
  for piece in reply:
    print(piece, end="", flush=True)
    text += piece
  print(flush=True)
  return text.strip()


def show_best(texts: Sequence[str], scores: Sequence[float]) -> str:
  """Prints the answer with the highest score; an empty one only if all are."""
  best = max(range(len(texts)), key=lambda i: (bool(texts[i]), scores[i]))
  print(texts[best])
  mean = sum(scores) / len(scores)
  among = f"best of {len(texts)}, their mean is {mean:.2f}"
  print(f"[score {scores[best]:.2f}, {among}]", flush=True)
  return texts[best]


def _lines() -> Iterator[str]:
  """Lines the user types; blank ones are passed over."""
  prompt = "> " if sys.stdin.isatty() else ""
  while True:
    try:
      line = input(prompt).strip()
    except EOFError:
      return
    if line:
      yield line


if __name__ == "__main__":
  sys.exit(main())
