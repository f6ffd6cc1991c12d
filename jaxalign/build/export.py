"""The end of a run: a Hugging Face folder with a card, a report, a mark."""

import pathlib
import time
from typing import Any

from jaxalign.config import TrainingConfig, to_mapping
from jaxalign.core.types import TrainState
from jaxalign.data.tokenizer import Tokenizer
from jaxalign.models import lora
from jaxalign.models.hf import card, write
from jaxalign.runtime import metrics, report, workdir
from jaxalign.runtime.context import Context


def finish(
  config: TrainingConfig,
  folder: pathlib.Path,
  ctx: Context,
  state: TrainState,
  tokenizer: Tokenizer,
) -> None:
  """Writes `model/` and `report.html` and marks the run as finished."""
  rows = metrics.read_jsonl(folder / "metrics.jsonl")
  last = _latest(rows)
  save_model(folder / "model", config, ctx, state, tokenizer, last)
  report.write_report(folder)
  summary = {
    "steps": config.steps,
    "metrics": last,
    "finished_at": time.strftime("%Y-%m-%d %H:%M:%S"),
  }
  workdir.mark_finished(folder, summary)


def save_model(
  folder: pathlib.Path,
  config: TrainingConfig,
  ctx: Context,
  state: TrainState,
  tokenizer: Tokenizer,
  values: dict[str, Any],
) -> None:
  """The trained model as a folder that plain transformers loads."""

  def also(place: pathlib.Path) -> None:
    tokenizer.save(place)

    card.write(place, config=to_mapping(config), metrics=values)

  ids = {
    "pad_token_id": tokenizer.pad_id,
    "bos_token_id": tokenizer.bos_id,
    "eos_token_id": tokenizer.eos_id,
  }
  write.save(
    ctx.model,
    lora.join(state.result, ctx.frozen),
    folder,
    config={k: v for k, v in ids.items() if v is not None},
    also=also,
  )


def _latest(rows: list[dict[str, Any]]) -> dict[str, Any]:
  """The last value of every metric."""
  values: dict[str, Any] = {}
  for row in rows:
    values |= row
  return values
