"""What the processes of a run, one per host, have to agree on.

All processes must call these functions in the same order, because they wait for
each other; `count`, `is_lead` and `name_of` may be called anywhere. With one
process they exchange nothing and touch no device. What they say to each other
goes through the key-value store of `jax.distributed`, so no device waits for
it. The lead alone serves that store, so what may be megabytes, the results of
`spread`, goes through the devices.
"""

import contextlib
import ctypes
import dataclasses
import functools
import itertools
import json
import logging
import os
import pickle
import platform
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax._src import clusters, distributed, xla_bridge  # have no public names
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from jaxalign import cli
from jaxalign.errors import HostError, StepError, UserError
from jaxalign.parallel.cluster import Cluster

T = TypeVar("T")
Item = TypeVar("Item")

START_SECONDS = 300  # until all processes are there
STEP_SECONDS = 1800  # that a process may be behind the others
TRANSFER_SECONDS = 6 * 3600  # for a model or a state to be copied or saved
BEAT_SECONDS = 3.0  # between two signs of life
SILENT_SECONDS = 30.0  # without one, after which a process counts as dead
NARROWEST = 2**16  # bytes a process, in an exchange by the devices
GRACE_SECONDS = 10.0  # for a failure that all processes meet at the same time

_log = logging.getLogger(__name__)

_PREFIX = "jaxalign/"
_numbers = itertools.count()  # of the calls, the same on every process
_done: list[str] = []  # own keys of earlier calls, not yet deleted
_handlers: list[object] = []  # of C, which must outlive the process


@dataclasses.dataclass
class _Watch:
  """The thread that gives signs of life and looks for those of others."""

  names: list[str]  # of all processes, for messages
  stop: threading.Event = dataclasses.field(default_factory=threading.Event)
  # When this process last met the others, or began to wait for the lead.
  met: float = dataclasses.field(default_factory=time.monotonic)
  failing: bool = False  # this process is about to end, and says so itself


_watch: _Watch | None = None


# Starting.


def start(cluster: Cluster | None) -> None:
  """Joins the processes of the run; before the first use of a device.

  Args:
    cluster: from `find_cluster`; None = alone, unless this is a TPU slice.

  Raises:
    HostError: the coordinator cannot be reached in time, or not be joined.
    UserError: process 0 cannot listen, or this process has used JAX already.
  """
  global _watch
  # A user's program may have done so, or may run a second time.
  if distributed.global_state.client is None:
    cluster = cluster or _tpu_slice()
    if cluster is None or cluster.num_processes == 1:
      return
    _join(cluster)
  # The watch of an earlier run has ended with it.
  if count() == 1 or (_watch is not None and not _watch.stop.is_set()):
    return
  me = f"host {_me()} ({platform.node()})"
  rows = _exchange_json({"name": me}, "the start", STEP_SECONDS)
  _watch = _Watch([row["name"] for row in rows])
  # The lead speaks for all; what goes wrong is on each host's stderr.
  if not is_lead():
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
  threading.Thread(target=_keep_watch, args=(_watch,), daemon=True).start()


def _join(cluster: Cluster) -> None:
  if xla_bridge.backends_are_initialized():
    raise UserError(
      "JAX was used before the hosts joined; start the run before any JAX call"
    )
  config = jax.config
  # The collectives of several CPUs; other platforms have their own.
  config.update("jax_cpu_collectives_implementation", "gloo")
  # Its handler of SIGTERM would stand in the way of ours, and cannot be undone.
  config.update("jax_enable_preemption_service", False)
  print(
    f"process {cluster.process_id} of {cluster.num_processes} joins "
    f"{cluster.coordinator} ({cluster.source}) and waits up to "
    f"{START_SECONDS} s for the others",
    file=sys.stderr,
  )
  _check_address(cluster)
  _explain_aborts(cluster)
  try:
    jax.distributed.initialize(
      cluster.coordinator,
      cluster.num_processes,
      cluster.process_id,
      local_device_ids=cluster.local_devices,
      cluster_detection_method="deactivate",
      initialization_timeout=START_SECONDS,
    )
  except RuntimeError as error:
    where = f"{cluster.coordinator} ({cluster.source}): {_first_line(error)}"
    if cluster.process_id > 0:
      raise HostError(
        f"process {cluster.process_id} cannot join process 0 at {where}"
      ) from error
    raise UserError(
      f"process 0 cannot listen at {where}; give --coordinator a free port"
    ) from error


