"""The sections that training configs share, and the fields all of them have."""

import dataclasses
import itertools
import re
from collections.abc import Iterator

from jaxalign.config.rules import Rule, Section, field


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Section):
  """How gradients change parameters."""

  name: str = field(
    "adamw",
    "update rule of optax",
    choices=("adamw", "adafactor", "lion"),
    also=("optim", "optimizer_type"),
  )
  # The learning rate over the run, in updates (SuperHF: in superbatches).
  learning_rate: float = field(
    1e-5, "the peak (SuperHF Table 2)", "> 0", also=("lr",)
  )
  schedule: str = field(
    "linear",
    "shape of the learning rate after the warm-up (SuperHF code)",
    choices=("constant", "linear", "cosine"),
    also=("scheduler_name", "lr_scheduler_type", "lr_scheduler"),
  )
  warmup_steps: int = field(
    0,
    "steps of linear warm-up",
    ">= 0",
    also=("scheduler_warmup_steps", "warmup_ratio", "num_warmup_steps"),
  )
  end_value_ratio: float = field(
    0.0, "learning rate at the end, as a share of the peak", "[0, 1]"
  )
  # The defaults of torch's AdamW, which every SuperHF run used.
  weight_decay: float = field(
    0.01, "decoupled decay of all leaves (torch AdamW, as SuperHF)", ">= 0"
  )
  beta1: float = field(
    0.9, "decay of the gradient mean", "[0, 1)", also=("adam_beta1",)
  )
  beta2: float = field(
    0.999, "decay of the squared gradient", "[0, 1)", also=("adam_beta2",)
  )
  eps: float = field(1e-8, "in the denominator", "> 0", also=("adam_epsilon",))
  clip_norm: float = field(
    0.0,
    "largest global gradient norm; 0 = no clipping (none in SuperHF)",
    ">= 0",
    also=("max_grad_norm", "grad_clip", "gradient_clipping"),
  )
  ema: float = field(0.0, "decay of the averaged parameters; 0 = off", "[0, 1)")
  mu_dtype: str = field(
    "float32",
    "format of the gradient mean of adamw and lion; bfloat16 saves 2 bytes a "
    "parameter",
    choices=("float32", "bfloat16"),
  )
  offload: bool = field(
    False,
    "keep the state of the update rule in the host's memory between updates; "
    "slower, and no saving on a CPU",
    also=("offload_optimizer", "optimizer_offload", "adam_offload"),
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig(Section):
  """How many devices each mesh axis has; -1 takes all that are left."""

  replica: int = field(
    1,
    "copies of the parameters; -1 = all devices that are left, of which fsdp "
    "then takes 1",
    also=("data", "dp"),
  )
  fsdp: int = field(
    -1,
    "parts that parameters and rows are split into; -1 = all devices that are "
    "left, fewer where the rows of a pass do not split evenly",
  )
  tensor: int = field(
    1, "parts that heads and features are split into; -1 as for replica"
  )
  sequence: int = field(
    1,
    "parts that parameters and the tokens of a row are split into, for few and "
    "long rows; -1 as for replica",
    also=("context_parallel_size", "cp_size"),
  )
  gather_for_generation: bool = field(
    True,
    "gather all parameters before completions are sampled; false = keep them "
    "split and gather each layer at each token: slower, for policies that do "
    "not fit on one device",
    also=("ds3_gather_for_generation",),
  )
  auto: bool = field(
    False,
    "choose the axes by the devices, their memory and the model, and say why; "
    "also written mesh=auto",
  )

  @classmethod
  def of_word(cls, word: str) -> dict[str, bool] | None:
    """`config.mesh=auto`."""
    return {"auto": True} if word == "auto" else None

  @property
  def sizes(self) -> dict[str, int]:
    """Devices of each axis; at most one is -1."""
    # The default of fsdp stands back behind an axis that was asked for.
    taken = -1 in (self.replica, self.tensor, self.sequence)
    return {
      "replica": self.replica,
      "fsdp": 1 if taken else self.fsdp,
      "tensor": self.tensor,
      "sequence": self.sequence,
    }

  def rules(self) -> Iterator[Rule]:
    """Sizes are positive; one axis may take what is left."""
    yield Rule(
      not self.auto or tuple(self.sizes.values()) == (1, -1, 1, 1),
      "auto must be false where the size of an axis is given",
      "it chooses all of them",
    )
    for name in ("replica", "fsdp", "tensor", "sequence"):
      size = getattr(self, name)
      yield Rule(
        size >= 1 or size == -1,
        f"{name} must be >= 1, or -1 for the devices that are left",
        "1 is one device",
      )
    for name, other in itertools.combinations(
      ("replica", "sequence", "tensor"), 2
    ):
      yield Rule(
        getattr(self, name) != -1 or getattr(self, other) != -1,
        f"{name} must be >= 1 while {other} is -1",
        "only one axis can take what is left",
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Section):
  """When checkpoints are saved, and how many are kept."""

  every_steps: int = field(
    50,
    "steps between saves; 0 = off",
    ">= 0",
    also=("save_steps", "save_strategy", "saves_per_epoch"),
  )
  every_minutes: float = field(10.0, "minutes between saves; 0 = off", ">= 0")
  keep: int = field(
    2, "newest checkpoints to keep", ">= 1", also=("save_total_limit",)
  )
  keep_best: str = field(
    "",
    "metric, say eval_test_score/mean, whose highest value keeps its "
    "checkpoint too; held_out = the mean of the last five validations by "
    "test_reward_model; empty = off",
    also=("metric_for_best_model",),
  )
  sha256: bool = field(
    False,
    "also write the SHA-256 of every file of a checkpoint, and compare them "
    "when it is read; sizes and a sum of every array are always compared",
  )
  allow_other_data: bool = field(
    False, "continue a run although its data, prompts or models have changed"
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetricsConfig(Section):
  """Where metrics go besides metrics.jsonl, which is always written."""

  tensorboard: bool = field(True, "write TensorBoard events")
  wandb: bool = field(
    False, "log to Weights & Biases; needs its package", also=("report_to",)
  )
  trackio: bool = field(
    False, "log to trackio; needs its package", also=("report_to",)
  )
  every_steps: int = field(
    1, "steps between lines", ">= 1", also=("logging_steps",)
  )
  project: str = field(
    "jaxalign", "project name for wandb and trackio", also=("wandb_project",)
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrecisionConfig(Section):
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
    also=("mixed_precision", "dtype", "torch_dtype", "bf16", "fp16"),
  )
  reference: str = field(
    "float32",
    "format of a reference policy that is a copy of the trained one; bfloat16 "
    "halves it",
    choices=("float32", "bfloat16"),
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig(Section):
  """Low-rank adapters (LoRA); with them only the adapters are trained."""

  rank: int = field(
    0,
    "inner width r; 0 = train all parameters",
    ">= 0",
    also=("lora_r", "r", "adapter", "use_peft", "use_lora"),
  )
  alpha: float = field(
    32.0,
    "the update is scaled by alpha / rank (SuperHF, later runs)",
    "> 0",
    also=("lora_alpha",),
  )
  dropout: float = field(
    0.05,
    "probability of dropping an adapter's input (SuperHF, later runs)",
    "[0, 1)",
    also=("lora_dropout",),
  )
  targets: tuple[str, ...] = field(
    (),
    "linear layers that get an adapter, e.g. query_key_value,embed_out; empty "
    "= queries and values, as peft does: query_key_value of GPT-NeoX, "
    "query_proj,value_proj of DeBERTa, q_proj,v_proj of others",
    also=("target_modules", "lora_target_modules"),
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitConfig(Section):
  """A new model with random weights, used where `policy` is `init`.

  The names are those of a Hugging Face config.json; 0 takes the architecture's
  own default. The vocabulary is the tokenizer's.
  """

  tokenizer: str = field("", "tokenizer: a folder or a hub id")
  model_type: str = field(
    "gpt_neox",
    "architecture",
    choices=(
      "gpt_neox",
      "llama",
      "mistral",
      "qwen2",
      "qwen3",
      "phi3",
      "gemma2",
      "gemma3_text",
      "gpt_neo",
      "deberta-v2",
    ),
    also=("architecture",),
  )
  hidden_size: int = field(256, "width", ">= 1", also=("d_model",))
  num_hidden_layers: int = field(4, "layers", ">= 1", also=("layers",))
  num_attention_heads: int = field(4, "query heads", ">= 1")
  num_key_value_heads: int = field(
    0,
    "key and value heads (LLaMA and its relatives); 0 = as many as query heads",
    ">= 0",
  )
  intermediate_size: int = field(
    0, "inner width of the feed-forward layer; 0 = 4 x hidden_size", ">= 0"
  )
  max_position_embeddings: int = field(512, "context in tokens", ">= 1")
  type_vocab_size: int = field(
    0, "segment types (DeBERTa); 2 = prompt and completion", ">= 0"
  )
  tie_word_embeddings: bool = field(False, "share input and output embeddings")

  def rules(self) -> Iterator[Rule]:
    """Heads divide the width and the query heads."""
    # Grouped-query attention: `groups` key heads serve `heads` query heads.
    heads, groups = self.num_attention_heads, self.num_key_value_heads
    yield Rule(
      self.hidden_size % heads == 0,
      f"hidden_size must be a multiple of num_attention_heads={heads}",
      f"take {-(-self.hidden_size // heads) * heads}",
    )
    yield Rule(
      groups == 0 or heads % groups == 0,
      f"num_key_value_heads must divide num_attention_heads={heads}",
      "take 0 for as many",
    )


def buckets_increase(length_buckets: tuple[int, ...]) -> Rule:
  """The rule for length buckets: a text takes the first that holds it."""
  lengths = list(length_buckets)
  return Rule(
    bool(lengths) and lengths == sorted(set(lengths)),
    "length_buckets must hold at least one length and grow",
    "write 64,128,256",
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig(Section):
  """What every training run has."""

  # What is trained, how and for how long.
  algorithm: str = field("superhf", "what to run", choices=("superhf",))
  seed: int = field(0, "of samples, data order and dropout", "[0, 4294967296)")
  steps: int = field(
    200,
    "length of the run",
    ">= 1",
    also=("max_steps", "num_steps", "total_steps", "total_episodes"),
  )
  policy: str = field(
    "lab",
    "model to train: a hub id, a folder, lab, or init (see config.init)",
    also=(
      "model",
      "model_name",
      "language_model_name",
      "model_name_or_path",
      "base_model",
      "sft_model_path",
    ),
  )
  prompt_format: str = field(
    "auto",
    "how conversations are written: chat (the tokenizer's template), "
    "human_assistant, raw (texts as they are), a template FILE.jinja; auto = "
    "chat where the tokenizer has a template, else human_assistant",
    also=("chat_template", "chat_template_path"),
  )
  init_from: str = field(
    "",
    "folder of another run, or of one of its checkpoints, whose weights take "
    "the place of policy; empty = policy",
    also=("resume_from", "load_from"),
  )
  init_optimizer: bool = field(
    False, "take the optimizer's state of init_from as well"
  )
  # Sections.
  optimizer: OptimizerConfig = OptimizerConfig()  # updates and their rate
  lora: AdapterConfig = field(AdapterConfig(), "adapters", also=("peft",))
  init: InitConfig = InitConfig()  # policy="init": a new model
  mesh: MeshConfig = MeshConfig()  # devices
  checkpoint: CheckpointConfig = CheckpointConfig()  # saves
  metrics: MetricsConfig = MetricsConfig()  # logs
  precision: PrecisionConfig = PrecisionConfig()  # number formats
  # Memory against time; an update stays the same but for rounding.
  remat: str = field(
    "auto",
    "what the backward pass computes again, for less memory: attention; all "
    "but products with parameters (dots); everything (full); the same with the "
    "blocks' inputs in the host's memory (offload); auto = the least with "
    "which an update fits, none on a CPU",
    choices=("auto", "none", "attention", "dots", "full", "offload"),
    also=("gradient_checkpointing",),
    values={True: "full", False: "none", "true": "full", "false": "none"},
  )
  attention: str = field(
    "auto",
    "how the tokens of a text attend to each other: dense, or a kernel that "
    "keeps no length x length weights: splash (TPU), cudnn or triton (GPU); "
    "auto = the fastest that can compute the model's masks",
    choices=("auto", "dense", "cudnn", "triton", "splash"),
    also=("attn_implementation", "use_flash_attention_2"),
  )
  micro_batch: int = field(
    0,
    "rows in one forward and backward pass; 0 = batch_size",
    ">= 0",
    also=(
      "gradient_accumulation_steps",
      "micro_batch_size",
      "per_device_train_batch_size",
    ),
  )
  # The rows of an update.
  batch_size: int = field(
    8,
    "rows in one optimizer update, over all devices",
    ">= 1",
    also=("train_batch_size",),
  )
  max_length: int = field(
    1024,
    "longest training text in tokens; the rest is cut off (SuperHF code)",
    ">= 2",
    also=(
      "max_length_rm",
      "max_seq_length",
      "seq_length",
      "sequence_len",
      "cutoff_len",
      "model_max_length",
    ),
  )
  length_buckets: tuple[int, ...] = field(
    (32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048),
    "lengths in tokens of an update's rows that get a compiled program each; "
    "packed rows have max_length alone",
    ">= 1",
  )
  max_bad_share: float = field(
    0.01, "tolerated share of unusable rows", "[0, 1]"
  )
  profile_steps: str = field(
    "", "steps A to B-1 to trace with jax.profiler, as A:B; empty = none"
  )
  compilation_cache: bool = field(True, "keep compiled programs on disk")

  @property
  def remat_policy(self) -> str:
    """What models are opened with; `setup.auto` replaces it afterwards."""
    return "none" if self.remat == "auto" else self.remat

  @property
  def micro_rows(self) -> int:
    """Rows in one forward and backward pass."""
    return min(self.micro_batch or self.batch_size, self.batch_size)

  @property
  def micro_batches(self) -> int:
    """M, the passes of an update."""
    return self.batch_size // self.micro_rows

  @property
  def held_out_metric(self) -> str:
    """The metric that `checkpoint.keep_best=held_out` means; empty = none."""
    return ""

  @property
  def best_metric(self) -> str:
    """The metric whose highest value keeps its checkpoint; empty = none."""
    name = self.checkpoint.keep_best
    return self.held_out_metric if name == "held_out" else name

  @property
  def learning_rate_ratios(self) -> dict[str, float]:
    """Learning rates of parts of the parameters, as shares of the policy's."""
    return {}

  @property
  def derived(self) -> tuple[str, ...]:
    """Fields that are left open here and follow from the data."""
    return () if self.steps else ("steps",)

  def rules(self) -> Iterator[Rule]:
    """What holds for every training run."""
    yield Rule(
      bool(self.policy), "policy must name a model", "give a hub id or a folder"
    )
    yield Rule(
      self.batch_size % self.micro_rows == 0,
      f"micro_batch must be 0 or divide batch_size={self.batch_size}",
      "gradients are added up over equal parts",
    )
    yield buckets_increase(self.length_buckets)
    yield Rule(
      self.checkpoint.keep_best != "held_out" or bool(self.held_out_metric),
      "checkpoint.keep_best must name a metric where no held-out reward is "
      "measured",
      "set test_reward_model and validation_interval of a method that samples, "
      "or name a metric of metrics.jsonl",
    )
    # The profiler reads these steps as they are.
    span = re.fullmatch(r"(\d+):(\d+)", self.profile_steps)
    first, end = (int(span[1]), int(span[2])) if span else (0, 0)
    yield Rule(
      not self.profile_steps or first < end,
      "profile_steps must be empty or A:B with A < B",
      "write 10:13 for steps 10, 11 and 12",
    )
    yield Rule(
      not self.steps or first < self.steps,
      f"profile_steps must begin before the run's end at steps={self.steps}",
      "steps are counted from 0",
    )
    # A new model has no tokenizer, and no weights that adapters could refine.
    is_new = self.policy == "init"
    yield Rule(
      not is_new or bool(self.init.tokenizer),
      "init.tokenizer must be a folder or a hub id while policy='init'",
      "a new model needs a vocabulary",
    )
    yield Rule(
      not is_new or self.lora.rank == 0,
      "lora.rank must be 0 while policy='init'",
      "adapters on random weights would leave those as they are",
    )
    yield Rule(
      not self.init_optimizer or bool(self.init_from),
      "init_optimizer must be false while init_from is empty",
      "name the run whose state it is with init_from",
    )
    yield Rule(
      not self.init_optimizer or self.lora.rank == 0,
      f"init_optimizer must be false while lora.rank={self.lora.rank}",
      "new adapters begin on the weights of init_from, adapters included",
    )
    # Small updates would be lost in bfloat16's eight significant bits.
    yield Rule(
      self.precision.params == "float32" or self.lora.rank > 0,
      "precision.params must be 'float32' while lora.rank=0 trains every "
      "parameter",
      "use lora.rank, or precision.compute='bfloat16'",
    )
