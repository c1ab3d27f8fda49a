"""Presets: functions with the field's names that return chains of public transforms."""

from functional_optim.optimizers._adam import adam, adamw
from functional_optim.optimizers._sgd import sgd

__all__ = ["adam", "adamw", "sgd"]