def check_same(values: Mapping[str, object], remedy: str) -> None:
  """Refuses processes that were started with other values.

  Args:
    values: by what they are called in the message; any JSON.
    remedy: what to do, for the message.

  Raises:
    UserError: which process has what; the same on all of them.
  """
  if count() == 1:
    return
  plain = json.loads(json.dumps(values, default=repr))
  rows = _exchange_json(plain, "the comparison of the hosts", TRANSFER_SECONDS)
  for number, row in enumerate(rows):
    differing = [
      f"{name} is {json.dumps(rows[0].get(name))} on {name_of(0)} and "
      f"{json.dumps(row.get(name))} on {name_of(number)}"
      for name in sorted(rows[0].keys() | row.keys())
      if rows[0].get(name) != row.get(name)
    ]
    if differing:
      raise UserError(f"the hosts differ: {'; '.join(differing[:3])}; {remedy}")


def check_number() -> None:
  """Refuses a process number that differs from JAX's own.

  The hosts of a TPU slice have numbers, by which checkpoints are written.

  Raises:
    UserError: the numbers differ.
  """
  if jax.process_index() != _me():
    raise UserError(
      f"this process was started as number {_me()}, but it is host "
      f"{jax.process_index()} of its TPU slice; number the processes as the "
      "slice does (TPU_WORKER_ID), or start them without flags and variables"
    )


def _tpu_slice() -> Cluster | None:
  """The hosts of a TPU slice, as the machine itself knows them."""
  # Both look for TPU chips first, so that elsewhere nobody asks the network.
  for kind in (clusters.GkeTpuCluster, clusters.GceTpuCluster):
    try:
      if not kind.is_env_present() or (total := kind.get_process_count()) == 1:
        continue
      address = kind.get_coordinator_address(START_SECONDS, None)
      return Cluster(address, total, kind.get_process_id(), "TPU metadata")
    except (OSError, ImportError) as error:  # chips without Cloud's network
      _log.warning("this machine's TPU slice is not known: %s", error)
  return None


def _check_address(cluster: Cluster) -> None:
  """Waits until process 0 listens; JAX would abort the process."""
  if cluster.process_id == 0:
    return
  host, _, port = cluster.coordinator.rpartition(":")
  end = time.monotonic() + START_SECONDS
  while True:
    try:
      socket.create_connection((host.strip("[]"), int(port)), 10).close()
      return
    except OSError as error:
      if time.monotonic() > end:
        # Its machine may only be slow to start, so this is no mistake.
        raise HostError(
          f"the coordinator {cluster.coordinator} ({cluster.source}) cannot be "
          f"reached within {START_SECONDS} s: {error}; start process 0 there, "
          "open its port between the hosts, or correct --coordinator"
        ) from error
    time.sleep(1)


def _explain_aborts(cluster: Cluster) -> None:
  """Has a process that JAX aborts say why, after JAX's own log.

  JAX ends a process from within, without an exception, when the coordinator is
  gone or when not all processes have come.
  """

  def explain(number: int) -> None:
    del number
    if _watch is None:
      text = (
        f"not all {cluster.num_processes} processes came to "
        f"{cluster.coordinator} within {START_SECONDS} s; start them with the "
        f"same --coordinator and --num_processes, and --process_id 0 to "
        f"{cluster.num_processes - 1}"
      )
    else:
      text = (
        f"{_gone([0] if not is_lead() else [])}. If the lines above are not "
        "about the coordination service, they say why this process was aborted"
      )
    os.write(2, f"error: {text}\n".encode())
    os._exit(1)

  # Python's own handlers run in the main thread, which waits for a device. The
  # thread that aborts holds no lock.
  handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(explain)
  _handlers.append(handler)
  ctypes.CDLL(None).signal(int(signal.SIGABRT), handler)


# Agreeing.


def count() -> int:
  """The number of processes."""
  return distributed.global_state.num_processes


def is_lead() -> bool:
  """Whether this process writes the run's files and measures its times."""
  return distributed.global_state.process_id == 0


def name_of(number: int) -> str:
  """A process for people: its number and its machine."""
  return _watch.names[number] if _watch else f"host {number}"


def broadcast(x: T) -> T:
  """The lead's value, on all processes.

  Args:
    x: a number, a numpy array or a tree of them; the lead's shapes and dtypes
      on every process.

  Returns:
    The same tree; numbers stay Python numbers.
  """
  if count() == 1:
    return x
  key = f"{_PREFIX}{next(_numbers)}"
  if is_lead():
    _put(key, _to_bytes(x))
  return _from_bytes(_get(key), x)


