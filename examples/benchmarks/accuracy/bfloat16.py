"""Products of bfloat16 matrices on a processor on which torch forms them in plain loops."""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor
from torch.library import Library

_KERNELS: list[Library] = []  # a Library that is collected takes its kernels with it


def slow_products() -> bool:
    """Return whether torch multiplies bfloat16 matrices in plain loops here, as it does on x86 without AVX-512."""
    there = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return not (there and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def round_products() -> None:
    """Form products of bfloat16 matrices on the CPU in float32 from now on, and round each result once.

    This holds for mm, bmm and addmm, which are all that the study's model needs.
    """
    if _KERNELS:
        return
    library = Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*[Oo]verrid", UserWarning)  # torch says so of the first kernel
        for name in ("mm", "bmm", "addmm"):
            kernel = functools.partial(_product, getattr(torch.ops.aten, name).out)
            library.impl(name, kernel, "CPU")  # type: ignore[no-untyped-call]
    _KERNELS.append(library)


def _product(into: torch._ops.OpOverload, *given: Tensor, **scales: float) -> Tensor:
    """Call the form of an operation that writes into a tensor, which no kernel of ours replaces."""
    dtype = given[0].dtype
    if all(x.dtype == torch.bfloat16 for x in given):
        given = tuple(x.float() for x in given)
    result: Tensor = into(*given, **scales, out=given[0].new_empty(0))
    return result.to(dtype)
