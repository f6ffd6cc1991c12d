"""The model card: `README.md` with the front matter that the hub reads."""

import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence

from jaxalign.models.hf.config_json import REGRESSION, JsonObject, read_json

_READS_MEAN = (
  "The score is read from the mean state of all tokens, padding left out; "
  "transformers loads the weights but reads the last token. Use jaxalign."
)
_READS_EOS = (
  "The score is read at the first end-of-text token; append one to the text. "
  "Padding must not be counted as text."
)


def write(
  folder: pathlib.Path,
  *,
  config: JsonObject | None = None,
  metrics: JsonObject | None = None,
  license: str = "other",
  note: str = "",
) -> None:
  """Writes the card of a model folder.

  Args:
    folder: holds the model's `config.json`.
    config: of the training run; its `policy`, `data`, `prompts` and
      `algorithm` fill the front matter.
    metrics: name -> last value.
    license: an SPDX-like id that the hub knows. Weights inherit terms from
      their base model and data, so it is the user's to say.
    note: what readers should know first: data, command, time, limits.
  """
  # The front matter, which the hub reads.
  config, metrics = config or {}, metrics or {}
  model = read_json(folder / "config.json")
  policy = config.get("policy")
  base_model = _hub_id(policy)
  datasets = _datasets(config.get("data"), config.get("prompts"))
  # Class names end in ForCausalLM or ForSequenceClassification.
  scores = "lm" if str(model["architectures"][0]).endswith("LM") else "score"
  front = {
    "license": license,
    "library_name": "transformers",
    "pipeline_tag": (
      "text-generation" if scores == "lm" else "text-classification"
    ),
    "tags": ["jaxalign", *filter(None, [config.get("algorithm")])],
    **({"base_model": base_model} if base_model else {}),
    **({"datasets": datasets} if datasets else {}),
  }

  # Notes: transformers loads these heads but reads them at another token.
  head = {"score_mean": _READS_MEAN, "score_eos": _READS_EOS}
  kind = head.get(model.get("jaxalign_head", ""))
  notes = filter(None, [_groups(model), kind, note])

  # The text.
  text = "\n".join(
    [
      "---",
      # A JSON value is a YAML value.
      *(f"{key}: {json.dumps(value)}" for key, value in front.items()),
      "---",
      "",
      f"# {config.get('algorithm', model['model_type'])} model",
      "",
      f"Made with jaxalign from {policy or 'a model that was not named'}.",
      *(line for text in notes for line in ("", text)),
      *_section("Data", _data_lines(config)),
      *_section("Metrics", _metric_lines(metrics)),
      *_section("Config", _config_lines(config)),
      "",
    ]
  )
  (folder / "README.md").write_text(text, encoding="utf-8")


def _groups(model: JsonObject) -> str:
  """Says whose scores they are, for a model with several."""
  if model.get("problem_type") != REGRESSION:
    return ""
  names = ", ".join(model["id2label"].values())
  return f"It gives one score for each group of people: {names}."


def _section(title: str, lines: list[str]) -> list[str]:
  return ["", f"## {title}", "", *lines] if lines else []


def _data_lines(config: JsonObject) -> list[str]:
  names = [(key, config.get(key)) for key in ("data", "prompts")]
  return [f"- {key}: `{json.dumps(value)}`" for key, value in names if value]


def _metric_lines(metrics: JsonObject) -> list[str]:
  rows = [
    f"| {name} | {value:.6g} |"
    for name, value in sorted(metrics.items())
    if isinstance(value, int | float)
  ]
  return ["| metric | last value |", "|---|---|", *rows] if rows else []


def _config_lines(config: JsonObject) -> list[str]:
  if not config:
    return []
  return ["```json", json.dumps(config, indent=2, default=str), "```"]


def _hub_id(source: object) -> str:
  """`owner/name` of "owner/name[:subset][@...]"; "" of what is on this disk."""
  if not isinstance(source, str):
    return ""
  name = re.split("[:@]", source)[0]
  # Paths look like ids: of runs, of the models that ship here, of files.
  is_local = (
    name.startswith(("runs/", "lab/"))
    or name.endswith((".json", ".jsonl", ".gz", ".csv", ".parquet", ".arrow"))
    or os.path.exists(source)
    or os.path.exists(name)
  )
  is_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)
  return name if is_id and not is_local else ""


def _datasets(*values: JsonObject | Sequence[str] | str | None) -> list[str]:
  """The hub's data sets among a config's sources."""
  names: list[str] = []
  for value in values:
    # A value is a source, a list of sources, or a section that has one.
    source = value.get("source") if isinstance(value, Mapping) else value
    parts = source.split(",") if isinstance(source, str) else source or ()
    names += [_hub_id(str(part).strip()) for part in parts]
  return list(dict.fromkeys(filter(None, names)))
