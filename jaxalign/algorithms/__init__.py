"""The training methods, one folder each; `METHODS` is the only table of them.

A method's folder holds `config.py` (its dataclass, as `CONFIG`; imports no
jax), `data.py` (its batches), `train.py` (the algorithm) and `setup.py`
(`describe`, which opens and checks all that the config names and raises a
`UserError` where the run cannot start, and `run`; `run` below calls them).
"""

import importlib
import pathlib
from collections.abc import Sequence
from typing import Any

from jaxalign.config import TrainingConfig, nearest, read
from jaxalign.config.supervised import SupervisedConfig
from jaxalign.errors import UserError

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


def config_class(method: str) -> type[TrainingConfig]:
  """The config dataclass of a method in `METHODS`."""
  return importlib.import_module(f"{METHODS[method]}.config").CONFIG


# mapping is Any because a user wrote it: what it is, is checked here.
def read_config(
  mapping: Any, flags: Sequence[tuple[str, str]] = ()
) -> TrainingConfig:
  """The validated config of a run.

  Args:
    mapping: a dict or ConfigDict; `algorithm` chooses the method, a field
      that is left out has its default.
    flags: (path below `config`, text) pairs of the command line. They win
      over the mapping, later ones over earlier ones.

  Raises:
    UserError: one line with the full path, the rule, the value, the remedy.
  """
  if not hasattr(mapping, "items"):
    raise UserError(
      f"config must be a mapping, got {type(mapping).__name__}; "
      "let get_config() return an ml_collections.ConfigDict"
    )
  # The method chooses the dataclass that checks all other fields.
  name = dict(flags).get("algorithm", dict(mapping.items()).get("algorithm"))
  if not isinstance(name, str) or name not in METHODS:
    near = nearest(str(name), METHODS)
    raise UserError(
      f"config.algorithm must be one of {', '.join(METHODS)}, got {name!r}; "
      f"did you mean {near[0] if near else 'superhf'!r}?"
    )
  kind = config_class(name)
  # Where steps are set, epochs count for nothing: of the two the one that was
  # typed wins over a config file's.
  typed = [path for path, _ in flags]
  by_epochs = issubclass(kind, SupervisedConfig) and "epochs" in typed
  if by_epochs and "steps" not in typed:
    flags = [*flags, ("steps", "0")]
  return read(kind, mapping, flags)


def run(
  config: TrainingConfig, folder: pathlib.Path, *, quiet: bool = False
) -> int:
  """Trains until the config's steps are done or someone asks to stop.

  The cheap checks come first, and the folder is made only once everything
  that the config names has been opened and checked.

  Args:
    config: from `read_config`.
    folder: the run's; a run that is there already continues.
    quiet: print no example of what is trained on.

  Returns:
    The exit status: 0, or 130 and 143 after SIGINT and SIGTERM.
  """
  # Imported late: jax takes seconds to start, a mistake in a config should not.
  from jaxalign.parallel import hosts
  from jaxalign.runtime import cache, workdir
  from jaxalign.setup.example import example_of
  from jaxalign.setup.run import check_folder

  check_folder(config, folder)
  if workdir.read_finished(folder) is not None:
    print(f"{folder} holds a finished run; read {folder / 'report.html'}")
    return 0
  if config.compilation_cache:
    cache.enable_compilation_cache()
  # "Go to definition" ends here: for superhf this is `describe` and `run` in
  # jaxalign/algorithms/superhf/setup.py.
  method = importlib.import_module(f"{METHODS[config.algorithm]}.setup")
  spec = method.describe(config)
  if hosts.is_lead() and not quiet:
    print(example_of(spec.rows, spec.policy.tokenizer))
  return method.run(spec, folder)
