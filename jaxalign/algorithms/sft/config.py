"""SFT's config."""

import dataclasses

from jaxalign.config.rules import field
from jaxalign.config.supervised import SupervisedConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTConfig(SupervisedConfig):
  """Supervised fine-tuning, next-token loss."""

  algorithm: str = field("sft", "what to run", choices=("sft",))
  packing: bool = field(False, "several texts a row; none attends to another")
  loss_on: str = field(
    "completion",
    "tokens in the loss: those of the completion, or all of the text",
    choices=("completion", "all"),
    also=("completion_only_loss",),
  )
  train_eos: bool = field(True, "put the end of text after every row")


CONFIG = SFTConfig
