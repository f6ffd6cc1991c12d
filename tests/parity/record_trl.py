"""Records what TRL's own functions make of random tensors.

`test_trl.py` and `test_trl_steps.py` compare ours with what is written into
`tests/parity/trl/`, so that the suite needs no TRL. Run this once in each of
two environments; it records what the version it meets has (so far 0.11.4 and
1.16.0, both with torch 2.13):

  pip install trl==0.11.4 transformers==4.45.2 'accelerate<1.1' \\
    'datasets<3.2' 'peft<0.14' rich torch
  python tests/parity/record_trl.py  # ppo.json, ppo_steps.json, smoothing.json

  pip install --upgrade trl torch
  python tests/parity/record_trl.py  # preference.json, groups.json

The first is the last release with the classic PPOTrainer. No formula is
written down here: trainers are made without their `__init__`, given the few
attributes that the method at hand reads, and called. Where a method wants a
model, that is `Sum`, whose parameters are two small tables. Seeds are fixed: a
second run writes the same files.
"""

import torch
import transformers
import trl

if __name__ == "__main__":
  torch.set_num_threads(1)
  transformers.set_seed(0)  # PPOTrainer shuffles a step's rows
  if trl.__version__ == "0.11.4":
    from recording import classic as part
  else:
    from recording import current as part
  part.record()
