"""Train one vision transformer for many dense-prediction tasks with LoRA mixture-of-experts layers on DeepSpeed."""

__version__ = "0.1.0"
