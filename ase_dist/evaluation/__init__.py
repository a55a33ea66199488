"""Metrics, boundary F, Delta_m, tables and the trivial predictor: what a prediction is worth, and how it is shown.

Import from the modules: ``decode``, ``metrics``, ``constant``, ``delta_m``, ``boundary``, ``comparison``, ``tables``.
This file imports none of them, because the worker processes of ``boundary`` import it and need no torch.
"""
