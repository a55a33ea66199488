"""The training loop: components of a run, engine, losses, schedule, trainer, evaluation."""
