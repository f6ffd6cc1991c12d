"""Which processes a run has: from flags, or from what a launcher has set.

Imports no jax, so that a mistake in a flag shows at once.
"""

import dataclasses
import os
import re
from collections.abc import Mapping

from jaxalign.errors import UserError

PORT = 8476  # where none is given; below the range of outgoing connections


@dataclasses.dataclass(frozen=True)
class Cluster:
  """One process among those of a run.

  Attributes:
    coordinator: HOST:PORT at which process 0 listens.
    num_processes: >= 1.
    process_id: of this process, from 0.
    source: what said so, for messages.
    local_devices: GPUs that are this process's; None = all of its host.
  """

  coordinator: str
  num_processes: int
  process_id: int
  source: str
  local_devices: tuple[int, ...] | None = None


def find_cluster(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  env: Mapping[str, str] = os.environ,
) -> Cluster | None:
  """What the flags say, else the environment.

  Args:
    coordinator: HOST or HOST:PORT.
    num_processes: of the run.
    process_id: of this process.
    env: of this process: `JAX_COORDINATOR_ADDRESS` and its like (Kubernetes),
      SLURM's, Open MPI's.

  Returns:
    None without flags and JAX's variables, unless a launcher has started
    several processes. TPU slices are found by `hosts.start`, which asks the
    machine.

  Raises:
    UserError: some of the flags are missing, or one is wrong.
  """
  given = {
    "--coordinator": coordinator,
    "--num_processes": num_processes,
    "--process_id": process_id,
  }
  missing = [name for name, value in given.items() if value is None]
  if len(missing) == len(given):
    return (
      _from_variables(env) or _from_slurm(env) or _from_open_mpi(env) or None
    )
  if missing:
    raise UserError(
      f"{' and '.join(missing)} missing: --coordinator=HOST:PORT, "
      "--num_processes=N and --process_id=I go together; give all three, or "
      "none under SLURM, Open MPI or on a TPU slice"
    )
  assert coordinator is not None
  assert num_processes is not None
  assert process_id is not None
  return _checked(coordinator, num_processes, process_id, "the flags")


def _from_variables(env: Mapping[str, str]) -> Cluster | None:
  """Kubernetes, and whatever else sets the names that JAX's launchers use."""
  address = env.get("JAX_COORDINATOR_ADDRESS")
  if not address:
    return None
  # An Indexed Job, which JobSet makes of each of its jobs, numbers its pods.
  number = env.get("JAX_PROCESS_ID", env.get("JOB_COMPLETION_INDEX"))
  count = env.get("JAX_NUM_PROCESSES")
  if count is None or number is None:
    raise UserError(
      f"JAX_COORDINATOR_ADDRESS={address} is set, but JAX_NUM_PROCESSES or "
      "JAX_PROCESS_ID (JOB_COMPLETION_INDEX) is not; set all three, or give "
      "--coordinator, --num_processes and --process_id"
    )
  source = "JAX_COORDINATOR_ADDRESS"
  return _checked(address, _number(count), _number(number), source)


def _from_slurm(env: Mapping[str, str]) -> Cluster | None:
  """A step of several tasks, which `srun` starts."""
  count, nodes = env.get("SLURM_NTASKS"), env.get("SLURM_STEP_NODELIST")
  if not nodes or count in (None, "", "1") or "SLURM_PROCID" not in env:
    return None
  # The first of `node001`, `node001,host2`, `node[001-015,020],host2`.
  match = re.match(r"([^,\[]+)(?:\[([^,\-\]]+))?", nodes)
  assert match is not None, nodes
  # Jobs that share a node must not share a port.
  port = PORT + int(env.get("SLURM_JOB_ID", "0")) % 4096
  return _checked(
    f"{match[1]}{match[2] or ''}:{port}",
    _number(count),
    _number(env["SLURM_PROCID"]),
    "SLURM",
    _own_device(env, "SLURM_LOCALID", env.get("SLURM_STEP_NUM_NODES"), count),
  )


def _from_open_mpi(env: Mapping[str, str]) -> Cluster | None:
  """One of several processes of `mpirun`, version 4 or 5."""
  count = env.get("OMPI_COMM_WORLD_SIZE")
  if count in (None, "", "1"):
    return None
  # 1531576320.0;tcp://10.96.0.1,10.148.0.1:34911, or tcp6://[fe80::b9b]:43370
  uri = env.get("OMPI_MCA_orte_hnp_uri") or env.get("PMIX_SERVER_URI2", "")
  host = re.search(r"tcp6?://\[?([^,;\]]+?)(?:[,\]]|:\d+$)", uri)
  local = env.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1")
  # Version 5 tells no process where the others are: of one node it is known.
  if host is None and local != count:
    raise UserError(
      "mpirun does not say on which node process 0 runs; set "
      "JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
    )
  name = "localhost" if local == count or host is None else host[1]
  job = int(uri.partition(".")[0]) >> 12 if uri[:1].isdigit() else 0
  nodes = -(-int(count) // max(int(local), 1))
  return _checked(
    f"[{name}]:{PORT + job % 4096}"
    if ":" in name
    else f"{name}:{PORT + job % 4096}",
    _number(count),
    _number(env.get("OMPI_COMM_WORLD_RANK", "0")),
    "Open MPI",
    _own_device(env, "OMPI_COMM_WORLD_LOCAL_RANK", str(nodes), count),
  )


def _own_device(
  env: Mapping[str, str], name: str, nodes: str | None, count: str
) -> tuple[int, ...] | None:
  """One GPU a process where a node has several processes, else all of it."""
  if name not in env or nodes is None or int(nodes) >= int(count):
    return None
  # With GPU binding each process sees only its own GPUs, numbered from 0.
  visible = env.get("CUDA_VISIBLE_DEVICES")
  if visible is not None:
    seen, processes = len(visible.split(",")), -(-int(count) // int(nodes))
    asked = env.get("SLURM_GPUS_PER_TASK", "").rpartition(":")[2]  # a100:4
    if seen < processes or str(seen) == asked:
      return None
  return (int(env[name]),)


def _number(text: str) -> int:
  return int(text) if text.isdigit() else -1


def _checked(
  address: str,
  count: int,
  number: int,
  source: str,
  local_devices: tuple[int, ...] | None = None,
) -> Cluster | None:
  # A port is all that follows the last colon, unless that is in brackets.
  if not re.search(r":\d+$", address):
    if not re.fullmatch(r"[\w.\-\[\]]+", address):
      raise UserError(
        f"--coordinator must be HOST:PORT, got {address!r}: the address of "
        "process 0, such as 10.0.0.1:8476"
      )
    address = f"{address}:{PORT}"
  if count < 1:
    raise UserError(
      f"--num_processes must be >= 1, got {count}; it counts the processes of "
      "the run, one a host"
    )
  if not 0 <= number < count:
    raise UserError(
      f"--process_id must be in [0, {count - 1}] with --num_processes={count}, "
      f"got {number}; number the processes from 0"
    )
  return Cluster(address, count, number, source, local_devices)
