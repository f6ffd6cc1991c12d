"""The configs that learn from a data set: texts, scores or preferences."""

import dataclasses
import math
from collections.abc import Iterator

from jaxalign.config.rules import Rule, Section, field
from jaxalign.config.sections import TrainingConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class SupervisedConfig(TrainingConfig):
  """What learning from a data set needs, whatever the loss."""

  steps: int = field(
    0,
    "optimizer updates; 0 = those of `epochs`",
    ">= 0",
    also=("max_steps", "num_steps", "total_steps"),
  )
  epochs: float = field(
    1.0,
    "passes over the data if steps is 0",
    "> 0",
    also=("num_train_epochs", "num_epochs"),
  )
  data: str = field(
    "lab",
    "training rows: lab, a hub id, a file or a glob; several with commas",
    also=("dataset", "datasets", "dataset_name", "train_data", "train_dataset"),
  )
  max_example_chars: int = field(
    0, "longer rows are left out, in characters; 0 = no limit", ">= 0"
  )
  # Held-out rows.
  validation_data: str = field(
    "",
    "held-out rows, written like data; empty = none",
    also=("eval_dataset", "test_datasets", "val_set_size"),
  )
  validation_rows: int = field(
    0, "held-out rows to use; 0 = all of validation_data", ">= 0"
  )
  validation_interval: int = field(
    0,
    "interval in updates; 0 = only at the end",
    ">= 0",
    also=("eval_steps", "eval_strategy", "evals_per_epoch"),
  )

  def steps_over(self, rows: int) -> int:
    """The run's steps: `steps`, or `epochs` passes over so many rows."""
    # Rounded up: the last step may take rows of the next epoch.
    return self.steps or math.ceil(self.epochs * rows / self.batch_size)

  def rules(self) -> Iterator[Rule]:
    """What holds for learning from a data set."""
    yield from super().rules()
    yield Rule(
      bool(self.data), "data must name a source", "lab is the smallest"
    )
    yield Rule(
      self.validation_interval == 0 or bool(self.validation_data),
      "validation_interval must be 0 while validation_data is empty",
      "name validation_data or set the interval to 0",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReferenceConfig(Section):
  """What learning against a reference needs, whatever the loss."""

  beta: float = field(
    0.1,
    "weight of the KL to the reference: higher keeps the policy closer to it "
    "(Rafailov 2023; TRL)",
    "> 0",
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceConfig(ReferenceConfig, SupervisedConfig):
  """Preferences without a reward model: a data set and a reference."""

  train_eos: bool = field(True, "put the end of text after every completion")
  reference: str = field(
    "auto",
    "auto = the policy before training stays in memory, as a copy or as the "
    "base under adapters; stored = it is run once over all texts, and its "
    "log-probabilities are kept in the run's folder",
    choices=("auto", "stored"),
    also=("precompute_ref_log_probs", "ref_model"),
  )
  reference_logps: str = field(
    "",
    "reference.npz of an earlier run of the same policy and data, read instead "
    "of running the reference; empty = run it",
  )

  def rules(self) -> Iterator[Rule]:
    """Log-probabilities of an earlier run are those of a stored reference."""
    yield from super().rules()
    yield Rule(
      not self.reference_logps or self.reference == "stored",
      f"reference_logps must be empty while reference={self.reference!r}",
      "set reference='stored' to use it",
    )
