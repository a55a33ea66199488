"""The training loop and what stands beside it: losses, schedule, engine, checkpoints, logs, pictures, plots."""
