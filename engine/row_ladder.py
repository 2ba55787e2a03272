"""How many rows a kernel may be given, so that no row's bits depend on how many there are.

A matrix kernel picks its order of summation by the number of rows, so a row alone and the same row
among others may differ in their last bits. Owns the ladder: a few row counts at which this machine
was seen to treat every row alike, and the cutting of any number of rows into such counts. It
measures kernels that it is handed and knows neither models nor attention.

Shape legend: M rows of one call, P probe rows, K elements of a row, X elements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engine.models.errors import NotReproducible

# From the third on no more than a third of a step is lost to padding. 256 rows keep the matrix
# units as busy as 512 do (measured: 2 x 256 rows cost what 512 do), so longer runs are cut there.
SIZES = (4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
NUM_PROBES = 16  # four calls of the smallest size; a size of 256 sees each probe at 16 places
# More than the grain of 32,768 elements from which torch divides work among threads, and no
# multiple of a vector's length, so that ends of vectors fall everywhere.
_NUM_ELEMENTS = 70_001
_PIECES = (1, 3, 8, 17, 33, 250)
# Bytes: results may depend on where memory lies within a cache line. Torch's own memory begins on
# one; a slice may not.
ALIGNMENT = 64


class Tile(NamedTuple):
    """Rows [start, end), to be computed in a call with `size` rows."""

    start: int
    end: int
    size: int


def tiles(num_rows: int, ladder: Sequence[int]) -> list[Tile]:
    """Cut rows into tiles of the largest size, and round the rest up to a size of the ladder."""
    largest = ladder[-1]
    whole = num_rows - num_rows % largest
    cut = [Tile(start, start + largest, largest) for start in range(0, whole, largest)]
    if whole < num_rows:
        size = next(size for size in ladder if size >= num_rows - whole)
        cut.append(Tile(whole, num_rows, size))
    return cut


def verify(
    name: str, kernel: Callable[[Tensor], Tensor], probes_PK: Tensor, sizes: Sequence[int] = SIZES
) -> tuple[int, ...]:
    """Return the sizes at which every row, wherever it stands, has the bits of the smallest size.

    `kernel` maps rows to as many rows; what the probes hold must be such that another order of
    summation shows. Raises NotReproducible if the smallest size already depends on the place.
    """
    smallest = sizes[0]
    head_MK = probes_PK[:smallest]
    right = torch.cat([kernel(rows_MK.clone()) for rows_MK in torch.split(probes_PK, smallest)])
    for shift in range(1, smallest):
        if not torch.equal(kernel(head_MK.roll(shift, 0)), right[:smallest].roll(shift, 0)):
            raise NotReproducible(
                f"batch invariance: {name} gives a row other bits at another place of {smallest}",
                "leave out --batch-invariant, or use another build of torch",
            )
    index_of = {size: torch.arange(size, device=right.device) % len(right) for size in sizes[1:]}
    agreed = (
        s for s, at_M in index_of.items() if torch.equal(kernel(probes_PK[at_M]), right[at_M])
    )
    return (smallest, *agreed)


def check_elementwise(function: Callable[[Tensor], Tensor], probes_X: Tensor) -> None:
    """Raise NotReproducible if an element's bits depend on the elements around it.

    The end of a run that fills no whole vector may be computed by other code than the rest.
    """
    right_X = function(probes_X)
    for length in _PIECES:
        pieces = torch.split(probes_X[: 64 * length], length)
        found_X = torch.cat([function(piece_X.clone()) for piece_X in pieces])
        if not torch.equal(found_X, right_X[: len(found_X)]):
            raise NotReproducible(
                f"batch invariance: {function.__name__} gives an element other bits at the end of"
                " a row",
                "leave out --batch-invariant, or use another build of torch",
            )


def elementwise_probes(scale: float, device: torch.device) -> Tensor:
    """Return fp32 numbers for `check_elementwise`."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(_NUM_ELEMENTS, generator=generator).mul_(scale).to(device)
