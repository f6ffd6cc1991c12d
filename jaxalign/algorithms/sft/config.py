"""SFT's config."""

import dataclasses

from jaxalign.config.rules import field
from jaxalign.config.supervised import SupervisedConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTConfig(SupervisedConfig):
  """Supervised fine-tuning, next-token loss."""

  algorithm: str = field("sft", "what to run", choices=("sft",))
  packing: bool = field(
    False,
    "several texts a row; none attends to another",
    also=("sample_packing",),
  )
  loss_on: str = field(
    "assistant",
    "tokens in the loss: `assistant`, all assistant turns of a role list; "
    "`completion`, the last turn alone; `all` of the text; of rows that are no "
    "role lists, the first two take the completion",
    choices=("assistant", "completion", "all"),
    also=("assistant_only_loss", "completion_only_loss", "train_on_inputs"),
  )
  train_eos: bool = field(True, "put the end of text after every row")


CONFIG = SFTConfig