def from_lead(make: Callable[[], T], like: T) -> T:
  """What `make` gives on the lead, the only process that calls it.

  Args:
    make: asks a person, calls a user's function, reads a changing file.
    like: a value of the same types, shapes and dtypes.

  Raises:
    Exception: on the lead what `make` raised; on the others, instead of waiting
      for ever, a `UserError` or `StepError` where the lead has one, else a
      `RuntimeError`.
  """
  made, error = like, None
  if is_lead():
    try:
      made = make()
    except Exception as raised:
      error = raised
  # The failure is shared first: no process then waits for a value. Its kind
  # as well, so that all of them go on after it or none.
  failed, mistake, of_step = broadcast(
    (
      error is not None,
      isinstance(error, UserError),
      isinstance(error, StepError),
    )
  )
  if error is not None:
    raise error
  if failed:
    kind = UserError if mistake else RuntimeError
    raise (StepError if of_step else kind)(
      "the lead process failed; its log says why"
    )
  return broadcast(made)


def agree(flag: bool) -> bool:
  """True on all processes if `flag` is True on any, e.g. a failed step."""
  return highest(int(flag)) > 0


def highest(value: int) -> int:
  """The highest of all processes' values, >= 0; cheap where all are 0.

  Called once a step, with the signal that a process got: a request to stop
  reaches all of them after the same step.

  Raises:
    HostError: a process is far behind.
  """
  if count() == 1:
    return value
  mine = str(value).encode() if value else None
  found = _exchange(mine, "the end of a step", STEP_SECONDS)
  return max(map(int, found), default=0)


def gather(x: PyTree) -> PyTree:
  """The values of all processes; for small values only.

  Args:
    x: a number, a numpy array or a tree of them; of the same shapes and dtypes
      on every process.

  Returns:
    The same tree of numpy arrays `[processes, ...]`, in the processes' order.
  """
  x = jax.tree.map(lambda leaf: np.asarray(leaf, order="C"), x)
  rows = [x]
  if count() > 1:
    found = _exchange(_to_bytes(x), "an exchange", STEP_SECONDS)
    rows = [_from_bytes(data, x) for data in found]
  return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)


