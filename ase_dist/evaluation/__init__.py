"""Decoding of predictions, metrics, boundary F, Delta_m, the constant predictor and tables of scores.

Import from the modules: ``decode``, ``metrics``, ``constant``, ``delta_m``, ``boundary``, ``comparison``, ``tables``.
This file imports none of them, because the worker processes of ``boundary`` import this package and need no torch.
"""
