"""A run, a checkpoint or a model folder -> a Hugging Face folder.

  python -m jaxalign.convert SRC DST [--check] [--dtype D] [--license L]
  python -m jaxalign.convert RUN DST --adapters

SRC is a run's folder (its finished `model/`, else its newest whole
checkpoint), a Hugging Face folder, PEFT adapters, or a hub id. `--check`
compares the result with transformers, if torch is installed. `--adapters`
writes what a LoRA run has trained, as the peft library reads it.
"""

import argparse
import importlib.util
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxalign
from jaxalign import config as config_lib
from jaxalign.errors import UserError, exit_status, told
from jaxalign.models.hf import card, fields, folder, peft, write

DTYPES = ("float32", "bfloat16", "float16")


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns the exit status: 2 is a mistake in the input."""

  def run() -> None:
    args = told(_parser()).parse_args(argv)
    if args.adapters:
      if args.dtype or args.note or args.license != "other":
        raise UserError(
          "--adapters writes tensors as they were trained and no card; leave "
          "--dtype, --license and --note out"
        )
      save_adapters(args.source, args.target)
    else:
      convert(args.source, args.target, args.dtype, args.license, args.note)
    print(f"wrote {args.target}")
    if args.check:
      print(check(args.target))

  return exit_status(run)


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m jaxalign.convert",
    description="Writes a folder that transformers loads.",
  )
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
    "--adapters", action="store_true", help="of a LoRA run, in PEFT's format"
  )
  parser.add_argument(
    "--check", action="store_true", help="compare logits with transformers"
  )
  return parser


def convert(
  source: str | pathlib.Path,
  target: str | pathlib.Path,
  dtype: str | None = None,
  license: str = "other",
  note: str = "",
) -> None:
  """Writes `source` as a Hugging Face folder.

  Args:
    source: a run's folder, one of its checkpoints' folder, a model folder, a
      folder with PEFT adapters (merged with their base) or a hub id.
    target: replaced if it holds a model, refused if it holds other files.
    dtype: "float32", "bfloat16", "float16", or None = as in the source.
    license: for the model card.
    note: a paragraph of the card.

  Raises:
    UserError: neither of these, or it cannot be read or written.
  """
  write.check_target(pathlib.Path(target))
  run, step = _find_run(source)
  settings: dict[str, Any] = {}
  if run is not None:
    settings = fields.read_json(run / "config.json")
  if run is None or (step is None and (run / "model").is_dir()):
    place = source if run is None else run / "model"
    stored = dtype or folder.stored_dtype(place)
    loaded = jaxalign.load(place, dtype=stored)
  else:
    loaded = _restore(run, settings, step)
  tokenizer = loaded.tokenizer

  def also(new: pathlib.Path) -> None:
    if tokenizer is not None:
      tokenizer.save(new)
    metrics = _last_metrics(run) if run is not None else {}
    card.write(
      new, config=settings, metrics=metrics, license=license, note=note
    )

  write.save(
    loaded.model,
    loaded.params,
    target,
    dtype=dtype,
    config=tokenizer.special_ids() if tokenizer is not None else {},
    also=also,
  )


def save_adapters(
  source: str | pathlib.Path, target: str | pathlib.Path
) -> None:
  """Writes the adapters of a LoRA run's checkpoint in PEFT's format.

  Args:
    source: a run's folder or one of its checkpoints' folder.
    target: as in `convert`.

  Raises:
    UserError: no such run, one without adapters, or not writable.
  """
  run, step = _find_run(source)
  if run is None:
    raise UserError(
      f"{source} is no run's folder; --adapters needs the run that trained them"
    )
  from jaxalign.build import models

  settings = fields.read_json(run / "config.json")
  loaded = _restore(run, settings, step)
  kind = "policy" if loaded.model.config.head == "lm" else "reward-train"
  base = models.locate(settings["policy"], kind)
  peft.save(loaded.model, loaded.params, target, base=base)


def _find_run(
  source: str | pathlib.Path,
) -> tuple[pathlib.Path | None, int | None]:
  """The run that a folder is, or is a checkpoint of; and that one's step."""
  folder = pathlib.Path(source).absolute()
  if not folder.is_dir():
    return None, None
  if folder.parent.name == "checkpoints" and folder.name.isdigit():
    return folder.parent.parent, int(folder.name)
  if folder.name == "checkpoints":
    return folder.parent, None
  is_run = (folder / "checkpoints").is_dir() or (folder / "model").is_dir()
  return (folder if is_run else None), None


