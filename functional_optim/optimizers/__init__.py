"""Presets: functions with the field's names that return chains of public transforms."""

from typing import TYPE_CHECKING

from functional_optim._messages import no_attribute
from functional_optim.optimizers._adam import adam, adamw
from functional_optim.optimizers._sgd import sgd

__all__ = ["adam", "adamw", "sgd"]

if not TYPE_CHECKING:  # Or every wrong name would have a type.
    __getattr__ = no_attribute(__name__, __all__)
