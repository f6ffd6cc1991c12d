"""The training methods, one folder each; `METHODS` is the only table of them.

A method's folder holds `config.py` (its dataclass, as `CONFIG`; imports no
jax), `data.py` (its batches), `train.py` (the algorithm) and `setup.py`
(`describe`, which opens and checks all that the config names and raises a
`UserError` where the run cannot start, `programs`, what such a run compiles,
and `run`; the functions below call them).
"""

import glob
import importlib
import logging
import os
import pathlib
import types
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jaxalign import cli, paths
from jaxalign.config import (
  TrainingConfig,
  nearest,
  parse_models,
  read,
  to_mapping,
)
from jaxalign.config.changes import HELD_OUT
from jaxalign.config.supervised import SupervisedConfig
from jaxalign.data import converters, sources
from jaxalign.errors import UserError
from jaxalign.parallel.cluster import Cluster

# jax takes seconds to start; a mistake in a config should not.
if TYPE_CHECKING:
  from jaxalign.parallel.mesh import Devices
  from jaxalign.parallel.program import Program
  from jaxalign.setup.spec import RunSpec

# Module paths, not modules: only the method that runs is imported.
METHODS = {
  "superhf": "jaxalign.algorithms.superhf",
  "ppo": "jaxalign.algorithms.ppo",
  "online_dpo": "jaxalign.algorithms.dpo.online",
  "sft": "jaxalign.algorithms.sft",
  "reward_model": "jaxalign.algorithms.reward_model",
  "dpo": "jaxalign.algorithms.dpo",
  "kto": "jaxalign.algorithms.kto",
}
_log = logging.getLogger(__name__)


def config_class(method: str) -> type[TrainingConfig]:
  """The config dataclass of a method in `METHODS`."""
  return importlib.import_module(f"{METHODS[method]}.config").CONFIG


def setup_of(config: TrainingConfig) -> types.ModuleType:
  """The method's `setup`: jaxalign/algorithms/superhf/setup.py for superhf."""
  return importlib.import_module(f"{METHODS[config.algorithm]}.setup")


# A user wrote `mapping`: what it is, is checked here.
def read_config(
  mapping: Any, flags: Sequence[tuple[str, object]] = ()
) -> TrainingConfig:
  """The validated config of a run.

  Args:
    mapping: a dict or ConfigDict; `algorithm` chooses the method, a field
      that is left out has its default.
    flags: (path below `config`, text) pairs of the command line, or values
      in place of texts. They win over the mapping, later ones over earlier
      ones.

  Raises:
    UserError: one line with the full path, the rule, the value, the remedy.
  """
  if not hasattr(mapping, "items"):
    raise UserError(
      f"config must be a mapping, got {type(mapping).__name__}; a dict of "
      "fields, or an ml_collections.ConfigDict from a file's get_config()"
    )
  file = dict(mapping.items())
  # The method chooses the dataclass that checks all other fields.
  name = dict(flags).get("algorithm", file.get("algorithm"))
  if name is None:
    raise UserError(
      f"config.algorithm is missing; it is one of {', '.join(METHODS)}"
    )
  if not isinstance(name, str) or name not in METHODS:
    near = nearest(str(name), METHODS)
    raise UserError(
      f"config.algorithm must be one of {', '.join(METHODS)}, got {name!r}; "
      f"did you mean {near[0] if near else 'superhf'!r}?"
    )
  kind = config_class(name)
  if {"policy", "init_from"} <= set(dict(flags)):
    raise UserError(
      "config.init_from takes the place of config.policy, and both are given; "
      "leave one of them out"
    )
  # Where steps are set, epochs count for nothing: of the two the one that was
  # typed wins over a config file's.
  typed = [path for path, _ in flags]
  by_epochs = issubclass(kind, SupervisedConfig) and "epochs" in typed
  if by_epochs and "steps" not in typed:
    flags = [*flags, ("steps", "0")]
  config = read(kind, mapping, [*flags, *left_out(file, flags)])
  # Adapters that somebody asks for must not be left out without a word.
  unused = [path for path in typed if path.startswith("lora.")]
  if config.lora.rank == 0 and unused and "lora.rank" not in typed:
    raise UserError(
      f"config.{unused[0]} means nothing while config.lora.rank=0 trains every "
      "parameter; set config.lora.rank, say 16, or leave it out"
    )
  return config


def left_out(
  file: dict[str, object], flags: Sequence[tuple[str, object]]
) -> list[tuple[str, object]]:
  """What a config file sets beside a reward or data that the flags replace.

  A held-out reward or held-out rows of other data would say nothing of the
  user's own. They stay where the flags name a part of what was there, or them.

  Returns:
    Flags that turn them off; a line of the log says so.
  """
  typed, found = dict(flags), []
  for name, held_out in HELD_OUT.items():
    before, value = file.get(name), typed.get(name)
    if held_out in typed or not file.get(held_out):
      continue
    if not (isinstance(before, str) and isinstance(value, str)):
      continue
    if {name for name, _ in parse_models(before)} & {
      name for name, _ in parse_models(value)
    }:
      continue
    _log.warning(
      "config.%s=%s is not measured, because config.%s is another one now; "
      "name yours with --config.%s",
      held_out,
      file[held_out],
      name,
      held_out,
    )
    found.append((held_out, ""))
    if "validation_interval" not in typed:
      found.append(("validation_interval", "0"))
  return found


