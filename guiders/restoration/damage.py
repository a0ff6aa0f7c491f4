"""Operators by the names and settings that the nodes have for them."""

from __future__ import annotations

from torch import Tensor

from .operators import JPEG, Blur, Downscale, Grey, Inpaint, Operator, drawn_kernel, gaussian_kernel, motion_kernel

OPERATORS = ("inpaint", "downscale", "blur", "motion blur", "JPEG", "grey")


def operator_of(
    operator: str, factor: int, method: str, kernel_size: int, blur_width: float, angle: float, quality: int,
    mask: Tensor | None = None, kernel: Tensor | None = None,
) -> Operator:  # fmt: skip
    """The operator of this name. mask [1, H, W], 1 where it hides; kernel [1, k, k, 3].

    Raises ValueError, without the name of a node, for what is missing or superfluous.
    """
    _check_sockets(operator, mask, kernel)
    if operator == "inpaint":
        return Inpaint((_single("mask", mask) < 0.5).float()[:, None])
    if operator == "downscale":
        return Downscale(factor, method)
    if operator == "blur":
        return Blur(gaussian_kernel(kernel_size, blur_width))
    if operator == "motion blur":
        return Blur(motion_kernel(kernel_size, angle) if kernel is None else drawn_kernel(_single("kernel", kernel)[0]))
    return JPEG(quality) if operator == "JPEG" else Grey()


def _check_sockets(operator: str, mask: Tensor | None, kernel: Tensor | None) -> None:
    if operator == "inpaint" and mask is None:
        raise ValueError("the operator inpaint needs a mask; connect one that is white where the picture is hidden.")
    for name, value, owner in (("mask", mask, "inpaint"), ("kernel", kernel, "motion blur")):
        if value is not None and operator != owner:
            raise ValueError(f"the {name} is for the operator {owner}, and this one is {operator}; disconnect it, or choose {owner}.")


def _single(name: str, values: Tensor) -> Tensor:
    if len(values) != 1:
        raise ValueError(f"it takes one {name} for all pictures, and this is a batch of {len(values)}.")
    return values
