"""Flags, config files and users' Python functions, the same for all commands.

Fields of a config stay text here: `algorithms.read_config` knows their types.
"""

import argparse
import difflib
import functools
import glob
import importlib.metadata
import importlib.util
import inspect
import logging
import os
import pathlib
import re
import signal
import sys
import traceback
import types
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, Protocol, runtime_checkable

from jaxalign.errors import DISK_FULL, HostError, UserError

INTERRUPTED = 130  # 128 + SIGINT

CONFIGS = pathlib.Path("configs")  # where a missing --config is looked for
# What other trainers call our flags.
OTHER_NAMES = {
  "output_dir": "workdir",
  "logging_dir": "workdir",
  "run_name": "workdir",
}


class UnknownFlagError(UserError):
  """A flag that may be a field of the config.

  Attributes:
    name: without its dashes.
    config: the value of `--config`.
  """

  def __init__(self, name: str, config: str):
    """Says how fields are written, which are not known here."""
    super().__init__(
      f"unknown flag --{name}; fields of the config are written "
      f"--config.{name}, see --help"
    )
    self.name, self.config = name, config


class Parser(argparse.ArgumentParser):
  """Flags of one command; a mistake in them is a `UserError`.

  Each command has `-h`, `--help` and `--version`. Values follow a flag after
  an `=` or as the next word.
  """

  def __init__(self, command: str, doc: str | None, *, config: bool = False):
    """Makes the parser.

    Args:
      command: what follows `python -m`.
      doc: the docstring of the command's module, shown by `--help`.
      config: whether the command takes `--config` and `--config.FIELD`. Its
        `--help` is then a flag like others, because the fields that it lists
        depend on the config.
    """
    super().__init__(
      prog=f"python -m {command}",
      description=doc,
      formatter_class=argparse.RawDescriptionHelpFormatter,
      add_help=not config,
      # `--config.step` must not pass as an abbreviation of another flag.
      allow_abbrev=False,
    )
    self.reads_config = config
    if config:
      self.add_argument(
        "-h",
        "--help",
        action="store_true",
        help="shows this text, and with --config all fields of that config",
      )
      self.add_argument(
        "--config",
        default="",
        metavar="FILE.py[:PRESET]",
        help="a config file and one of its presets, such as "
        "configs/superhf.py:pythia-1b",
      )
      # Stands here for the help text only: `take_fields` reads these flags.
      self.add_argument(
        "--config.FIELD",
        default=argparse.SUPPRESS,
        metavar="VALUE",
        help="changes one field, such as "
        "--config.optimizer.learning_rate=3e-5; lists are written with commas: "
        "--config.lora.targets=q_proj,v_proj",
      )
    self.add_argument(
      "--version",
      action="version",
      version=f"jaxalign {version()}",
      help="shows the version",
    )

  def parse(self, argv: Sequence[str]) -> argparse.Namespace:
    """Reads a command line.

    Returns:
      The values by name. With `config=True`, `fields` holds the pairs (path
      below `config`, text) in their order.

    Raises:
      UserError: an unknown flag, an unexpected word, a missing or wrong value.
    """
    words, fields = list(argv), []
    if self.reads_config:
      words, fields = take_fields(words)
    # Intermixed: argparse would end a list of words at the first flag.
    args, rest = self.parse_known_intermixed_args(words)
    # A misspelt flag explains the words around it that found no place.
    flags = [word for word in rest if re.match(r"--\w", word)]
    if flags:
      name = flags[0].removeprefix("--").partition("=")[0]
      known = [flag.lstrip("-") for flag in self._option_string_actions]
      near = difflib.get_close_matches(name, known, 1)
      other = OTHER_NAMES.get(name.replace("-", "_"), "")
      if other in known:
        near = [other]
      hint = "see --help"
      if near:
        hint = f"did you mean --{near[0]}?"
      elif self.reads_config:
        raise UnknownFlagError(name, args.config)
      raise UserError(f"unknown flag --{name}; {hint}")
    if rest and self.reads_config and re.search(r"\.py(:|$)", rest[0]):
      raise UserError(
        f"unexpected argument {rest[0]!r}; did you mean --config {rest[0]}?"
      )
    if rest:
      raise UserError(
        f"unexpected argument {rest[0]!r}; flags are written --name=value, "
        "see --help"
      )
    args.fields = fields
    return args

  def error(self, message: str) -> NoReturn:
    """Raises what argparse found, in place of printing usage and exiting."""
    flag, _, what = message.removeprefix("argument ").partition(": ")
    if what == "expected one argument":
      raise UserError(f"{flag} lacks its value; write {flag}=VALUE")
    raise UserError(f"{message}; see --help")