def spread(
  function: Callable[[Sequence[Item]], Sequence[T]], items: Sequence[Item]
) -> list[T]:
  """`function(items)`, each process doing its part of the items.

  Args:
    function: gives for each item what `pickle` can copy, which depends on that
      item alone.
    items: the same on every process.
  """
  if count() == 1:
    return list(function(items))
  edges = [len(items) * i // count() for i in range(count() + 1)]
  mine, error = [], None
  try:
    own = items[edges[_me()] : edges[_me() + 1]]
    mine = list(function(own)) if own else []
  except Exception as raised:
    error = raised
  # A failure is shared, or the others would wait for its part.
  data = b"" if error is not None else pickle.dumps(mine)
  parts = _exchange_by_devices(data)
  if error is not None:
    raise error
  for number, part in enumerate(parts):
    if not part:
      raise RuntimeError(f"{name_of(number)} failed; its log says why")
  return [row for part in parts for row in pickle.loads(part)]


def barrier(name: str, seconds: int | float) -> None:
  """Waits until every process is here.

  Args:
    name: of the place in the program, the same on every process.
    seconds: how long to wait at most.

  Raises:
    HostError: which process did not come in time.
  """
  if count() == 1:
    return
  try:
    _client().wait_at_barrier(name, timeout_in_ms=int(1000 * seconds))
    if _watch is not None:
      _watch.met = time.monotonic()
  except jax.errors.JaxRuntimeError as error:
    if "DEADLINE_EXCEEDED" not in str(error):
      raise
    # The numbers of some of the missing, a line each.
    _, _, after = str(error).partition("timed out task names:\n")
    lines = itertools.takewhile(str.strip, after.splitlines())
    missing = [int(n) for line in lines for n in re.findall(r"\d+$", line)]
    who = " and ".join(map(name_of, missing)) or "a process of this run"
    raise HostError(
      f"{who} did not reach {name} within {seconds:g} s"
    ) from error


# Ending.


@contextlib.contextmanager
def together() -> Iterator[None]:
  """Runs a block on all processes; if one fails, it ends the others.

  They would wait for it for ever. With several processes a failure ends this
  process too: the block raises nothing.
  """
  if count() == 1:
    yield
    return
  try:
    yield
    barrier("the end", TRANSFER_SECONDS)
  except BaseException as error:
    _leave(_explain(error))
  if _watch is not None:
    _watch.stop.set()


def _explain(error: BaseException) -> int:
  """Prints what ended this process; its exit status."""
  status = cli.explain(error)
  if status is not None:
    return status
  # A collective fails at once where another process died, which the watch
  # finds out a little later and then ends this process.
  if isinstance(error, jax.errors.JaxRuntimeError) and _watch:
    _watch.stop.wait(SILENT_SECONDS + 3 * BEAT_SECONDS)
  traceback.print_exception(error)
  return 1


def _leave(status: int) -> None:
  """Ends this process, and tells the others."""
  if _watch is not None:
    _watch.failing = True
  sys.stdout.flush()
  sys.stderr.flush()
  try:
    text = f"{name_of(_me())} failed; its log says why. This process ends too"
    _client().key_value_set(f"{_PREFIX}failed/{_me()}", text, True)
    # The lead has the store: it goes last, once the others have had the time to
    # say the same, or to read that it fails.
    if is_lead():
      end = time.monotonic() + GRACE_SECONDS + 2 * BEAT_SECONDS
      place = f"{_PREFIX}failed/"
      while (
        time.monotonic() < end
        and len(_client().key_value_dir_get(place)) < count()
      ):
        time.sleep(0.2)
      time.sleep(0.5)
  finally:
    # JAX would wait for processes that do not come any more.
    os._exit(status)


def _keep_watch(watch: _Watch) -> None:
  """Signs of life, until the end; ends the process if another one is dead.

  The lead looks at all the others, they look at the lead and at its verdict.
  """
  client, me = _client(), _me()
  # By number: the last sign of life, and when it came; of the others.
  begin = time.monotonic()
  others = range(1, count()) if me == 0 else [0]
  own, theirs = f"{_PREFIX}alive/lead/", f"{_PREFIX}alive/others/"
  if me > 0:
    own, theirs = theirs, own
  seen = dict.fromkeys(others, ("", begin))
  failed_at: float | None = None
  told = begin  # where a process that hangs may be
  for beat in itertools.count():
    if watch.stop.wait(BEAT_SECONDS):
      return
    now = time.monotonic()
    try:
      client.key_value_set(f"{own}{me}", str(beat), True)
      alive = client.key_value_dir_get(theirs)
      failed = client.key_value_dir_get(f"{_PREFIX}failed/")
    except jax.errors.JaxRuntimeError:
      continue  # the coordinator is gone: JAX ends this process
    if watch.failing or watch.stop.is_set():
      return
    for name, sign in alive:
      number = _number(name)
      if number in seen and seen[number][0] != sign:
        seen[number] = (sign, now)
    if now - max(watch.met, told) > STEP_SECONDS:
      told = now
      with contextlib.suppress(OSError):
        os.write(2, _whereabouts().encode())
    dead = [n for n, (_, last) in seen.items() if now - last > SILENT_SECONDS]
    if dead:
      _end(_gone(dead), alone=len(dead) + 1 == count())
    # Where all fail for the same reason each of them says so itself.
    if failed:
      failed_at = failed_at or now
      if now - failed_at > GRACE_SECONDS:
        _end(failed[0][1])


def _whereabouts() -> str:
  """A warning with the stack of this process's main thread.

  A process that hangs keeps the devices of the others waiting, where no
  time-out reaches them. Its stack differs from theirs.
  """
  thread = threading.main_thread().ident
  frame = sys._current_frames().get(thread) if thread else None
  return (
    f"warning: the hosts have not met for {STEP_SECONDS / 60:.0f} minutes; if "
    "one of them hangs, its stack differs from the others'. That of "
    f"{name_of(_me())}:\n{''.join(traceback.format_stack(frame))}"
  )


def _gone(numbers: Sequence[int]) -> str:
  who = " and ".join(map(name_of, numbers)) or "another host"
  return (
    f"{who} is gone: no sign of life for {SILENT_SECONDS:g} s, or its "
    "connection was closed. This process ends as well; start all of them again "
    "with the same command, and the run goes on from its last checkpoint"
  )


def _end(message: str, *, alone: bool = False) -> None:
  os.write(2, f"error: {message}\n".encode())
  # The lead has the store, from which the others read the same.
  if is_lead() and not alone:
    try:
      _client().key_value_set(f"{_PREFIX}failed/0", message, True)
    finally:
      time.sleep(GRACE_SECONDS + 2 * BEAT_SECONDS)
  os._exit(1)


# The store.


def _client() -> Any:  # its class has no public name
  client = distributed.global_state.client
  assert client is not None, "many processes without jax.distributed"
  return client


def _me() -> int:
  return distributed.global_state.process_id


def _put(key: str, data: bytes) -> None:
  _client().key_value_set_bytes(key, data)
  _done.append(key)


def _get(key: str) -> bytes:
  """Waits for a value, as long as it takes: a person may be asked for it."""
  while True:
    if _watch is not None:  # no reason to worry where the others are
      _watch.met = time.monotonic()
    try:
      return _client().blocking_key_value_get_bytes(key, 60_000)
    except jax.errors.JaxRuntimeError as error:
      if "DEADLINE_EXCEEDED" not in str(error):
        raise


def _exchange(data: bytes | None, name: str, seconds: int) -> list[bytes]:
  """Every process's bytes, in process order; for small values.

  Args:
    data: of this process; None = nothing, and the list lacks it.
    name: see `barrier`.
    seconds: the same.

  Raises:
    HostError: a process did not come.
  """
  place = f"{_PREFIX}{next(_numbers)}/"
  before = _done[:]
  if data is not None:
    _put(f"{place}{_me()}", data)
  # What is there before the barrier is what all of them see after it. One
  # request for all: as many as there are processes would add up.
  barrier(name, seconds)
  found = _client().key_value_dir_get_bytes(place)
  _forget(before)
  return [data for _, data in sorted(found, key=lambda row: _number(row[0]))]


def _exchange_by_devices(data: bytes) -> list[bytes]:
  """As `_exchange`, for large values."""
  mine = str(len(data)).encode()
  sizes = [int(x) for x in _exchange(mine, "an exchange", STEP_SECONDS)]
  # Powers of two, as each width is a program of its own.
  width = max(1 << (max(sizes) - 1).bit_length(), NARROWEST)
  row = np.frombuffer(data.ljust(width, b"\0"), np.uint8)[None]
  split, whole = _by_hosts()
  with jax.transfer_guard("allow"):  # it is meant
    given = jax.make_array_from_process_local_data(split, row)
  rows = jax.device_get(_gather_rows(given, whole).addressable_data(0))
  return [rows[i, :size].tobytes() for i, size in enumerate(sizes)]


@functools.cache
def _by_hosts() -> tuple[NamedSharding, NamedSharding]:
  """A row a process, and all rows on every device."""
  devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
  mesh = Mesh(np.array(devices).reshape(count(), -1), ("host", "device"))
  specs = PartitionSpec("host"), PartitionSpec()
  split, whole = (NamedSharding(mesh, spec) for spec in specs)
  return split, whole


@functools.partial(jax.jit, static_argnums=1)
def _gather_rows(rows: jax.Array, where: NamedSharding) -> jax.Array:
  return jax.lax.with_sharding_constraint(rows, where)


def _number(key: str) -> int:
  return int(key.rpartition("/")[2])


def _forget(keys: Sequence[str]) -> None:
  """Deletes own values, which nobody reads once all have come further."""
  for key in keys:
    _client().key_value_delete(key)
    _done.remove(key)


def _exchange_json(value: object, name: str, seconds: int) -> list[Any]:
  rows = _exchange(json.dumps(value).encode(), name, seconds)
  return [json.loads(row) for row in rows]


def _to_bytes(x: PyTree) -> bytes:
  return b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(x))


def _from_bytes(data: bytes, like: T) -> T:
  """The tree of which `data` holds the bytes; numbers stay numbers."""
  leaves, treedef = jax.tree.flatten(like)
  found, start = [], 0
  for leaf in leaves:
    array = np.asarray(leaf)
    part = data[start : start + array.nbytes]
    assert len(part) == array.nbytes, "the processes share other shapes"
    value = np.frombuffer(part, array.dtype).reshape(array.shape).copy()
    found.append(value if isinstance(leaf, np.ndarray) else value.item())
    start += array.nbytes
  return jax.tree.unflatten(treedef, found)


def _first_line(error: BaseException) -> str:
  return str(error).partition("\n")[0]