def preset_of(mapping: object, config: TrainingConfig) -> TrainingConfig:
  """The config of a preset alone, which may lack what the flags have added."""
  try:
    return read_config(mapping, [("algorithm", config.algorithm)])
  except UserError:
    return type(config)()


def check_sources(config: TrainingConfig) -> None:
  """Refuses local files of data that do not exist, before jax is imported.

  What a file holds is checked when it is read.

  Raises:
    UserError: the field, the path and the nearest name.
  """
  for field in ("prompts", "data", "validation_data"):
    source = getattr(config, field, "")
    # A path that exists is one source, commas and all.
    for name in sources.part_names(source) if source else ():
      # A converter and a subset may follow the path.
      head = name
      if not os.path.exists(os.path.expanduser(name)):
        head, _ = converters.split_name(name)
      paths = [head, head.rpartition(":")[0]]
      paths = [os.path.expanduser(path) for path in paths if path]
      found = any(os.path.exists(p) or glob.glob(p) for p in paths)
      if found or head == "lab" or not sources.is_local(head):
        continue
      place = pathlib.Path(paths[0])
      near = nearest(place.name, (p.name for p in place.parent.glob("*")))
      hint = "check the path"
      if near:
        hint = f"did you mean {place.parent / near[0]}?"
      raise UserError(f"config.{field}: {name}: no such file; {hint}")


def check_flags(
  config: TrainingConfig, folder: pathlib.Path, *, extend: bool, fresh: bool
) -> None:
  """Refuses flags that exclude each other, or what the folder cannot do."""
  if extend and fresh:
    raise UserError(
      "--extend goes on with a run, --fresh begins again; give one of them"
    )
  if paths.is_remote(folder) and (fresh or config.init_from):
    raise UserError(
      f"--workdir={folder}: --fresh and --init_from need a folder of this "
      "machine; give a new --workdir, and a model's folder on the store as "
      "--config.policy"
    )


def describe(
  config: TrainingConfig, devices: "Devices" = None, memory: int | None = None
) -> "RunSpec[TrainingConfig]":
  """Opens and checks what a run needs; reads no parameter.

  What the config leaves to `auto` is chosen here, see `setup.auto`.

  Args:
    config: from `read_config`.
    devices: those of `jax.experimental.topologies` need not be there, and do
      for what is only compiled; None = all of this machine.
    memory: bytes of each, 0 = unknown; None = as they say themselves.

  Raises:
    UserError: what would keep the run from starting.
  """
  # Imported late, as jax is.
  from jaxalign.setup import auto

  method = setup_of(config)
  memory = auto.memory_of(devices) if memory is None else memory
  config = auto.with_mesh(config, devices, memory)
  spec = method.describe(config, devices)
  return auto.with_remat(spec, memory, method.programs)


def programs(spec: "RunSpec[TrainingConfig]") -> "list[Program]":
  """The device programs of a described run, for its largest rows.

  `dataclasses.replace(spec, batch_shape=...)` gives those of other rows.
  """
  return setup_of(spec.config).programs(spec)


def run(
  config: TrainingConfig,
  folder: pathlib.Path,
  *,
  extend: bool = False,
  fresh: bool = False,
  quiet: bool = False,
  cluster: Cluster | None = None,
) -> int:
  """Trains until the config's steps are done or someone asks to stop.

  The cheap checks come first, and the folder is made only once everything
  that the config names has been opened and checked.

  Args:
    config: from `read_config`.
    folder: the run's; a run that is there already continues.
    quiet: print no example of what is trained on.
    extend: gives the run that is there the length of the config.
    fresh: moves the run that is there aside, and begins again.
    cluster: this process among those of the run; None = as the machine says.

  Returns:
    The exit status: 0, or 130 and 143 after SIGINT and SIGTERM.
  """
  check_flags(config, folder, extend=extend, fresh=fresh)
  check_sources(config)
  # Imported late: jax takes seconds to start, a mistake in a config should not.
  import jax

  from jaxalign.parallel import cpu, hosts
  from jaxalign.runtime import cache, mirror
  from jaxalign.setup.folder import check_hosts

  if config.compilation_cache:
    cache.enable_compilation_cache()
  cpu.trim_after_compiling()
  cpu.make_room_for_collectives(alone=cluster is None)
  hosts.start(cluster)
  with hosts.together():
    chosen = jax.config.values["jax_platforms"]
    cli.check_backend(jax.default_backend(), chosen)
    cache.leave_cache_unless_shared()
    check_hosts(config, folder, extend=extend, fresh=fresh)
    with mirror.opened(folder) as local:
      return _run(config, local, extend=extend, fresh=fresh, quiet=quiet)