def take_fields(
  words: Sequence[str],
) -> tuple[list[str], list[tuple[str, str]]]:
  """Takes the `--config.FIELD` flags out of a command line.

  Returns:
    The other words, and the pairs (path below `config`, text).

  Raises:
    UserError: a field without a value.
  """
  # Taken out first, because argparse would have to know every field.
  left, others, fields = list(words), [], []
  while left:
    word = left.pop(0)
    flag, equals, value = word.partition("=")
    if not flag.startswith("--config."):
      others.append(word)
      continue
    if not equals:
      if not left or left[0].startswith("--"):
        raise UserError(f"{flag} lacks its value; write {flag}=VALUE")
      value = left.pop(0)
    fields.append((flag.removeprefix("--config."), value))
  return others, fields


# As JAX itself looks for a GPU of NVIDIA; then AMD's GPUs, and TPUs.
GPU_FILES = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg")
OTHER_ACCELERATORS = ("/dev/kfd", "/dev/accel*", "/dev/vfio/[0-9]*")
# Of the extras plan-tpu and plan-gpu; and what brings CUDA itself.
COMPILERS = ("libtpu", "jax_plugins.xla_cuda13")
CUDA = ("jax_cuda13_plugin", "jax_cuda12_plugin")


def has_accelerator() -> bool:
  """Whether JAX may find another device than the CPU on this machine."""
  if os.environ.get("JAX_PLATFORMS") == "cpu":
    return False
  return _expects_gpu() or any(map(glob.glob, OTHER_ACCELERATORS))


def _expects_gpu() -> bool:
  """Whether there is a GPU of NVIDIA, and JAX was installed for it."""
  return any(map(os.path.exists, GPU_FILES)) and any(map(_installed, CUDA))


def check_backend(platform: str, chosen: str | None) -> None:
  """Refuses to train on the CPU where CUDA is installed for a GPU.

  JAX falls back to the CPU if the GPU cannot be used, and a run would be
  hundreds of times slower.

  Args:
    platform: that JAX has taken.
    chosen: `jax.config.jax_platforms`: what the user asked for, if anything.

  Raises:
    HostError: JAX for CUDA does not use the GPU of this machine. Another
      machine's GPU may serve.
  """
  hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1")
  if platform == "cpu" and not chosen and not hidden and _expects_gpu():
    raise HostError(
      "this machine has a GPU, but JAX does not use it; the lines above say "
      "why: a driver that is too old for CUDA 13, say, needs jaxalign[cuda12]. "
      "Set JAX_PLATFORMS=cpu to train on the CPU"
    )


@functools.cache  # once a process
def pass_over_compilers() -> None:
  """Has JAX use the CPU where the plan's compilers are all that it would find.

  JAX asks each of them for a device at every start, and they report at length
  that there is none. If there is an accelerator, CUDA or a variable that names
  either, nothing changes: those reports then say why JAX misses the device.
  """
  gpu = any(map(os.path.exists, GPU_FILES))
  settled = os.environ.get("JAX_PLATFORMS") or any(
    name.startswith("TPU_") for name in os.environ
  )
  if (
    not settled
    and not gpu
    and not any(map(glob.glob, OTHER_ACCELERATORS))
    and any(map(_installed, COMPILERS))
    and not any(map(_installed, CUDA))
  ):
    os.environ["JAX_PLATFORMS"] = "cpu"
  if not gpu or os.environ.get("JAX_PLATFORMS") == "cpu":
    logging.getLogger("jax_plugins.xla_cuda13").addFilter(
      lambda record: record.msg != "cuda_plugin_extension is not found."
    )


def _installed(module: str) -> bool:
  try:
    return importlib.util.find_spec(module) is not None
  except ModuleNotFoundError:  # of the package that it is in
    return False


