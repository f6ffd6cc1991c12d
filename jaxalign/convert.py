"""Writes a run, a checkpoint or a model folder as a Hugging Face folder.

  python -m jaxalign.convert runs/superhf-lab my-model --check
  python -m jaxalign.convert runs/mine my-adapters --adapters

SOURCE is a run's folder (its finished `model/`, else its newest whole
checkpoint), one checkpoint's folder, a Hugging Face folder, PEFT adapters, or
a hub id.
"""

import importlib.util
import pathlib
import sys
from collections.abc import Sequence

import numpy as np

import jaxalign
from jaxalign import cli
from jaxalign.algorithms import read_config
from jaxalign.core.types import JsonObject
from jaxalign.errors import UserError
from jaxalign.models.hf import card, config_json, folder, peft, write
from jaxalign.runtime import metrics
from jaxalign.setup import models
from jaxalign.setup.start import find_run, restore

Path = str | pathlib.Path

DTYPES = ("float32", "bfloat16", "float16")


@cli.command
def main(argv: Sequence[str]) -> None:
  """Flags -> `convert` or `save_adapters`, then `check`."""
  parser = cli.Parser("jaxalign.convert", __doc__)
  parser.add_argument("source", help="run folder, model folder or hub id")
  parser.add_argument("target", help="folder to write")
  parser.add_argument(
    "--dtype", choices=DTYPES, help="of the tensors; default: as they are"
  )
  parser.add_argument(
    "--license", default="other", help="for the model card, e.g. apache-2.0"
  )
  parser.add_argument("--note", default="", help="a paragraph of the card")
  parser.add_argument(
    "--adapters",
    action="store_true",
    help="writes what a LoRA run has trained, in the peft library's format",
  )
  parser.add_argument(
    "--check",
    action="store_true",
    help="compares logits with transformers, if torch is installed",
  )
  args = parser.parse(argv)
  if not args.adapters:
    convert(args.source, args.target, args.dtype, args.license, args.note)
  elif args.dtype or args.note or args.license != "other":
    raise UserError(
      "--adapters writes tensors as they were trained and no card; leave "
      "--dtype, --license and --note out"
    )
  else:
    save_adapters(args.source, args.target)
  print(f"wrote {args.target}")
  if args.check:
    print(check(args.target, args.source))


def convert(
  source: Path,
  target: Path,
  dtype: str | None = None,
  license: str = "other",
  note: str = "",
) -> None:
  """Writes `source` as a folder that transformers loads.

  Args:
    source: a run's folder, a checkpoint's folder, or what `load` takes.
    target: replaced if it holds a model, refused if it holds other files.
    dtype: "float32", "bfloat16", "float16", or None = as in the source.
    license: for the model card.
    note: a paragraph of the card.

  Raises:
    UserError: no such source, or it cannot be read or written.
  """
  # Before anything is read, which may take minutes.
  write.check_target(pathlib.Path(target))
  run_folder, step = find_run(source)
  # What the model card says of the run.
  config: JsonObject = {}
  last_metrics: JsonObject = {}
  if run_folder is not None:
    config = config_json.read_json(run_folder / "config.json")
    if (run_folder / "metrics.jsonl").is_file():
      for row in metrics.read_jsonl(run_folder / "metrics.jsonl"):
        last_metrics |= row

  # A finished run holds its model; its checkpoints are for a step by name.
  if run_folder is None or (step is None and (run_folder / "model").is_dir()):
    place = source if run_folder is None else run_folder / "model"
    loaded = jaxalign.load(place, dtype=dtype or folder.stored_dtype(place))
  else:
    loaded = restore(run_folder, read_config(config), step)
  tokenizer = loaded.tokenizer

  # The tokenizer and the card go in before the folder gets its name.
  def write_others(new: pathlib.Path) -> None:
    if tokenizer is not None:
      tokenizer.save(new)
    card.write(
      new, config=config, metrics=last_metrics, license=license, note=note
    )

  write.save(
    loaded.model,
    loaded.params,
    target,
    dtype=dtype,
    config=tokenizer.special_ids() if tokenizer is not None else {},
    also=write_others,
  )


def save_adapters(source: Path, target: Path) -> None:
  """Writes the adapters of a LoRA run's checkpoint in PEFT's format.

  Args:
    source: a run's folder or one of its checkpoints' folder.
    target: as in `convert`.

  Raises:
    UserError: no such run, one without adapters, or not writable.
  """
  run_folder, step = find_run(source)
  if run_folder is None:
    raise UserError(
      f"{source} is no run's folder; --adapters needs the run that trained them"
    )
  config = config_json.read_json(run_folder / "config.json")
  loaded = restore(run_folder, read_config(config), step)
  kind = "policy" if loaded.model.config.head == "lm" else "reward-train"
  base = models.locate(config["policy"], kind)
  # A run's folder stands for its model here, and not in peft.
  base = models.locate_model(base, "policy")
  peft.save(loaded.model, loaded.params, target, base=base)


