"""Compares online runs at equal numbers of sampled tokens.

  python configs/lab/compare.py runs/superhf-lab runs/ppo-lab runs/dpo-online

For each run and each share of the smallest run's tokens: score, held-out score,
KL and word overlap, as means over the tenth of the tokens before it.
"""

import argparse
import json
import pathlib

import numpy as np

SHOWN = ("score/mean", "test_score/mean", "kl/mean", "diversity/overlap")
SHARES = tuple(i / 10 for i in range(1, 11))


def read(folder: str) -> list[dict]:
  """The steps of a run."""
  lines = (pathlib.Path(folder) / "metrics.jsonl").read_text().splitlines()
  return [row for row in map(json.loads, lines) if "score/mean" in row]


def table(runs: dict[str, list[dict]]) -> list[dict]:
  """Rows of run, tokens and means."""
  total = {
    name: np.cumsum([row["num_sampled_tokens"] for row in rows])
    for name, rows in runs.items()
  }
  most = min(tokens[-1] for tokens in total.values())
  found = []
  for name, rows in runs.items():
    for share in SHARES:
      end = share * most
      here = (total[name] > end - 0.1 * most) & (total[name] <= end)
      picked = [rows[i] for i in np.flatnonzero(here)] or rows[:1]
      means = {
        metric: round(float(np.mean([r[metric] for r in picked])), 3)
        for metric in SHOWN
        if all(metric in r for r in picked)
      }
      found.append({"run": name, "tokens": int(end)} | means)
  return found


def main() -> None:
  """Prints one JSON line a run and number of tokens."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("runs", nargs="+", help="folders of runs")
  runs = {folder: read(folder) for folder in parser.parse_args().runs}
  for row in table(runs):
    print(json.dumps(row))


if __name__ == "__main__":
  main()
