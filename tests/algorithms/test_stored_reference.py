"""What a reference that was run before training is read for."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.algorithms.kto import train as kto
from jaxalign.algorithms.kto.config import KTOConfig
from jaxalign.algorithms.kto.data import LabelledBatch
from jaxalign.config.sections import OptimizerConfig

# Adam whose eps is as good as alone: a step is the gradient itself.
STEADY = OptimizerConfig(
  learning_rate=1e6, schedule="constant", eps=1e6, weight_decay=0.0
)
CHOSEN = [("ab", "cde"), ("c", "a"), ("def", "ab"), ("gh", "ca")]
REJECTED = [("ab", "f"), ("c", "gh"), ("def", "cdea"), ("gh", "b")]


def labelled(toy, micro):
  others = [answer for _, answer in [*REJECTED[1:], REJECTED[0]]]
  crossed = [(p, a) for (p, _), a in zip(CHOSEN, others, strict=True)]
  return LabelledBatch(
    text=toy.text_batch(CHOSEN, 8, micro),
    desirable=np.array([1, 0, 1, 0], bool).reshape(-1, micro),
    group=np.array([0, 0, 1, 1]).reshape(-1, micro),
    mismatched=toy.text_batch(crossed, 8, micro),
  )


def test_what_is_stored_counts_and_nothing_else(toy):
  """Numbers that are wrong show in the rewards; nothing else is looked at."""
  cfg = KTOConfig(steps=1, optimizer=STEADY, beta=0.5)
  model, params = toy.build()
  run = toy.run(cfg, model, params)
  batch = labelled(toy, 4)
  update = run.jit(kto.make_update(run))

  def rewards(shift):
    logps = jnp.full((1, 4), float(shift))
    texts = {
      name: dataclasses.replace(getattr(batch, name), reference_logps=logps)
      for name in ("text", "mismatched")
    }
    found = update(run.state, dataclasses.replace(batch, **texts), run.key)[1]
    return float(found["rewards/chosen"])

  assert rewards(-30) - rewards(-50) == pytest.approx(-0.5 * 20, rel=1e-5)
