"""Metrics, boundary F, Delta_m and the trivial predictor: what a prediction is worth.

Import from the modules: ``decode``, ``metrics``, ``constant``, ``delta_m``, ``boundary``. This file imports none of
them, because the worker processes of ``boundary`` import it and need no torch.
"""
