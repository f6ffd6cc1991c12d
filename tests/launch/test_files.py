"""The YAML files and the Dockerfile of launch/."""

import pathlib
import re
import shlex
import subprocess
import tomllib

import pytest
import yaml

from jaxalign import cli, main
from jaxalign.algorithms import read_config

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "launch"

# A schema: a type, a list of one, or a dict of fields, "?" = may be left out.
# What it does not name is refused, as by the servers.
TEXTS = {"*": str}
JOBSET = {
  "apiVersion": str,
  "kind": str,
  "metadata": {"name": str, "annotations?": TEXTS},
  "spec": {
    "network?": {"enableDNSHostnames?": bool, "subdomain?": str},
    "failurePolicy?": {
      "maxRestarts": int,
      "rules?": [{"name": str, "action": str, "onJobFailureReasons": [str]}],
    },
    "replicatedJobs": [
      {
        "name": str,
        "replicas": int,
        "template": {
          "spec": {
            "completionMode": str,
            "completions": int,
            "parallelism": int,
            "backoffLimit": int,
            "podFailurePolicy?": {
              "rules": [
                {
                  "action": str,
                  "onExitCodes": {"operator": str, "values": [int]},
                }
              ]
            },
            "template": {
              "spec": {
                "restartPolicy": str,
                "terminationGracePeriodSeconds?": int,
                "nodeSelector": TEXTS,
                "containers": [
                  {
                    "name": str,
                    "image": str,
                    "args": [str],
                    "env?": [{"name": str, "value": str}],
                    "ports?": [{"containerPort": int}],
                    "resources": {"limits": {"*": int}},
                    "volumeMounts?": [{"name": str, "mountPath": str}],
                  }
                ],
                "volumes?": [
                  {"name": str, "persistentVolumeClaim": {"claimName": str}}
                ],
              }
            },
          }
        },
      }
    ],
  },
}
SKYPILOT = {
  "name": str,
  "resources": {
    "accelerators": str,
    "use_spot": bool,
    "job_recovery": {
      "recover_on_exit_codes": [int],
      "max_restarts_on_errors": int,
    },
  },
  "num_nodes": int,
  "workdir": str,
  "file_mounts": {"*": {"name": str, "mode": str}},
  "envs": TEXTS,
  "setup": str,
  "run": str,
}


def mistakes(value, schema, path: str = "") -> list[str]:
  """Where a value differs from its schema."""
  if isinstance(schema, type):
    # YAML's `yes` is no number, though Python's True is one.
    return [] if type(value) is schema else [f"{path}: {value!r}"]
  if isinstance(schema, list):
    if not isinstance(value, list):
      return [f"{path}: {value!r}"]
    each = enumerate(value)
    return [m for i, v in each for m in mistakes(v, schema[0], f"{path}[{i}]")]
  if not isinstance(value, dict):
    return [f"{path}: {value!r}"]
  names = {name.rstrip("?") for name in schema}
  needed = {name for name in schema if name[-1] not in "?*"}
  found = [f"{path}.{name} is missing" for name in sorted(needed - set(value))]
  for name, inner in value.items():
    if name not in names and "*" not in schema:
      found.append(f"{path}.{name} is unknown")
      continue
    wanted = schema.get(name, schema.get(f"{name}?", schema.get("*")))
    found += mistakes(inner, wanted, f"{path}.{name}")
  return found


def load(name: str):
  return yaml.safe_load((LAUNCH / name).read_text())


@pytest.mark.parametrize(
  ("name", "schema"), [("gke_jobset.yaml", JOBSET), ("skypilot.yaml", SKYPILOT)]
)
def test_yaml_fits_its_schema(name, schema):
  assert mistakes(load(name), schema) == []


def test_the_schemas_refuse_what_the_servers_refuse():
  broken = load("skypilot.yaml")
  broken["num_nodes"], broken["acelerators"] = "2", "A100:8"
  del broken["run"]
  assert mistakes(broken, SKYPILOT) == [
    ".run is missing",
    ".num_nodes: '2'",
    ".acelerators is unknown",
  ]


def check_flags(words: list[str], monkeypatch) -> None:
  """The config that the words of a file name is there and valid."""
  monkeypatch.chdir(ROOT)
  parser = main.make_parser()
  known = {flag for action in parser._actions for flag in action.option_strings}
  # Flags that say which process of how many it is.
  several = {"--coordinator", "--num_processes", "--process_id"} - known
  words = [w.replace("$(JOB_COMPLETION_INDEX)", "1") for w in words]
  own = [w for w in words if w.partition("=")[0] not in several]
  args = parser.parse(own)
  assert read_config(cli.load_config(args.config)[0], args.fields)
  assert args.workdir.startswith("/runs/")


