"""From a described run to a running one, and from its end to a folder."""

import contextlib
import dataclasses
import operator
import pathlib
import shlex
import time
from collections.abc import Iterator
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jaxalign import paths
from jaxalign.config import to_mapping
from jaxalign.config.sections import TrainingConfig
from jaxalign.core import memory
from jaxalign.core.types import JsonObject, Params, TrainState
from jaxalign.models import lora
from jaxalign.models.heads import policy_of
from jaxalign.models.hf import card, write
from jaxalign.models.model import Model
from jaxalign.parallel import hosts
from jaxalign.parallel import mesh as meshes
from jaxalign.report import page
from jaxalign.runtime import (
  checkpoint,
  console,
  environment,
  metrics,
  profile,
  signals,
  workdir,
)
from jaxalign.setup import start
from jaxalign.setup.folder import check_unchanged, open_workdir
from jaxalign.setup.models import Loaded
from jaxalign.setup.optimizer import initializer, optimizer_of, schedule_of
from jaxalign.setup.spec import (
  RunSpec,
  adapter_line,
  digest_of_run,
  digests_of_models,
  policy_attention,
)
from jaxalign.training.recorder import Recorder
from jaxalign.training.run import Run

C = TypeVar("C", bound=TrainingConfig)


def reference_of(model: Model, params: Params) -> tuple[Model, Params]:
  """The policy as it is now, without adapters; its leaves are shared."""
  if model.lora:
    return model.without_lora(), lora.split(params)[1]
  return model, policy_of(params)


def rounded(params: Params, dtype: str) -> Params:
  """The parameters with their matrices in another format; norms stay exact.

  Args:
    params: arrays, or shapes with their shardings.
    dtype: "float32" leaves them as they are, whatever they are.
  """
  if dtype == "float32":
    return params

  def convert(path, leaf):
    if path[-1].key not in ("kernel", "embedding"):
      return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
      return leaf.update(dtype=jnp.dtype(dtype))
    return leaf.astype(dtype)

  return jax.tree_util.tree_map_with_path(convert, params)


def describe_run(
  spec: RunSpec[C],
  params: Params,
  extra_state: PyTree = None,  # a method's own
) -> Run[C]:
  """The run before it is opened: its state is shapes, and it has no recorder.

  Its programs can be traced and compiled, for devices that are not there too.

  Args:
    spec: of the run.
    params: those of the policy and, under `value`, of a value model; arrays, or
      shapes with their shardings.
    extra_state: what the method keeps in its state, before the first step.

  Returns:
    The run; base parameters under adapters and the reference are those of
    `params`.
  """
  config, model, mesh = spec.config, spec.policy.model, spec.mesh
  trained, frozen = lora.split(params) if model.lora else (params, {})
  optimizer = optimizer_of(config)
  init = initializer(config, optimizer, extra_state)
  state = meshes.with_shardings(jax.eval_shape(init, trained), mesh)
  if config.optimizer.offload:
    waiting = memory.to_host(state.opt_state)
    state = dataclasses.replace(state, opt_state=waiting)
  reference = None
  if spec.live_reference:
    reference, parts = reference_of(model, params)
    # Under adapters it is the base itself, and no copy.
    dtype = "float32" if model.lora else config.precision.reference
    reference = reference, rounded(parts, dtype)
  return Run(
    config,
    model,
    state,
    frozen,
    reference,
    mesh,
    object.__new__(Recorder),  # blank: nothing is recorded
    optimizer,
    schedule_of(config),
    jax.tree.map(operator.attrgetter("sharding"), state),
  )


