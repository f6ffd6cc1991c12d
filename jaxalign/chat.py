"""Talks to a model in the terminal.

  python -m jaxalign.chat runs/superhf-lab --prompt "Why is the sky blue?"
  python -m jaxalign.chat MODEL --reward_model MODEL --best_of 16

MODEL is a run's folder, a Hugging Face folder, a hub id or `lab`. Turns are
written with the tokenizer's chat template; without one, with the role
delimiters that the models were trained on. A `--prompt` that already ends in
the assistant's role delimiter is continued verbatim. Ctrl-C ends an answer;
/help lists what can be typed besides questions.

With `--reward_model` an answer is the best of `--best_of` completions, and its
score is printed below it. A reward model with a head for each group is named
with their weights, as in 'MODEL[alice=0.7,bob=0.3]'; without, all count alike.
It may also be a function, FILE.py:FUNCTION, and several with commas.
"""

import argparse
import math
import re
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from jaxalign import cli
from jaxalign.config import names_function, parse_models, weighs_groups
from jaxalign.errors import UserError
from jaxalign.runtime import signals
from jaxalign.text import templates

if TYPE_CHECKING:
  from jaxalign.data.tokenizer import Tokenizer

Messages = list[templates.Message]

RESET = "/reset"
EXIT = ("/exit", "/quit", "/bye")
HELP = f"""{RESET}  forgets the dialogue; the system text stays
/exit   ends, as Ctrl-D does
/help   shows this
Ctrl-C  ends an answer"""


@cli.command
def main(argv: Sequence[str]) -> int:
  """Answers `--prompt`, or one line after another until the end of input.

  Returns:
    The exit status: 0; 130 where `--prompt`'s answer was interrupted; 2 = no
    such model, no tokenizer, or a setting out of range.
  """
  args = make_parser().parse(argv)
  # While models are loaded Ctrl-C ends the process at once.
  with signals.catch_interrupts() as interrupts:
    return talk(args, interrupts)


def talk(args: argparse.Namespace, interrupts: signals.Interrupts) -> int:
  """Loads the models and answers; see `main`."""
  # Imported late: a mistyped flag should not wait for jax.
  import jax

  import jaxalign
  from jaxalign.config.online import ScoringConfig
  from jaxalign.data.rows import PromptRow
  from jaxalign.parallel.mesh import make_mesh
  from jaxalign.sampling import settings
  from jaxalign.sampling.generator import Generator
  from jaxalign.sampling.sampler import Sampler
  from jaxalign.setup.rewards import check_prompts, open_rewards, read_rewards

  # Checking the flags comes first: loading a model may take minutes.
  chosen = {
    "temperature": args.temperature,
    "top_p": args.top_p,
    "max_new_tokens": args.max_new_tokens,
  }
  settings.make(**chosen)
  check_best_of(args)

  # Loading the models.
  dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
  loaded = jaxalign.load(args.model, dtype=dtype)
  if loaded.model.config.head != "lm":
    raise UserError(
      f"{args.model} is a reward model (head {loaded.model.config.head}), which"
      " gives scores, not answers; name a language model"
    )
  tokenizer = loaded.tokenizer
  if tokenizer is None:
    raise UserError(
      f"{args.model} holds no tokenizer files; copy tokenizer.json next to the "
      "model"
    )
  reward_model = None
  if args.reward_model:
    names = parse_models(args.reward_model)
    scoring = ScoringConfig(encoding=args.encoding or "auto", dtype=dtype)
    rewards = open_rewards(names, make_mesh(), scoring, "--reward_model")
    check_prompts(rewards, [], "a conversation")
    reward_model = read_rewards(names, rewards, scoring)
  generator = Generator(
    Sampler(loaded.model),
    tokenizer,
    settings.make(
      **chosen,
      eos_ids=tokenizer.end_ids,
      # A stream ends itself at the next turn; whole completions need stops.
      stops=settings.fitting(tokenizer.encode_batch(tokenizer.format.turns))
      if reward_model
      else (),
      pad_id=tokenizer.pad_id,
    ),
    truncation="delimiters",
  )

  # Answering, turn by turn.
  key, once = jax.random.key(args.seed), args.prompt is not None
  if not once and sys.stdin.isatty():
    print(f"{args.model}: /help lists commands; the first answer compiles")
  start: Messages = []
  if args.system:
    start.append({"role": "system", "content": args.system})
  messages = list(start)
  lines = [args.prompt] if once else typed_lines(interrupts)
  for turn, question in enumerate(lines):
    if question == RESET:
      messages = list(start)
      continue
    asked, first = (), False
    # A model without turns continues a text; a prompt may be written out.
    if tokenizer.format.name == "raw" or (
      once and templates.is_prompt(question)
    ):
      prompt = question
    else:
      first = all(turn["role"] == "system" for turn in messages)
      messages.append({"role": "user", "content": question})
      prompt = fit(tokenizer, messages, loaded.model.config.max_positions)
      # The judge reads the same turns in a format of its own.
      asked = tuple(messages)
    # A key for each turn: the same question may get another answer.
    turn_key = key if once else jax.random.fold_in(key, turn)
    completion = ""
    try:
      with interrupts.answer():
        if reward_model is None:
          for piece in generator.stream(loaded.params, prompt, turn_key):
            print(piece, end="", flush=True)
            completion += piece
            if interrupts.asked:
              break
          print(flush=True)
        else:
          drawn = generator(loaded.params, [prompt], args.best_of, turn_key)
          # Functions are given a first question as in training, later ones
          # with the dialogue so far, as text.
          columns = {"prompt": question if first else prompt}
          row = PromptRow(prompt, "", asked, columns)
          scores = reward_model([row] * args.best_of, drawn.texts)
          completion = show_best(drawn.texts, scores.tolist())
    except UserError as error:
      if once:
        raise
      # Such as a question that is too long: the next one may be answered.
      print(f"error: {error}", file=sys.stderr)
    if asked and completion:
      messages.append({"role": "assistant", "content": completion.strip()})
    elif asked:
      messages.pop()  # the question stays unanswered
  return cli.INTERRUPTED if once and interrupts.asked else 0


