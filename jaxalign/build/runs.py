"""Runs a config: what `main` calls once it is valid."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

from jaxalign.algorithms import dpo, kto, ppo, reward_model, sft, superhf
from jaxalign.build import (
  export,
  judges,
  labelled,
  models,
  online,
  preferences,
  questions,
  references,
  scored,
  session,
  supervised,
)
from jaxalign.build import ppo as build_ppo
from jaxalign.build.superhf import encode_kept
from jaxalign.config import (
  DPOConfig,
  KTOConfig,
  OnlineConfig,
  OnlineDPOConfig,
  PPOConfig,
  PreferenceConfig,
  RewardModelConfig,
  SFTConfig,
  SuperHFConfig,
  TrainingConfig,
)
from jaxalign.core import rewards
from jaxalign.errors import UserError
from jaxalign.parallel import mesh as meshes
from jaxalign.runtime import answers, cache, workdir


def run(config: TrainingConfig, folder: pathlib.Path) -> int:
  """Trains until the config's steps are done or someone asks to stop.

  Returns:
    The exit status: 0, or 130 and 143 after SIGINT and SIGTERM.
  """
  # The cheap checks come first, and the folder is made only once everything
  # that the config names has been opened.
  session.check_folder(config, folder)
  if workdir.read_finished(folder) is not None:
    print(f"{folder} holds a finished run; read {folder / 'report.html'}")
    return 0
  if config.compilation_cache:
    cache.enable_compilation_cache()
  return RUNS[config.algorithm](config, folder)


def run_sft(config: SFTConfig, folder: pathlib.Path) -> int:
  """Supervised fine-tuning."""
  mesh = _mesh(config)
  _check_rows(config, mesh)
  policy = models.open_policy(config, mesh, "lm")
  context = policy.model.config.max_positions
  task, steps = supervised.sft_task(config, policy.tokenizer, context)
  return _train(sft.run, config, folder, policy.load(), mesh, task, steps)


def run_reward_model(config: RewardModelConfig, folder: pathlib.Path) -> int:
  """A reward model from comparisons or scores."""
  mesh = _mesh(config)
  _check_rows(config, mesh)
  policy = models.open_policy(config, mesh, config.head)
  if policy.model.config.head == "lm":
    raise UserError(
      f"config.policy: {config.policy} is a language model without a score "
      "head; give it one with config.head, e.g. score_last"
    )
  if config.dropout:
    policy = models.with_dropout(policy, config.dropout)
  found = policy.model.config
  task, config = scored.reward_task(
    config, policy.tokenizer, found.max_positions, found.head, found.groups
  )
  policy = models.with_groups(policy, config.groups, config.seed)
  return _train(
    reward_model.run, config, folder, policy.load(), mesh, task, config.steps
  )


def run_dpo(config: DPOConfig, folder: pathlib.Path) -> int:
  """Direct preference optimisation."""
  mesh = _mesh(config)
  _check_rows(config, mesh)
  policy = models.open_policy(config, mesh, "lm")
  model = policy.model.config
  task, steps = preferences.pair_task(
    config, policy.tokenizer, model.max_positions, model.hidden_size
  )
  return _compare(dpo.run, config, folder, policy, mesh, task, steps)


def run_kto(config: KTOConfig, folder: pathlib.Path) -> int:
  """Kahneman-Tversky optimisation."""
  mesh = _mesh(config)
  _check_rows(config, mesh)
  policy = models.open_policy(config, mesh, "lm")
  context = policy.model.config.max_positions
  task, steps = labelled.labelled_task(config, policy.tokenizer, context)
  return _compare(kto.run, config, folder, policy, mesh, task, steps)


def run_superhf(config: SuperHFConfig, folder: pathlib.Path) -> int:
  """SuperHF."""
  mesh = _mesh(config)
  begun = _open_online(config, mesh)
  policy = begun.opened.load()
  encode = functools.partial(encode_kept, config, policy, mesh)
  return _train(
    superhf.run,
    config,
    folder,
    policy,
    mesh,
    begun.tools(policy, encode),
    config.steps,
    reference=config.reference != "none",
  )


def run_online_dpo(config: OnlineDPOConfig, folder: pathlib.Path) -> int:
  """DPO on the policy's own answers."""
  mesh = _mesh(config)
  _check_rows(config, mesh, "pairs")
  prefer = judges.make_judge(config, folder)
  begun = _open_online(config, mesh)
  policy = begun.opened.load()
  model = policy.model.config
  length = min(config.max_length, model.max_positions)
  encode = functools.partial(
    preferences.encode_pairs,
    *(config, policy.tokenizer, length, model.hidden_size, mesh),
  )
  tools = begun.tools(policy, encode)
  return _train(
    dpo.run_online,
    config,
    folder,
    policy,
    mesh,
    answers.extended(tools, dpo.OnlineTools, prefer=prefer),
    config.steps,
    reference=True,
  )