@contextlib.contextmanager
def open_run(
  spec: RunSpec[C],
  policy: Loaded,
  folder: pathlib.Path,
  extra_state: PyTree = None,  # a method's own
) -> Iterator[Run[C]]:
  """Opens the run's folder, restores or begins its state, opens its logs.

  Args:
    spec: of the run.
    policy: its parameters, and those of a value model under `value`; the
      first update consumes them.
    folder: a run that is there already continues.
    extra_state: what the method keeps in its state, before the first step.

  Yields:
    The run that its method is handed.

  Raises:
    UserError: the folder is of another config, or of other rows.
  """
  config, digest = spec.config, digest_of_run(spec)
  digests = digests_of_models(spec)
  with (
    contextlib.closing(open_workdir(config, folder)) as run,
    contextlib.closing(
      checkpoint.Checkpointer(
        run.checkpoints,
        every_steps=config.checkpoint.every_steps,
        every_minutes=config.checkpoint.every_minutes,
        keep=config.checkpoint.keep,
        keep_best=bool(config.checkpoint.keep_best),
        sha256=config.checkpoint.sha256,
      )
    ) as saver,
  ):
    environment.write(run.path)

    # The reference is the policy before training: the base under adapters,
    # which never changes, or a copy.
    opened = describe_run(spec, policy.params, extra_state)
    if opened.reference and not policy.model.lora:
      model, params = opened.reference
      opened.reference = model, jax.tree.map(lambda x: x.copy(), params)
    trained = policy.params
    if policy.model.lora:
      trained, _ = lora.split(policy.params)

    # Where the run stands: restored, or new. A stored state is read straight
    # onto its shardings.
    shapes = opened.state
    restored = saver.restore_latest(shapes)
    if restored is None:
      # The given parameters become the state's: no second copy of them.
      init = initializer(config, opened.optimizer, extra_state)
      begin = jax.jit(init, donate_argnums=0, out_shardings=opened.shardings)
      opened.state, done, files, counters = begin(trained), 0, None, {}
      if config.init_optimizer:
        known = start.read_optimizer(run.path, shapes.opt_state)
        opened.state = dataclasses.replace(opened.state, opt_state=known)
    else:
      for leaf in jax.tree.leaves(trained):
        leaf.delete()  # nor here
      opened.state, done = restored.state, restored.step
      files, counters = restored.extra["files"], restored.extra["counters"]
      check_unchanged(spec, digest, digests, restored.extra, run.path)
    if hosts.is_lead():
      begins = f"{config.steps} step{'s' * (config.steps != 1)}"
      if done:
        begins = f"goes on after step {done} of {config.steps}"
      print(f"{paths.location(run.path)}: {begins}", flush=True)
      if policy.model.lora:
        print(adapter_line(policy.model))
      choice = policy_attention(spec)
      # On a CPU there is no choice.
      if choice.reason or choice.kind != "dense":
        print(f"attention: {choice}")

    # Logs, signals, profiler and screen, closed in the reverse order.
    with (
      contextlib.closing(
        metrics.MetricsLog(
          run.path,
          offsets=files,
          step=done,
          tensorboard=config.metrics.tensorboard,
          trackers={
            name: config.metrics.project
            for name in metrics.TRACKERS
            if getattr(config.metrics, name)
          },
          config=to_mapping(config),
        )
      ) as log,
      signals.catch_signals() as stop,
      contextlib.closing(
        profile.Profiler(run.profile, config.profile_steps)
      ) as profiler,
      console.Console(
        config.steps,
        f"{config.algorithm} {paths.location(run.path)}",
        done=done,
        stop=stop,
      ) as screen,
    ):
      # What the method is handed.
      opened.recorder = Recorder(
        log=log,
        console=screen,
        saver=saver,
        stop=stop,
        profiler=profiler,
        done=done,
        total=config.steps,
        counters=dict(counters),
        every=config.metrics.every_steps,
        best_metric=config.best_metric,
        digest=digest,
        models=digests,
        # Only the lead's copy of the log was cut back.
        past=(
          row
          for row in metrics.iterate_jsonl(run.path / metrics.METRICS)
          if row["step"] <= done
        ),
      )
      yield opened
      # They hold the run, whose reference would stay in memory with them.
      opened.evaluators.clear()
      saver.wait()


def finish(
  run: Run[C], state: TrainState, policy: Loaded, folder: pathlib.Path
) -> int:
  """Writes `model/` and `report.html`, and marks the run as finished.

  A run that was asked to stop gets its report alone. Both say what they left
  and what can be done with it.

  Returns:
    The exit status: 0, or 130 and 143 after SIGINT and SIGTERM, which end a
    run before it is finished.
  """
  stop, steps = run.recorder.stop, run.config.steps
  place = paths.location(folder)  # what people are told
  if stop.agree():
    if hosts.is_lead():
      saved = run.recorder.saved
      print(
        f"stopped after step {saved} of {steps}, which is saved in "
        f"{place / 'checkpoints'}"
        if saved
        else "stopped before the first step was done; nothing is saved"
      )
      page.write_report(folder)
      print(f"report: {place / 'report.html'}")
      print("the same command goes on from there", flush=True)
    return stop.exit_status
  # From the log, because a resumed run has seen only its own part.
  last: JsonObject = {}  # the last value of every metric
  for row in metrics.iterate_jsonl(folder / metrics.METRICS):
    last |= row
  tokenizer, settings = policy.tokenizer, to_mapping(run.config)
  assert tokenizer is not None

  def also(place: pathlib.Path) -> None:
    tokenizer.save(place)
    card.write(place, config=settings, metrics=last)

  # All processes take part, because parameters may be spread over them.
  write.save(
    run.model,
    lora.join(state.eval_params, run.frozen),
    folder / "model",
    config=tokenizer.special_ids(),
    also=also,
  )
  if hosts.is_lead():
    page.write_report(folder)
  # The mark comes last: without it the same command writes all this again.
  workdir.mark_finished(
    folder,
    {
      "steps": steps,
      "metrics": last,
      "finished_at": time.strftime("%Y-%m-%d %H:%M:%S"),
    },
  )
  # The others wait for the lead, however long it writes.
  hosts.broadcast(True)
  if hosts.is_lead():
    print(f"model: {place / 'model'}\nreport: {place / 'report.html'}")
    print(f"next: {next_command(run.model, place)}", flush=True)
  return 0


def next_command(model: Model, folder: paths.Folder) -> str:
  """What to type after a finished run: a talk with what it trained."""
  # On an object store a model's folder is known, a run's is not.
  is_here = isinstance(folder, pathlib.Path)
  name = shlex.quote(str(folder if is_here else folder / "model"))
  if model.config.head == "lm":
    return f"python -m jaxalign.chat {name}"
  return f"python -m jaxalign.chat lab --best_of=16 --reward_model={name}"