@runtime_checkable
class Command(Protocol):
  """A command: words in, exit status out."""

  def __call__(self, argv: Sequence[str] | None = None) -> int:
    """Runs on the words after the command's name; None = the process's own."""
    ...


def command(run: Callable[[Sequence[str]], int | None]) -> Command:
  """Turns a function into a command: mistakes become a line and a status.

  Args:
    run: takes the words after the command's name; returns the exit status,
      where None is success.

  Returns:
    The function with an exit status for mistakes too, see `explain`. Without
    words it takes those that the process was started with, and Ctrl-C then
    ends the process there.
  """

  @functools.wraps(run)
  def main(argv: Sequence[str] | None = None) -> int:
    pass_over_compilers()
    try:
      return run(sys.argv[1:] if argv is None else argv) or 0
    except BaseException as error:
      status = explain(error)
      if status is None:
        raise
      if argv is None and isinstance(error, KeyboardInterrupt):
        # JAX compiles in a thread that an interrupt does not end. It would
        # crash when the interpreter's exit frees the devices.
        sys.stdout.flush()
        os._exit(status)
      return status

  return main


def explain(error: BaseException) -> int | None:
  """Prints what ended a command, if that is no fault of the program.

  A `UserError` is one line and status 2, as is a full disk, wherever it is met;
  a `HostError` is one line and status 1; Ctrl-C gives `INTERRUPTED`.

  Returns:
    The exit status, or None if the error is not for people.
  """
  if isinstance(error, KeyboardInterrupt):
    print(file=sys.stderr)  # the terminal shows ^C
    return INTERRUPTED
  if isinstance(error, BrokenPipeError):  # the output's reader ended, as `head`
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + signal.SIGPIPE
  message = str(error)
  if isinstance(error, OSError) and error.errno in DISK_FULL:
    message = (
      f"{error.filename or 'a file'}: the disk (or the quota) is full; free "
      "some space and start the same command again"
    )
  elif not isinstance(error, UserError | HostError):
    return None
  # One line, although the message may quote several.
  print("error:", " ".join(message.splitlines()), file=sys.stderr)
  return 1 if isinstance(error, HostError) else 2


def version() -> str:
  """The installed version of jaxalign."""
  try:
    return importlib.metadata.version("jaxalign")
  except importlib.metadata.PackageNotFoundError:
    return "(not installed)"


def load_config(flag: str) -> tuple[object, str]:
  """Calls `get_config` of `FILE.py[:PRESET]`.

  Returns:
    What it returned, and the default folder of the run.

  Raises:
    UserError: no such file, a mistake in it, or no such preset.
  """
  if not flag:
    files = ", ".join(map(str, config_files(CONFIGS)))
    hint = ", such as configs/superhf.py of jaxalign's sources"
    if files:
      hint = f", one of {files}; python -m jaxalign lists their presets"
    raise UserError(
      f"--config is missing; give --config FILE.py or FILE.py:PRESET{hint}"
    )
  # The file and its preset.
  match = re.fullmatch(r"(.+?\.py)(?::(.*))?", flag)
  if not match:
    file, colon, preset = flag.partition(":")
    if pathlib.Path(file).suffix in (".yaml", ".yml", ".json", ".toml"):
      raise UserError(
        f"--config must be FILE.py or FILE.py:PRESET, got {flag!r}; write a "
        ".py file whose get_config() returns a mapping of its fields, or give "
        "them as flags, --config.batch_size=8"
      )
    meant = nearest_config(pathlib.Path(f"{file}.py"))
    raise UserError(
      f"--config must be FILE.py or FILE.py:PRESET, got {flag!r}; did you mean "
      f"--config {meant or 'configs/superhf.py'}{colon}{preset}?"
    )
  path, preset = pathlib.Path(match[1]), match[2]
  # Running the file, then asking its function for the preset.
  get_config = load_config_file(path).get_config
  takes = list(inspect.signature(get_config).parameters.values())
  if preset is not None and not takes:
    raise UserError(
      f"{path} has no presets, got {preset!r}; leave :{preset} off"
    )
  try:
    mapping = get_config() if preset is None else get_config(preset)
  except UserError:  # such as an unknown preset: it says more already
    raise
  except Exception as error:
    raise _file_error(path, "--config", error) from error
  # The default preset is part of the run's name, so that naming it explicitly
  # goes on with the same run.
  if preset is None and takes and isinstance(takes[0].default, str):
    preset = takes[0].default
  name = path.stem if preset is None else f"{path.stem}-{preset}"
  return mapping, "runs/" + re.sub(r"[^\w.-]", "_", name)