def run_ppo(config: PPOConfig, folder: pathlib.Path) -> int:
  """PPO, and its group-baseline relatives."""
  mesh = _mesh(config)
  _check_rows(config, mesh, "minibatch")
  begun = _open_online(config, mesh)
  value = build_ppo.open_critic(config, begun.opened, mesh)
  policy = begun.opened.load()
  critic = value(policy)
  encode = functools.partial(build_ppo.encode_rollout, config, policy, mesh)
  tools = begun.tools(policy, encode)
  sample = build_ppo.exact(tools.sample, policy.tokenizer.decode)
  return _train(
    ppo.run,
    config,
    folder,
    dataclasses.replace(policy, params=critic.beside(policy.params)),
    mesh,
    answers.extended(tools, ppo.PPOTools, sample=sample, critic=critic.model),
    config.steps,
    reference=True,
    carried=rewards.first_carried(config.kl.coefficient),
  )


@dataclasses.dataclass(frozen=True)
class _Online:
  """What an online run has opened before it reads a parameter."""

  opened: models.Opened  # the policy
  tools: Callable[[models.Loaded, Callable], answers.Tools]


def _open_online(config: OnlineConfig, mesh: Any) -> _Online:
  """Opens policy, reward models and prompts; `tools` takes the rest."""
  opened = models.open_policy(config, mesh, "lm")
  scorers = online.open_scorers(config, mesh)
  context = opened.model.config.max_positions
  asked = questions.load_questions(config, opened.tokenizer, context)
  tools = lambda policy, encode: online.make_tools(
    config, policy, mesh, asked, scorers, encode
  )
  return _Online(opened, tools)


def _check_rows(config: Any, mesh: Any, whole: str = "batch_size") -> None:
  """A pass has to be split evenly; `whole` names the rows of an update."""
  name = "micro_batch" if config.micro_batch else whole
  meshes.check_rows(mesh, getattr(config, name), f"config.{name}")


def _mesh(config: TrainingConfig):
  sizes = config.mesh
  return meshes.make_mesh(sizes.replica, sizes.fsdp, sizes.tensor)


def _compare(
  algorithm: Any,
  config: PreferenceConfig,
  folder: pathlib.Path,
  opened: models.Opened,
  mesh: Any,
  task: Any,
  steps: int,
) -> int:
  """`_train` against a reference, which is live or stored."""
  config = dataclasses.replace(config, steps=steps)
  live = config.reference == "auto"
  found = None if live else references.find(config, folder, task)
  loaded = opened.load()
  if not live:
    policy = session.Policy(loaded.model, loaded.params, loaded.tokenizer, mesh)
    task = references.with_stored(config, folder, policy, task, found)
  return _train(
    algorithm, config, folder, loaded, mesh, task, steps, reference=live
  )


def _train(
  algorithm: Any,
  config: Any,
  folder: pathlib.Path,
  loaded: models.Loaded,
  mesh: Any,
  task: Any,
  steps: int,
  reference: bool = False,
  carried: Any = None,
) -> int:
  config = dataclasses.replace(config, steps=steps)
  policy = session.Policy(loaded.model, loaded.params, loaded.tokenizer, mesh)
  opened = session.open_session(
    config, folder, policy, reference=reference, carried=carried
  )
  with opened as (ctx, stop):
    state = algorithm(
      ctx, task, session.make_optimizer(config), session.make_rate(config)
    )
  if stop.requested:
    return stop.exit_status
  export.finish(config, folder, ctx, state, loaded.tokenizer)
  return 0


RUNS: dict[str, Callable[[Any, pathlib.Path], int]] = {
  "sft": run_sft,
  "reward_model": run_reward_model,
  "dpo": run_dpo,
  "kto": run_kto,
  "superhf": run_superhf,
  "ppo": run_ppo,
  "online_dpo": run_online_dpo,
}
