"""What every run shares: its folder, the training loop, checkpoints, processes, caches and reports.

Nothing here knows a task or a method.
"""
