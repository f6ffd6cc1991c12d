"""PPO, RLOO, GRPO: from the config to a finished run."""

import dataclasses
import difflib
import functools
import pathlib

import jax
import jax.numpy as jnp

from jaxalign.algorithms.ppo.config import PPOConfig
from jaxalign.algorithms.ppo.data import blank_batch
from jaxalign.algorithms.ppo.experience import first_extra_state
from jaxalign.algorithms.ppo.train import make_learn, train
from jaxalign.core.types import Params
from jaxalign.data.batches import bucket_length
from jaxalign.errors import UserError
from jaxalign.models import heads, lora
from jaxalign.models.model import Model
from jaxalign.parallel import mesh as meshes
from jaxalign.parallel.mesh import Devices
from jaxalign.parallel.program import Program
from jaxalign.setup.models import (
  ModelSpec,
  compute_dtype,
  open_policy,
  open_reward_model,
  with_attention,
)
from jaxalign.setup.programs import rollout_programs
from jaxalign.setup.rollout import describe_rollout
from jaxalign.setup.run import describe_run, finish, open_run
from jaxalign.setup.spec import RunSpec, open_mesh

# Read by two tokenizers, to tell whether they are the same.
PROBE = (
  "\n\nHuman: Is 7 a prime number?\n\nAssistant: Yes, it is; so are 2 and 5."
)


def describe(config: PPOConfig, devices: Devices = None) -> RunSpec[PPOConfig]:
  """Opens and checks what the config names; reads no parameter.

  Args:
    config: of the run.
    devices: see `make_mesh`.
  """
  policy = open_policy(config, open_mesh(config, devices))
  rollout = describe_rollout(config, policy)
  # A value model that is named is opened here, like the other models.
  value_model = None
  own = ("shared", "separate")
  if config.advantage == "gae" and config.value_model not in own:
    value_model = open_value_model(config, policy)
  # A row is a prompt and its drawn tokens, which are not cut again.
  length = rollout.prompt_length + config.sampling.max_new_tokens
  return RunSpec(
    config,
    policy,
    batch_shape=(rollout.rows // config.micro_rows, config.micro_rows, length),
    live_reference=True,
    rollout=rollout,
    rows=rollout.digest_rows,
    files=rollout.files,
    value_model=value_model,
  )


def open_value_model(config: PPOConfig, policy: ModelSpec) -> ModelSpec:
  """The causal reward model that `config.value_model` names.

  Raises:
    UserError: it cannot be loaded, has no score head, is no causal model or
      has other tokens than the policy.
  """
  name = config.value_model
  meant = difflib.get_close_matches(name, ("shared", "separate"), 1, 0.8)
  if meant and not pathlib.Path(name).exists():
    raise UserError(
      f"config.value_model: {name} is no folder; did you mean {meant[0]}?"
    )
  # All of it is trained.
  spec = open_reward_model(name, policy.mesh, "float32", "config.value_model")
  if not hasattr(spec.model.config, "tied"):  # encoders have no output matrix
    raise UserError(
      f"config.value_model: {name} does not read from left to right, so it has "
      "no value for half a completion; give a causal reward model, shared or "
      "separate"
    )
  if spec.tokenizer.encode(PROBE) != policy.tokenizer.encode(PROBE):
    raise UserError(
      f"config.value_model: {name} has other tokens than the policy; give a "
      "reward model trained from the policy, or separate for a copy of it"
    )
  # It is trained next to the policy, so it computes like the policy.
  dtype = compute_dtype(config.precision.compute, policy.mesh)
  model = spec.model.replace(dtype=dtype, remat=config.remat_policy)
  model = with_attention(model, policy.mesh, config.attention)
  return dataclasses.replace(
    spec, model=model, stored=spec.stored or spec.model
  )


def value_model_of(spec: RunSpec[PPOConfig]) -> Model | None:
  """The value model; None for a head on the policy's states, or no values."""
  if spec.value_model is not None:
    return spec.value_model.model
  if spec.config.advantage != "gae" or spec.config.value_model == "shared":
    return None
  # A copy of the policy before its adapters, trained in full.
  return spec.policy.model.without_lora().replace(head="score_last")


def new_values(spec: RunSpec[PPOConfig], policy: Params) -> Params:
  """Parameters of values that all start at 0; a copy shares no array.

  Args:
    spec: without a value model that is named.
    policy: the policy's parameters.
  """
  model = value_model_of(spec)
  kernel = jnp.zeros((spec.policy.model.config.hidden_size, 1))
  if model is None:
    return {"value_head": {"kernel": kernel, "bias": jnp.zeros(1)}}
  base = lora.strip(policy)
  trunk = {name: base[name] for name in model.shapes if name != "score_head"}
  # A copy, as the first update consumes the policy's own arrays, and in float32
  # whatever the base is stored in: all of it is trained.
  trunk = jax.tree.map(lambda x: jnp.array(x, jnp.float32), trunk)
  return trunk | {"score_head": {"kernel": kernel}}


def programs(spec: RunSpec[PPOConfig]) -> list[Program]:
  """The device programs of a run; see `setup.programs`."""
  params = spec.policy.shapes()
  if spec.config.advantage == "gae":
    if spec.value_model is not None:
      values = spec.value_model.shapes()
    else:
      shapes = jax.eval_shape(functools.partial(new_values, spec), params)
      values = meshes.with_shardings(shapes, spec.mesh)
    params |= {heads.VALUE: values}
  extra_state = first_extra_state(spec.config.kl.coefficient)
  run = describe_run(spec, params, extra_state)
  learn = run.jit(make_learn(run, value_model_of(spec)))
  passes, rows, length = spec.batch_shape
  width = bucket_length(length, spec.config.length_buckets)
  return [
    *rollout_programs(spec, run),
    learn.program(blank_batch((passes, rows, width)), name="learn"),
  ]


def run(spec: RunSpec[PPOConfig], folder: pathlib.Path) -> int:
  """Trains; returns the exit status."""
  assert spec.rollout is not None
  policy = spec.policy.load()
  # Whole tokens: a text that is rewarded is trained token for token.
  source = spec.rollout.load(spec.policy.tokenizer, whole_tokens=True)
  # One tree of parameters, so that one optimizer updates both.
  if spec.config.advantage == "gae":
    if spec.value_model is not None:
      values = spec.value_model.read()
    else:
      values = meshes.put(new_values(spec, policy.params), spec.mesh)
    both = policy.params | {heads.VALUE: values}
    policy = dataclasses.replace(policy, params=both)
  extra_state = first_extra_state(spec.config.kl.coefficient)
  with open_run(spec, policy, folder, extra_state) as run:
    run.evaluators += spec.rollout.evaluators(source)
    state = train(run, source, value_model_of(spec))
  return finish(run, state, policy, folder)