def check(target: Path, source: Path | None = None) -> str:
  """Compares a folder's logits, read here and by transformers, in float32.

  Args:
    target: the folder that was written; it is left as it is.
    source: what it was written from, if transformers can read that too: then
      both folders have to give transformers the same logits.

  Returns:
    One line: what was compared, or why nothing was.

  Raises:
    UserError: they differ.
  """
  if importlib.util.find_spec("torch") is None:
    return "not checked: torch is not installed; pip install torch"
  loaded = jaxalign.load(target)
  head = loaded.model.config.head
  if head in ("score_mean", "score_eos"):
    return f"not checked: transformers has no class with the head {head}"

  # Random ids in rows of several lengths, each of which compiles a program, and
  # the same rows ending in eos, at which a score may be read.
  rng, size = np.random.default_rng(0), loaded.model.config.vocab_size
  rows = [rng.integers(min(3, size - 1), size, n) for n in (1, 7, 20, 32)]
  tokenizer = loaded.tokenizer
  eos = None if tokenizer is None else tokenizer.eos_id
  if eos is not None:
    rows += [np.append(row[:-1], eos) for row in rows]
  ours = np.concatenate([_our_logits(loaded, row) for row in rows])
  theirs = _transformers_logits(target, rows, head == "lm")
  line = _compare(ours, theirs, f"{target} differs from transformers")
  line += f", over {sum(map(len, rows))} tokens"
  # What the writing lost would be missing on both sides above.
  if source is None or not _is_plain(pathlib.Path(source)):
    return f"checked against transformers: {line}"
  dtype = folder.stored_dtype(target)
  try:
    before = _transformers_logits(source, rows, head == "lm", dtype)
  except UserError as error:
    return f"checked against transformers: {line}; {error}"
  of_source = _compare(theirs, before, f"{target} differs from {source}")
  return f"checked against transformers: {line}; from the source: {of_source}"


def _is_plain(place: pathlib.Path) -> bool:
  """Whether a folder is a whole model of a kind that transformers knows."""
  path = place / "config.json"
  if not path.is_file() or find_run(place)[0] is not None:
    return False
  values = config_json.read_json(path)
  return "jaxalign_head" not in values and "base_model_config" not in values


def _compare(ours: np.ndarray, theirs: np.ndarray, failure: str) -> str:
  """Largest difference of logits `[N, V]` or scores `[N, 1]`, as text."""
  gap = float(np.abs(ours - theirs).max())
  line = f"max abs difference {gap:.2e}"
  if ours.shape[-1] > 1:
    logp = theirs - np.logaddexp.reduce(theirs, -1, keepdims=True)
    logq = ours - np.logaddexp.reduce(ours, -1, keepdims=True)
    kl = float((np.exp(logp) * (logp - logq)).sum(-1).mean())
    line += f", KL {kl:.2e} nats a token"
  # Not `gap > bound`: NaN must not pass.
  if not gap <= 1e-3 * max(1.0, float(np.abs(theirs).max())):
    raise UserError(f"{failure}: {line}")
  return line


def _our_logits(loaded: jaxalign.Loaded, row: np.ndarray) -> np.ndarray:
  """Of one row of ids, as transformers has them: `[T, V]`, or `[1, labels]`."""
  found = np.asarray(jaxalign.logits(loaded, row[None]))
  return found[0] if loaded.model.config.head == "lm" else found.reshape(1, -1)


def _transformers_logits(
  place: Path, rows: list[np.ndarray], causal: bool, dtype: str = "float32"
) -> np.ndarray:
  """Of rows of ids, one by one, as a pad id would have to be made up."""
  import torch
  import transformers

  transformers.logging.set_verbosity_error()
  transformers.logging.disable_progress_bar()
  auto = transformers.AutoModelForSequenceClassification
  if causal:
    auto = transformers.AutoModelForCausalLM
  # The numbers of the file, the arithmetic of float32.
  try:
    model = auto.from_pretrained(place, dtype=getattr(torch, dtype))
  except Exception as error:  # whatever a model's own code raises
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise UserError(f"transformers cannot load {place}: {reason}") from error
  model = model.float().eval()
  with torch.no_grad():
    found = [model(torch.tensor(row[None])).logits[0] for row in rows]
  return np.concatenate([np.atleast_2d(logits.numpy()) for logits in found])


if __name__ == "__main__":
  sys.exit(main())