def make_parser() -> cli.Parser:
  """The command's flags."""
  parser = cli.Parser("jaxalign.chat", __doc__)
  parser.add_argument("model", help="run folder, model folder, hub id, or lab")
  parser.add_argument("--prompt", help="answers this once and ends")
  parser.add_argument("--system", default="", help="text before the first turn")
  for name, kind, default, words in (
    ("--temperature", float, 0.7, "0 takes the likeliest tokens"),
    ("--top_p", float, 0.9, "draws from the likeliest tokens of this share"),
    ("--max_new_tokens", int, 256, "longest answer"),
    ("--seed", int, 0, "the same seed gives the same answers"),
    ("--best_of", int, 1, "completions that --reward_model chooses from"),
  ):
    parser.add_argument(
      name,
      type=kind,
      default=default,
      metavar="X" if kind is float else "N",
      help=f"{words} (default: {default})",
    )
  parser.add_argument("--reward_model", help="chooses the best of N answers")
  parser.add_argument(
    "--encoding",
    choices=("concat", "pair"),
    help="how the reward model was shown answers in training; default: as its "
    "folder says, else pair if it tells segments apart, or concat",
  )
  return parser


def check_best_of(args: argparse.Namespace) -> None:
  """Checks that the flags of best-of-N go together.

  Raises:
    UserError: they do not.
  """
  if args.best_of < 1:
    raise UserError(f"--best_of must be >= 1, got {args.best_of}")
  if args.best_of > 1 and not args.reward_model:
    raise UserError(
      f"--best_of={args.best_of} needs something to choose by; add "
      "--reward_model with a folder, a hub id, or lab"
    )
  names = [name for name, _ in parse_models(args.reward_model or "")]
  for check in (weighs_groups, names_function):
    rule = check("--reward_model", *names)
    if not rule.holds:
      raise UserError(f"{rule.must}, got {args.reward_model!r}; {rule.remedy}")
  if args.best_of > 1 and args.temperature == 0:
    raise UserError(
      f"--best_of={args.best_of} needs answers that differ, and with "
      "--temperature=0 they are all the same; raise it"
    )


def fit(tokenizer: "Tokenizer", messages: Messages, context: int) -> str:
  """The dialogue as a prompt, without the oldest turns where it is too long.

  A quarter of the context stays free for the answer. The system text and the
  last turn are never dropped.

  Args:
    tokenizer: of the model that answers.
    messages: the dialogue so far; shortened in place.
    context: tokens that the model can read.
  """
  first = 1 if messages[0]["role"] == "system" else 0
  while True:
    prompt = tokenizer.render_chat(messages, reply=True)
    (ids,) = tokenizer.encode_prompts([prompt])
    if 4 * len(ids) <= 3 * context or len(messages) <= first + 1:
      return prompt
    # A question goes together with its answer.
    del messages[first : first + 2]


def show_best(texts: Sequence[str], scores: Sequence[float]) -> str:
  """Prints the answer with the highest score; an empty one only if all are.

  A score that is not finite is lower than all others and not in the mean.
  """
  finite = [score for score in scores if math.isfinite(score)]
  ranks = [s if math.isfinite(s) else -math.inf for s in scores]
  best = max(range(len(texts)), key=lambda i: (bool(texts[i]), ranks[i]))
  print(texts[best])
  mean = sum(finite) / len(finite) if finite else math.nan
  among = f"best of {len(texts)}, their mean is {mean:.2f}"
  print(f"[score {scores[best]:.2f}, {among}]", flush=True)
  return texts[best]


def typed_lines(interrupts: signals.Interrupts) -> Iterator[str]:
  """Questions that the user types and `RESET`, until the end or `/exit`.

  Blank lines are left out, other commands are answered here. Ctrl-C drops the
  line, and a second one in a row ends the program.
  """
  prompt = "> " if sys.stdin.isatty() else ""
  dropped = False
  while True:
    try:
      with interrupts.typing():
        line = input(prompt).strip()
    except EOFError:
      return
    except KeyboardInterrupt:
      if dropped:
        raise
      dropped = True
      print("\nCtrl-C again, Ctrl-D or /exit ends", flush=True)
      continue
    dropped = False
    if line in EXIT:
      return
    if line == RESET:
      print("the next question begins a new dialogue", flush=True)
    elif re.fullmatch(r"/\w*", line):
      print(
        HELP if line == "/help" else f"no command {line}\n{HELP}", flush=True
      )
      continue
    if line:
      yield line


if __name__ == "__main__":
  sys.exit(main())
