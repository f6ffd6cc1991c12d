"""The sections that training configs share, and the fields all of them have."""

import dataclasses
import re
from collections.abc import Iterator

from jaxalign.config.fields import Rule, field

HF_ADAMW = "torch AdamW, used by every SuperHF run"


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  """How gradients change parameters."""

  name: str = field(
    "adamw", "update rule of optax", choices=("adamw", "adafactor", "lion")
  )
  learning_rate: float = field(
    1e-5,
    "peak learning rate",
    rule="> 0",
    source="SuperHF Table 2",
    also=("lr",),
  )
  schedule: str = field(
    "linear",
    "shape of the learning rate after the warm-up",
    choices=("constant", "linear", "cosine"),
    source="SuperHF code",
    also=("scheduler_name", "lr_scheduler_type"),
  )
  warmup_steps: int = field(
    0, "steps of linear warm-up", rule=">= 0", also=("scheduler_warmup_steps",)
  )
  end_value_ratio: float = field(
    0.0, "learning rate at the end, as a share of the peak", rule="[0, 1]"
  )
  weight_decay: float = field(
    0.01, "decoupled weight decay on all leaves", rule=">= 0", source=HF_ADAMW
  )
  beta1: float = field(
    0.9, "decay of the gradient mean", rule="[0, 1)", also=("adam_beta1",)
  )
  beta2: float = field(
    0.999, "decay of the squared gradient", rule="[0, 1)", also=("adam_beta2",)
  )
  eps: float = field(
    1e-8, "added to the denominator", rule="> 0", also=("adam_epsilon",)
  )
  clip_norm: float = field(
    0.0,
    "largest global gradient norm; 0 = no clipping",
    rule=">= 0",
    source="none in SuperHF",
    also=("max_grad_norm", "grad_clip"),
  )
  ema: float = field(
    0.0, "decay of the averaged parameters; 0 = off", rule="[0, 1)"
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """How many devices each mesh axis has; -1 takes what is left."""

  replica: int = field(1, "copies of the parameters", also=("data", "dp"))
  fsdp: int = field(1, "parts that parameters and rows are split into")
  tensor: int = field(1, "parts that heads and features are split into")

  def rules(self) -> Iterator[Rule]:
    """Sizes are positive; one axis may take what is left."""
    sizes = {"replica": self.replica, "fsdp": self.fsdp, "tensor": self.tensor}
    for name, size in sizes.items():
      others = [n for n, s in sizes.items() if s == -1 and n != name]
      yield Rule(
        name,
        size >= 1 or size == -1,
        "must be >= 1, or -1 for the devices that are left",
        "1 is one device",
      )
      yield Rule(
        name,
        size != -1 or not others,
        f"must be >= 1 while {', '.join(others)} is -1",
        "only one axis can take what is left",
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
  """When to save, and how many saves to keep."""

  every_steps: int = field(50, "steps between saves; 0 = off", rule=">= 0")
  every_minutes: float = field(
    10.0, "minutes between saves; 0 = off", rule=">= 0"
  )
  keep: int = field(
    2, "newest checkpoints to keep", rule=">= 1", also=("save_total_limit",)
  )
  keep_best: str = field(
    "",
    "metric whose highest value keeps its checkpoint too, as "
    "eval_test_score/mean; held_out = the mean of the last five validations by "
    "test_reward_model; empty = off",
    also=("metric_for_best_model",),
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetricsConfig:
  """Where metrics go besides metrics.jsonl, which is always written."""

  tensorboard: bool = field(True, "write TensorBoard events")
  wandb: bool = field(False, "log to Weights & Biases; needs the extra [wandb]")
  trackio: bool = field(False, "log to trackio; needs the extra [trackio]")
  every_steps: int = field(
    1, "steps between lines", rule=">= 1", also=("logging_steps",)
  )
  project: str = field("jaxalign", "project name for wandb and trackio")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
  """Number formats; softmax, norms, log-probs and losses are always float32."""

  params: str = field(
    "float32",
    "format of parameters that are not trained; trained ones stay float32",
    choices=("float32", "bfloat16"),
  )
  compute: str = field(
    "auto",
    "format inside layers; auto = bfloat16 on accelerators, float32 on CPU",
    choices=("auto", "float32", "bfloat16"),
    also=("mixed_precision", "dtype", "bf16"),
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
  """Low-rank adapters; with them only the adapters are trained."""

  rank: int = field(
    0, "inner width r; 0 = train all parameters", rule=">= 0", also=("lora_r",)
  )
  alpha: float = field(
    32.0,
    "the update is scaled by alpha / rank",
    rule="> 0",
    source="SuperHF, later runs",
    also=("lora_alpha",),
  )
  dropout: float = field(
    0.05,
    "probability of dropping an adapter's input",
    rule="[0, 1)",
    source="SuperHF, later runs",
    also=("lora_dropout",),
  )
  targets: tuple[str, ...] = field(
    (),
    "linear layers that get an adapter, e.g. query_key_value,embed_out",
    also=("target_modules", "lora_target_modules"),
  )

  def rules(self) -> Iterator[Rule]:
    """Adapters need layers to sit on."""
    yield Rule(
      "targets",
      self.rank == 0 or bool(self.targets),
      f"must name a layer while rank={self.rank}",
      "give query_key_value (GPT-NeoX) or q_proj,v_proj (LLaMA), or rank=0",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitConfig:
  """A new model with random weights, used where `policy` is `init`.

  The names are those of a Hugging Face config.json; 0 takes the architecture's
  own default. The vocabulary is the tokenizer's.
  """

  tokenizer: str = field("", "tokenizer: a folder or a hub id")
  model_type: str = field(
    "gpt_neox",
    "architecture",
    choices=("gpt_neox", "llama", "gpt_neo", "deberta-v2"),
    also=("architecture",),
  )
  hidden_size: int = field(256, "width", rule=">= 1", also=("d_model",))
  num_hidden_layers: int = field(4, "layers", rule=">= 1", also=("layers",))
  num_attention_heads: int = field(4, "query heads", rule=">= 1")
  num_key_value_heads: int = field(
    0, "key and value heads (LLaMA); 0 = as many as query heads", rule=">= 0"
  )
  intermediate_size: int = field(
    0, "inner width of the feed-forward layer; 0 = 4 x hidden_size", rule=">= 0"
  )
  max_position_embeddings: int = field(512, "context in tokens", rule=">= 1")
  type_vocab_size: int = field(
    0, "segment types (DeBERTa); 2 tells prompt and answer apart", rule=">= 0"
  )
  tie_word_embeddings: bool = field(
    False, "use the input embedding as the output matrix"
  )

  def rules(self) -> Iterator[Rule]:
    """Heads divide the width and the query heads."""
    heads, groups = self.num_attention_heads, self.num_key_value_heads
    yield Rule(
      "hidden_size",
      self.hidden_size % heads == 0,
      f"must be a multiple of num_attention_heads={heads}",
      f"take {-(-self.hidden_size // heads) * heads}",
    )
    yield Rule(
      "num_key_value_heads",
      groups == 0 or heads % groups == 0,
      f"must divide num_attention_heads={heads}",
      "take 0 for as many",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
  """What every training run has."""

  algorithm: str = field("superhf", "what to run", choices=("superhf",))
  seed: int = field(
    0, "seed of samples, data order and dropout", rule="[0, 4294967296)"
  )
  steps: int = field(200, "length of the run", rule=">= 1")
  policy: str = field(
    "lab",
    "model to train: a hub id, a folder, lab, or init (see config.init)",
    also=("model", "model_name", "language_model_name", "model_name_or_path"),
  )
  optimizer: OptimizerConfig = field(OptimizerConfig(), "see the class")
  lora: LoraConfig = field(LoraConfig(), "see the class", also=("peft",))
  init: InitConfig = field(InitConfig(), "see the class")
  mesh: MeshConfig = field(MeshConfig(), "see the class")
  checkpoint: CheckpointConfig = field(CheckpointConfig(), "see the class")
  metrics: MetricsConfig = field(MetricsConfig(), "see the class")
  precision: PrecisionConfig = field(PrecisionConfig(), "see the class")
  remat: bool = field(
    False,
    "compute activations again in the backward pass: less memory, more time",
    also=("gradient_checkpointing",),
  )
  max_length: int = field(
    1024,
    "longest training text in tokens; the rest is cut off",
    rule=">= 2",
    source="SuperHF code",
    also=("max_length_rm", "max_seq_length"),
  )
  profile_steps: str = field(
    "", "steps A to B-1 to trace with jax.profiler, as A:B; empty = none"
  )
  compilation_cache: bool = field(
    True, "keep compiled programs on disk for the next start"
  )

  @property
  def held_out_metric(self) -> str:
    """What `checkpoint.keep_best=held_out` goes by; empty = not measured."""
    return ""

  @property
  def best_metric(self) -> str:
    """The metric whose highest value keeps its checkpoint; empty = none."""
    name = self.checkpoint.keep_best
    return self.held_out_metric if name == "held_out" else name

  @property
  def learning_rate_ratios(self) -> dict[str, float]:
    """Parts of the parameters that have a learning rate of their own."""
    return {}

  @property
  def derived(self) -> tuple[str, ...]:
    """Fields that the data decide, because they are left open."""
    return () if self.steps else ("steps",)

  def rules(self) -> Iterator[Rule]:
    """What holds for every training run."""
    yield Rule(
      "policy",
      bool(self.policy),
      "must name a model",
      "give a hub id or a folder",
    )
    yield Rule(
      "checkpoint.keep_best",
      self.checkpoint.keep_best != "held_out" or bool(self.held_out_metric),
      "must name a metric where no held-out reward is measured",
      "set test_reward_model and validation_interval of a method that samples, "
      "or name a metric of metrics.jsonl",
    )
    span = re.fullmatch(r"(\d+):(\d+)", self.profile_steps)
    yield Rule(
      "profile_steps",
      not self.profile_steps
      or (span is not None and int(span[1]) < int(span[2])),
      "must be empty or A:B with A < B",
      "write 10:13 for steps 10, 11 and 12",
    )
    yield Rule(
      "profile_steps",
      span is None or not self.steps or int(span[1]) < self.steps,
      f"must begin before the run's end at steps={self.steps}",
      "steps are counted from 0",
    )
    yield Rule(
      "init.tokenizer",
      self.policy != "init" or bool(self.init.tokenizer),
      "must be a folder or a hub id while policy='init'",
      "a new model needs a vocabulary",
    )
    yield Rule(
      "lora.rank",
      self.policy != "init" or self.lora.rank == 0,
      "must be 0 while policy='init'",
      "adapters on random weights would leave those as they are",
    )
    yield Rule(
      "precision.params",
      self.precision.params == "float32" or self.lora.rank > 0,
      "must be 'float32' while lora.rank=0 trains every parameter",
      "use lora.rank, or precision.compute='bfloat16'",
    )
