"""What a run needs from the machine, whatever the algorithm.

An algorithm never imports these files; `context.py` hands it functions. How
they fit together in a training loop:

```python
cache.enable_compilation_cache()
run = workdir.open_workdir(
  folder, config_dict, may_change=("checkpoint.*", "metrics.*"))
if run.finished is not None: ...                # say so, exit 0
environment.write(run.path)                     # for the report
saver = checkpoint.Checkpointer(
  run.checkpoints, every_steps=50, every_minutes=10, keep=2)
restored = saver.restore_latest(abstract_state)  # None: start anew
# restored.step, restored.state, restored.extra
log = metrics.Metrics(
  run.path, offsets=restored and restored.extra["files"],
  step=restored.step if restored else 0,         # steps already done
  tensorboard=True, trackers={"wandb": "project"}, config=config_dict)
profiler = profile.Profiler(run.profile, "10:13")
with signals.catch_signals() as stop, view.View(steps, title) as screen:
  for step in range(done, steps):                # `step` runs from 0
    seconds = {}
    with profiler.step(step):
      with profile.stage("sample", seconds): ...  # seconds["time/sample_s"]
    log.write(step + 1, measurements | seconds)   # rows count steps done
    log.write_samples(rows)
    screen.update(step + 1, measurements | seconds, rows)
    saver.check()                                # a failed save stops here
    if stop.requested or saver.due(step + 1) or step + 1 == steps:
      saver.save(step + 1, state, {"files": log.offsets()})
    if stop.requested: break
saver.close(); log.close()
report.write_report(run.path); workdir.mark_finished(run.path, {"step": steps})
sys.exit(stop.exit_status)                       # 0, 130 or 143
```
"""