def test_the_pods_of_a_jobset_find_each_other(monkeypatch):
  jobset = load("gke_jobset.yaml")
  assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
  (group,) = jobset["spec"]["replicatedJobs"]
  job = group["template"]["spec"]
  pod = job["template"]["spec"]
  (container,) = pod["containers"]
  # All hosts of the slice at once, each once, with all the chips it has.
  hosts = job["completions"]
  assert (job["parallelism"], job["completionMode"]) == (hosts, "Indexed")
  sides = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
  chips = container["resources"]["limits"]["google.com/tpu"]
  assert hosts * chips == int(sides[0]) * int(sides[1])
  # One failure restarts all; JobSet gives pods these names in its own domain.
  assert (pod["restartPolicy"], job["backoffLimit"]) == ("Never", 0)
  name = jobset["metadata"]["name"]
  flags = dict(w.split("=") for w in container["args"] if "=" in w)
  port = container["ports"][0]["containerPort"]
  assert flags == {
    "--coordinator": f"{name}-{group['name']}-0-0.{name}:{port}",
    "--num_processes": f"{hosts}",
    "--process_id": "$(JOB_COMPLETION_INDEX)",
  }
  check_flags(container["args"], monkeypatch)
  # The run's folder is in the volume that outlives the pods.
  (volume,), (mount,) = pod["volumes"], container["volumeMounts"]
  assert volume["name"] == mount["name"]
  assert mount["mountPath"] == "/runs"


def test_a_skypilot_node_runs_its_process(machine, monkeypatch):
  task = load("skypilot.yaml")
  python = machine.folder / ".venv" / "bin" / "python"
  python.parent.mkdir(parents=True)
  python.symlink_to(machine.program("python", 'printf "%s\\n" "$@"'))
  out = subprocess.run(
    ["bash", "-euc", task["run"]],
    cwd=machine.folder,
    env=task["envs"]
    | {
      "PATH": "/usr/bin:/bin",
      "SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8",
      "SKYPILOT_NODE_RANK": "1",
    },
    capture_output=True,
    text=True,
  )
  assert out.returncode == 0, out.stderr
  words = out.stdout.splitlines()
  assert words[:2] == ["-m", "jaxalign.main"]
  assert words[-3:] == [
    "--coordinator=10.0.0.7:8476",
    "--num_processes=2",
    "--process_id=1",
  ]
  check_flags(words[2:], monkeypatch)
  assert set(task["file_mounts"]) == {"/runs"}
  extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  assert task["envs"]["EXTRA"] in extras["optional-dependencies"]
  assert 'pip install --python .venv -e ".[$EXTRA]"' in task["setup"]


def test_the_image_has_a_target_for_each_kind_of_machine():
  text = (LAUNCH / "Dockerfile").read_text()
  stages = re.split(r"^FROM ", text, flags=re.MULTILINE)[1:]
  named = {s.split()[2]: s for s in stages}
  assert list(named) == ["base", "cpu", "cuda", "tpu"]
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  oldest = tuple(
    map(int, project["requires-python"].removeprefix(">=").split("."))
  )
  image = re.search(r"FROM python:(\d+)\.(\d+)-slim AS base", text)
  assert tuple(map(int, image.groups())) >= oldest
  for name in ("cpu", "cuda", "tpu"):
    assert named[name].startswith("base AS")
    copied = re.findall(r"^COPY (\w+) \w+$", named[name], re.MULTILINE)
    assert copied == ["jaxalign", "configs"]
    # The package comes after what it needs, which is thus kept.
    assert named[name].index("pip install") < named[name].index("COPY jaxalign")
  extras = set(re.findall(r"ARG CUDA=(\w+)|\.\[(\w+)\]", text))
  for extra in filter(None, (e for pair in extras for e in pair)):
    assert extra in project["optional-dependencies"]
  # Everything pip reads of the tree is there before it runs.
  for path in re.findall(r"^COPY (.+) \./$", text, re.MULTILINE)[0].split():
    assert (ROOT / path).is_file()
  needed = {project["readme"], *project["license-files"], "pyproject.toml"}
  assert needed <= set(named["base"].split())


def test_the_page_shows_commands_that_are_valid(monkeypatch):
  monkeypatch.chdir(ROOT)
  text = (ROOT / "docs" / "laptop_to_pod.md").read_text()
  for name in re.findall(r"launch/[\w.]+", text):
    assert (ROOT / name).is_file(), name
  seen = 0
  for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
    for line in block.replace("\\\n", " ").splitlines():
      words = shlex.split(line)
      if "--config" in words and "jaxalign.plan" not in words:
        args = main.make_parser().parse(words[words.index("--config") :])
        assert read_config(cli.load_config(args.config)[0], args.fields), line
        seen += 1
  # What to do when it does not fit, on the preset of the page.
  flags = re.findall(r"`(--config\.[^`]+)`", text.partition("not fit\n")[2])
  policy = cli.load_config("configs/superhf.py:pythia-1b")[0]
  for flag in flags:
    if "reference" not in flag:  # of DPO and KTO
      args = main.make_parser().parse(shlex.split(flag))
      assert read_config(policy, args.fields), flag
  assert (seen >= 8, len(flags) >= 10) == (True, True)
