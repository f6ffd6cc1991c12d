"""Runs `jaxalign.main` in forks of one process that has imported everything.

Imports are most of what a small run costs. No device is in use when a command
is forked, so it sets up its own, from its own environment. Each line of the
input is a JSON object: a command to start, which is answered with its process
id, or `{"poll": id}`, with its exit status, null while it runs.
"""

import importlib
import json
import os
import sys

import transformers

METHODS = ("kto", "ppo", "sft", "superhf")
for name in (
  "jaxalign.main",
  *(f"jaxalign.algorithms.{method}.setup" for method in METHODS),
  *("jinja2", "nltk", "orbax.checkpoint", "rich.progress"),
):
  importlib.import_module(name)
# These names are imported once they are asked for.
_ = transformers.AutoConfig, transformers.PreTrainedTokenizerFast


def run(job):
  """Becomes a command: its arguments, environment, files and first code."""
  os.environ.update(job["env"])
  for number, name in enumerate(("/dev/null", job["out"], job["errors"])):
    flags = os.O_WRONLY | os.O_CREAT if number else os.O_RDONLY
    os.dup2(os.open(name, flags), number)
  exec(job["first"])
  from jaxalign import main

  sys.exit(main.main(job["argv"]))


for line in sys.stdin:
  job = json.loads(line)
  if "poll" in job:
    found, status = os.waitpid(job["poll"], os.WNOHANG)
    answer = os.waitstatus_to_exitcode(status) if found else None
  else:
    answer = os.fork()
    if answer == 0:
      run(job)
  print(json.dumps(answer), flush=True)