def presets(path: pathlib.Path) -> dict[str, str]:
  """The presets of a config file, each with the line that describes it.

  Raises:
    UserError: as `load_config_file`.
  """
  found: dict[str, str] = {}
  for name, make in getattr(load_config_file(path), "PRESETS", {}).items():
    # A preset may be a function with some of its arguments given.
    doc = inspect.getdoc(getattr(make, "func", make)) or ""
    found[name] = doc.partition("\n")[0]
  return found


def nearest_config(path: pathlib.Path) -> str:
  """The config file that a wrong path may have meant, or ""."""
  files = [str(p) for p in (*path.parent.glob("*.py"), *config_files(CONFIGS))]
  near = difflib.get_close_matches(str(path), files, 1)
  return near[0] if near else ""


def config_files(folder: pathlib.Path) -> list[pathlib.Path]:
  """The Python files below a folder that define `get_config`, in order."""
  # Found by their text: importing a file would run it.
  return [
    path
    for path in sorted(folder.rglob("*.py"))
    if re.search(r"^def get_config\(", path.read_text(), re.MULTILINE)
  ]


def load_config_file(path: pathlib.Path) -> types.ModuleType:
  """A config file as a module: `get_config`, and `PRESETS` where it has any.

  Raises:
    UserError: no such file, a mistake in it, or no `get_config`.
  """
  module = _run_file(path, "--config")
  if not hasattr(module, "get_config"):
    raise UserError(
      f"{path} has no function get_config; it must return a ConfigDict"
    )
  return module


def load_function(
  name: str, field: str, contract: str = ""
) -> Callable[..., Any]:
  """The function that a user names as `FILE.py:FUNCTION`.

  Args:
    name: as the user wrote it.
    field: the field or flag it was written in, for messages.
    contract: what the function takes and returns, shown if it is missing.

  Raises:
    UserError: no such file or function, or a mistake in the file.
  """
  file, _, function = name.rpartition(":")
  if not file.endswith(".py"):
    raise UserError(f"{field} must be FILE.py:FUNCTION, got {name!r}")
  module = _run_file(pathlib.Path(file), field)
  if not callable(getattr(module, function, None)):
    hint = f"; {contract}" if contract else ""
    raise UserError(f"{field}: {file} has no function {function}{hint}")
  return getattr(module, function)


def _run_file(path: pathlib.Path, field: str) -> types.ModuleType:
  """Runs a user's Python file; a mistake in it is reported with its line."""
  if not path.is_file():
    near = nearest_config(path)
    hint = f"did you mean {near}?" if near else "check the path"
    raise UserError(f"{field}: {path} does not exist; {hint}")
  spec = importlib.util.spec_from_file_location(path.stem, path)
  assert spec is not None  # the name ends in .py
  assert spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
  except UserError:
    raise
  except Exception as error:
    raise _file_error(path, field, error) from error
  return module


def _file_error(path: pathlib.Path, field: str, error: Exception) -> UserError:
  """What an exception out of a user's file says to them."""
  remedy = "fix the file"
  if isinstance(error, ModuleNotFoundError):
    remedy += f", or install {error.name}; pip install -e . has all of ours"
  return UserError(f"{field}: {describe_error(path, error)}; {remedy}")


def describe_error(path: pathlib.Path, error: BaseException) -> str:
  """An exception out of a user's file in one line: where, and what it says."""
  lines = [
    frame.lineno
    for frame in traceback.extract_tb(error.__traceback__)
    if pathlib.Path(frame.filename).absolute() == path.absolute()
  ]
  # A syntax error knows its line; others are found in the traceback.
  line = getattr(error, "lineno", None) or (lines[-1] if lines else None)
  where = f"{path} line {line}" if line else str(path)
  return f"{where}: {type(error).__name__}: {error}"