def _run(
  config: TrainingConfig,
  folder: pathlib.Path,
  *,
  extend: bool,
  fresh: bool,
  quiet: bool,
) -> int:
  """`run`, with all processes there."""
  from jaxalign.parallel import hosts
  from jaxalign.runtime import workdir
  from jaxalign.setup import start
  from jaxalign.setup.folder import check_folder, extend_run
  from jaxalign.setup.spec import digest_of_run

  method = setup_of(config)

  # The lead alone looks at the folder and at the other run, because it changes
  # them; the others go by what it finds.
  def look() -> tuple[bool, bool]:
    try:
      check_folder(config, folder, extend=extend, fresh=fresh)
    except workdir.OtherConfigError:
      # A wrong path is said first: it is one of the differing fields, and the
      # mistake.
      if config.init_from:
        start.find_source(config, folder)
      else:
        describe(config, memory=0)  # the lead alone is here: no exchange
      raise
    new = fresh or not start.is_copied(config, folder)
    return workdir.read_finished(folder) is not None, new

  is_finished, copies = hosts.from_lead(look, (False, False))
  place = paths.location(folder)  # what people are told
  finished = f"{place} holds a finished run; read {place / 'report.html'}"
  if is_finished and not (extend or fresh):
    print(finished)
    return 0

  # The other run is looked up before a folder is moved.
  source, aside = None, None
  if config.init_from and copies:
    source = start.find_source(config, folder)
  try:
    if fresh and hosts.is_lead():
      aside = workdir.move_aside(folder)
    if source is not None and hosts.is_lead():
      start.copy(config, folder, source, read_config(source.config))
    # The others wait for the lead, however long it copies.
    hosts.broadcast(True)
    if config.init_from:
      config = start.begin(config, folder)
    spec = describe(config)
    if hosts.count() > 1:
      hosts.check_same(
        {"config": to_mapping(spec.config), "data": digest_of_run(spec)},
        "give all hosts the same files: a folder that they share, or copies",
      )
  except BaseException:
    # A run that cannot start leaves everything as it was.
    if hosts.is_lead():
      if source is not None:
        start.remove(folder)
      if aside is not None:
        aside.rename(folder)
    raise
  if aside is not None:
    print(
      f"the earlier run of {folder} is now {aside}; go on with the new one "
      "without --fresh"
    )
  if config.init_from and hosts.is_lead():
    reference = ""
    if spec.live_reference or getattr(config, "reference", "") == "stored":
      reference = ", which are the reference as well"
    print(
      f"the policy begins with the weights of {config.init_from}{reference}"
    )
  # All processes go by what the lead finds, because it changes the folder.
  if extend and not hosts.from_lead(lambda: extend_run(spec, folder), False):
    print(f"{finished}; raise config.steps or config.epochs to extend it")
    return 0
  if hosts.is_lead() and not quiet:
    print(spec.example())
  for doubt in spec.doubts() if hosts.is_lead() else ():
    print(doubt)
  return method.run(spec, folder)


def with_its_model(
  config: TrainingConfig, folder: pathlib.Path | None = None
) -> TrainingConfig:
  """The config with the model of its `init_from`, read from there.

  Args:
    config: of a run that begins from another one.
    folder: of the run, if it has one.

  Raises:
    UserError: see `start.find_source`.
  """
  from jaxalign.setup import start  # late, as above

  source = start.find_source(config, folder)
  return start.with_its_model(config, source, read_config(source.config))


def dry_run(
  config: TrainingConfig,
  folder: pathlib.Path,
  *,
  extend: bool = False,
  fresh: bool = False,
  quiet: bool = False,
) -> int:
  """Opens and checks what a run would, and prints what that is.

  Reads no parameter and writes nothing, except that the hub's files are kept.

  Args:
    config: from `read_config`.
    folder: the run's.
    extend: as for `run`.
    fresh: as for `run`.
    quiet: as for `run`.

  Returns:
    The exit status, 0.

  Raises:
    UserError: what would keep the run from starting.
  """
  check_flags(config, folder, extend=extend, fresh=fresh)
  check_sources(config)
  # Imported late, as above.
  from jaxalign.runtime import mirror
  from jaxalign.setup import start
  from jaxalign.setup.folder import check_folder, summary

  with mirror.opened(folder) as local:
    check_folder(config, local, extend=extend, fresh=fresh)
    if config.init_from and not fresh and start.is_copied(config, local):
      config = start.begin(config, local)
    elif config.init_from:
      config = with_its_model(config, local)
    spec = describe(config)
    if not quiet:
      print(spec.example())
    for doubt in spec.doubts():
      print(doubt)
    print(summary(spec, local, extend=extend, fresh=fresh))
  return 0
