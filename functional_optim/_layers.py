"""Kinds of layers, and where in a model a parameter stands."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterator

_NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)
_DEFORMABLE = {"DeformConv2d", "ModulatedDeformConv2d"}
_TRANSPARENT = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


class Place(NamedTuple):
    """Where a parameter stands in a model.

    Attributes:
        module: The module that owns it.
        name: Its name in that module.
        prefix: The name of that module, "" for the model itself.
        in_deformable: Whether that module is a child of a deformable convolution.
    """

    module: nn.Module
    name: str
    prefix: str
    in_deformable: bool

    @property
    def full_name(self) -> str:
        """Its name in the model."""
        return f"{self.prefix}.{self.name}" if self.prefix else self.name


def is_norm(module: nn.Module) -> bool:
    """Tell whether a module is a normalization layer.

    Models bring RMS norms of their own, so those are known by the name of the class.
    """
    return isinstance(module, _NORMS) or any(
        cls.__name__.endswith("RMSNorm") for cls in type(module).__mro__
    )


def is_deformable(module: nn.Module) -> bool:
    """Tell whether a module is a deformable convolution, whoever's it is."""
    names = {cls.__name__.removesuffix("Pack") for cls in type(module).__mro__}
    return not names.isdisjoint(_DEFORMABLE)


def children_of(
    module: nn.Module, prefix: str, *, in_deformable: bool
) -> Iterator[tuple[nn.Module, str, bool]]:
    """Return the children of a module, their prefixes, and what they are children of.

    What `torch.compile`, FSDP and activation checkpointing put between a module and its
    own name does not show.

    Args:
        module: The module.
        prefix: Its name.
        in_deformable: Whether it is a child of a deformable convolution.
    """
    for name, child in module.named_children():
        if name in _TRANSPARENT:
            yield child, prefix, in_deformable
        else:
            yield child, f"{prefix}.{name}" if prefix else name, is_deformable(module)


def seen_name(name: str) -> str:
    """Return the name of a parameter as the rules see it; see `children_of`."""
    return ".".join(part for part in name.split(".") if part not in _TRANSPARENT)


def places(
    module: nn.Module, prefix: str = "", *, in_deformable: bool = False
) -> Iterator[tuple[Place, nn.Parameter]]:
    """Return all parameters and where they stand, shared ones wherever they do."""
    for name, param in module.named_parameters(recurse=False):
        yield Place(module, name, prefix, in_deformable), param
    for child in children_of(module, prefix, in_deformable=in_deformable):
        yield from places(child[0], child[1], in_deformable=child[2])


def kinds_of(place: Place, ndim: int) -> Iterator[str]:
    """Return the rules for the kind of layer that fit a parameter, by precedence."""
    module, is_bias, free = place.module, place.name == "bias", not place.in_deformable
    norm, conv = is_norm(module), isinstance(module, nn.Conv2d)
    if is_bias and free and not norm:
        yield "bias_lr_mult"
    if conv and not free and "conv_offset" in place.prefix:
        yield "dcn_offset_lr_mult"
    if norm:
        yield "norm_decay_mult"
    # Where a rule for the layer is missing, that for its bias counts, as in MMEngine.
    if is_bias and free:
        yield "bias_decay_mult"
    if isinstance(module, nn.Conv2d) and module.in_channels == module.groups:
        yield "dwconv_decay_mult"
    if ndim == 1 and free:
        yield "flat_decay_mult"
