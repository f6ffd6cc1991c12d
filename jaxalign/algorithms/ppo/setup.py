"""PPO, RLOO, GRPO: from the config to a finished run."""

import dataclasses
import pathlib

import jax
import numpy as np

from jaxalign.algorithms.ppo.config import PPOConfig
from jaxalign.algorithms.ppo.experience import first_extra_state
from jaxalign.algorithms.ppo.train import train
from jaxalign.core.types import Params
from jaxalign.errors import UserError
from jaxalign.models import heads, lora
from jaxalign.models.model import Model
from jaxalign.parallel import mesh as meshes
from jaxalign.setup.models import (
  Loaded,
  ModelSpec,
  compute_dtype,
  open_policy,
  open_reward_model,
)
from jaxalign.setup.rollout import describe_rollout
from jaxalign.setup.run import RunSpec, finish, open_mesh, open_run

# Read by two tokenizers, to tell whether they are the same.
PROBE = (
  "\n\nHuman: Is 7 a prime number?\n\nAssistant: Yes, it is; so are 2 and 5."
)


def describe(config: PPOConfig) -> RunSpec[PPOConfig]:
  """Opens and checks what the config names; reads no parameter."""
  policy = open_policy(config, open_mesh(config))
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
  spec = open_reward_model(
    name, policy.mesh, config.precision.params, "config.value_model"
  )
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
  dtype = compute_dtype(config.precision.compute)
  model = spec.model.replace(dtype=dtype, remat=config.remat)
  return dataclasses.replace(
    spec, model=model, stored=spec.stored or spec.model
  )


def load_value_model(
  spec: RunSpec[PPOConfig], policy: Loaded
) -> tuple[Model | None, Params]:
  """The value model, and its parameters.

  Returns:
    A model of its own, or None for a head on the policy's states; empty
    parameters where advantages need no values.
  """
  config, mesh = spec.config, spec.mesh
  if config.advantage != "gae":
    return None, {}
  if spec.value_model is not None:
    return spec.value_model.model, spec.value_model.read()
  # A new head starts at 0, and so do all values.
  width = policy.model.config.hidden_size
  kernel = np.zeros((width, 1), np.float32)
  if config.value_model == "shared":
    head = {"kernel": kernel, "bias": np.zeros(1, np.float32)}
    return None, meshes.put({"value_head": head}, mesh)
  # A copy of the policy before its adapters, trained in full.
  model = policy.model.without_lora().replace(head="score_last")
  base = lora.strip(policy.params)
  trunk = {name: base[name] for name in model.shapes if name != "score_head"}
  # The first update consumes the policy's own arrays.
  trunk = jax.tree.map(lambda x: x.copy(), trunk)
  return model, trunk | meshes.put({"score_head": {"kernel": kernel}}, mesh)


def run(spec: RunSpec[PPOConfig], folder: pathlib.Path) -> int:
  """Trains; returns the exit status."""
  assert spec.rollout is not None
  policy = spec.policy.load()
  value_model, values = load_value_model(spec, policy)
  # Whole tokens: a text that is rewarded is trained token for token.
  source = spec.rollout.load(policy, whole_tokens=True)
  # One tree of parameters, so that one optimizer updates both.
  if values:
    both = policy.params | {heads.VALUE: values}
    policy = dataclasses.replace(policy, params=both)
  extra_state = first_extra_state(spec.config.kl.coefficient)
  with open_run(spec, policy, folder, extra_state) as run:
    run.evaluators += spec.rollout.evaluators(source)
    state = train(run, source, value_model)
  return finish(run, state, policy, folder)
