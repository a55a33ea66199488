"""Balancing of the tasks' losses: what multiplies each of them in the sum that is trained on, step by step."""
