"""What a run needs from the machine: its folder, checkpoints, logs, signals.

Nothing here knows a method, a model or a class of configs.
"""