def _restore(
  run: pathlib.Path, settings: dict[str, Any], step: int | None
) -> jaxalign.Loaded:
  """The policy of a run's config with a checkpoint's parameters."""
  from jaxalign.build import models
  from jaxalign.models import lora
  from jaxalign.parallel.mesh import make_mesh
  from jaxalign.runtime import checkpoint

  found = checkpoint.load(run / "checkpoints", "params", step=step)
  if found is None:
    raise UserError(
      f"{run} has neither a finished model/ nor a whole checkpoint; run it "
      "further first"
    )
  config = config_lib.from_mapping(settings)
  head = getattr(config, "head", "lm")
  opened = models.open_policy(config, make_mesh(), head)
  loaded = models.with_groups(opened, getattr(config, "groups", ())).load()
  trained = found[0]
  averaged = checkpoint.load(run / "checkpoints", "ema", step=found[2])
  if averaged is not None and averaged[0]:
    trained = averaged[0]
  if loaded.model.lora is not None:
    trained = lora.join(trained, lora.split(loaded.params)[1])
  params = jax.tree.map(jnp.asarray, trained)
  shapes = lambda tree: jax.tree.map(lambda leaf: leaf.shape, tree)
  if shapes(params) != shapes(loaded.model.shapes):
    raise UserError(
      f"{run}: the checkpoint's parameters are not those of the config's "
      "policy; was the policy's folder replaced?"
    )
  return jaxalign.Loaded(loaded.model, params, loaded.tokenizer)


def _last_metrics(run: pathlib.Path) -> dict[str, Any]:
  from jaxalign.runtime import metrics

  last: dict[str, Any] = {}
  if (run / "metrics.jsonl").is_file():
    for row in metrics.read_jsonl(run / "metrics.jsonl"):
      last |= row
  return last


def check(target: str | pathlib.Path) -> str:
  """Compares a folder's logits, read here and by transformers, in float32.

  Returns:
    One line: what was compared, or why nothing was.

  Raises:
    UserError: they differ.
  """
  if importlib.util.find_spec("torch") is None:
    return "not checked: torch is not installed; pip install torch"
  model = jaxalign.load(target)
  head = model.model.config.head
  if head in ("score_mean", "score_eos"):
    return f"not checked: transformers has no class with the head {head}"
  tokens, mask = _sample_batch(model.model.config.vocab_size)
  ours = np.asarray(jaxalign.logits(model, tokens, mask))
  ours = ours if ours.ndim > 1 else ours[:, None]
  theirs = _their_logits(target, tokens, mask, head)
  if head == "lm":
    ours, theirs = ours[mask], theirs[mask]
  gap = float(np.abs(ours - theirs).max())
  line = f"max abs difference {gap:.2e}"
  if head == "lm":
    p, q = (
      x - np.logaddexp.reduce(x, -1, keepdims=True) for x in (theirs, ours)
    )
    divergence = float((np.exp(p) * (p - q)).sum(-1).mean())
    line += f", KL {divergence:.2e} nats a token"
  line += f", over {int(mask.sum())} tokens"
  if not gap <= 1e-3 * max(1.0, float(np.abs(theirs).max())):
    raise UserError(f"{target} differs from transformers: {line}")
  return f"checked against transformers: {line}"


def _sample_batch(vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
  """Random ids in rows of several lengths, padded on the right with 0."""
  rng = np.random.default_rng(0)
  lengths = np.array([1, 7, 20, 32])
  mask = np.arange(lengths.max()) < lengths[:, None]
  tokens = rng.integers(min(3, vocab_size - 1), vocab_size, mask.shape)
  return np.where(mask, tokens, 0), mask


def _their_logits(target: Any, tokens: Any, mask: Any, head: str) -> np.ndarray:
  import torch
  import transformers

  transformers.logging.set_verbosity_error()
  transformers.logging.disable_progress_bar()
  auto = transformers.AutoModelForSequenceClassification
  if head == "lm":
    auto = transformers.AutoModelForCausalLM
  model = auto.from_pretrained(target, dtype=torch.float32).eval()
  # Our rows are padded with 0, whatever the tokenizer's pad token is.
  model.config.pad_token_id = 0
  with torch.no_grad():
    out = model(torch.tensor(tokens), attention_mask=torch.tensor(mask).long())
  return out.logits.numpy()


if __name__ == "__main__":
  sys.exit(main())
