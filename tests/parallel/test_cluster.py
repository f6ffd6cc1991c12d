"""Which processes a run has, from flags and from what launchers set."""

import pytest

from jaxalign.errors import UserError
from jaxalign.parallel.cluster import Cluster, find_cluster


def test_nothing_says_so():
  assert find_cluster(env={}) is None
  # A shell within a job, and a single task of it, are no step of several.
  assert find_cluster(env={"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}) is None
  env = {"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "a", "SLURM_PROCID": "0"}
  assert find_cluster(env=env) is None
  assert find_cluster(env={"OMPI_COMM_WORLD_SIZE": "1"}) is None


def test_flags_win_over_the_environment():
  env = {"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_RANK": "3"}
  found = find_cluster("10.0.0.1:1234", 2, 1, env)
  assert found == Cluster("10.0.0.1:1234", 2, 1, "the flags")
  # The port has a default.
  found = find_cluster("node-a", 2, 0, {})
  assert found is not None
  assert found.coordinator == "node-a:8476"


@pytest.mark.parametrize(
  ("flags", "says"),
  [
    (("a:1", None, None), "--num_processes and --process_id missing"),
    ((None, 2, 0), "--coordinator missing"),
    (("a:1", 2, None), "--process_id missing"),
    (("a:1", 2, 2), r"--process_id must be in \[0, 1\].*got 2"),
    (("a:1", 0, 0), "--num_processes must be >= 1, got 0"),
    (("a:one", 2, 0), "--coordinator must be HOST:PORT, got 'a:one'"),
  ],
)
def test_wrong_flags_are_one_clear_line(flags, says):
  with pytest.raises(UserError, match=says) as caught:
    find_cluster(*flags, env={})
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("nodes", "first"),
  [
    ("node001", "node001"),
    ("node001,host2", "node001"),
    ("node[001-015],host2", "node001"),
    ("node[007,009-015]", "node007"),
    ("gpu-a-[3-4]", "gpu-a-3"),
  ],
)
def test_slurm(nodes, first):
  env = {
    "SLURM_JOB_ID": "4097",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NODELIST": nodes,
    "SLURM_STEP_NUM_NODES": "2",
  }
  # A task a node has all of the node's GPUs.
  assert find_cluster(env=env) == Cluster(f"{first}:8477", 2, 1, "SLURM")
  # Several tasks of a node have one each, unless SLURM shows each its own.
  env |= {"SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
  for more, wanted in (
    ({}, (1,)),
    ({"CUDA_VISIBLE_DEVICES": "0,1"}, (1,)),
    ({"CUDA_VISIBLE_DEVICES": "0"}, None),
    ({"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_PER_TASK": "a100:2"}, None),
  ):
    found = find_cluster(env=env | more)
    assert found is not None
    assert found.local_devices == wanted, more


def test_open_mpi():
  env = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_MCA_orte_hnp_uri": "8192.0;tcp://10.96.0.1,10.148.0.1:34911",
  }
  assert find_cluster(env=env) == Cluster("10.96.0.1:8478", 2, 1, "Open MPI")
  # Version 5 does not say where the first process is.
  env.pop("OMPI_MCA_orte_hnp_uri")
  with pytest.raises(UserError, match="mpirun does not say"):
    find_cluster(env=env)
  found = find_cluster(env=env | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"})
  assert found == Cluster("localhost:8476", 2, 1, "Open MPI", (0,))


def test_kubernetes():
  env = {
    "JAX_COORDINATOR_ADDRESS": "run-hosts-0-0.run:8476",
    "JAX_NUM_PROCESSES": "4",
    "JOB_COMPLETION_INDEX": "3",
  }
  found = find_cluster(env=env)
  source = "JAX_COORDINATOR_ADDRESS"
  assert found == Cluster("run-hosts-0-0.run:8476", 4, 3, source)
  with pytest.raises(UserError, match="JAX_NUM_PROCESSES"):
    find_cluster(env={"JAX_COORDINATOR_ADDRESS": "a:1"})
