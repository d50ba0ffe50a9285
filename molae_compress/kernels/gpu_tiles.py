"""How the GPU kernels are cut: tiles by number of rows, blocks of the sort, and when a call counts as one of few tokens.

Plain numbers that the launcher for torch, the ahead-of-time build and, through the table it writes, the C++ launcher share.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

ACTIVATIONS = ("identity", "silu", "gelu", "gelu_tanh", "relu", "relu2")
MAX_GROUPS = 1024
MAX_RANK = 65535
FEW_TOKENS = 4
"""Up to here slots are worked on one by one: their experts hardly repeat, so no weight is read twice in vain."""

SORT_BLOCK = 128
SCAN_CHUNK = 2048
COLUMNS_BLOCK = 512
COMBINE_BLOCK = 1024


@dataclass(frozen=True)
class Tile:
    """One way to cut a grouped product.

    Attributes:
        name: as in the table of kernels.
        rows: BM.
        columns: of the product; BN is half of them where there are gate and up.
        depth: BK.
        warps: of a program.
        stages: of its software pipeline.
        resident: programs that a multiprocessor is given.
        from_rows: rows per group from which on it is used.
    """

    name: str
    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    resident: int
    from_rows: int

    def columns_of(self, gated: bool) -> int:
        """BN: columns of the output."""
        return self.columns // 2 if gated else self.columns


SMALL = Tile("small", 16, 64, 128, 4, 4, 3, 0)
MEDIUM = Tile("medium", 64, 128, 64, 4, 3, 2, 24)
LARGE = Tile("large", 128, 128, 64, 8, 3, 1, 96)
TILES = (SMALL, MEDIUM, LARGE)
GATHERED = Tile("gathered", 64, 128, 32, 4, 3, 2, 0)
"""For inputs whose columns are picked one by one: a shallow tile, because each number passes through a register."""

EXACT = Tile("exact", 32, 64, 32, 4, 3, 2, 0)
"""For fp32, which is multiplied in fp32 without tensor cores; compiled for torch only."""

FEW_COLUMNS, FEW_DEPTH = 16, 256
"""Tile of a product of single rows whose matrices are contiguous along the input: 8 kB, in rows of 512 bytes."""

FEW_COLUMNS_TRANSPOSED, FEW_DEPTH_TRANSPOSED = 32, 128
"""The same for matrices that are contiguous along the output: narrow, so that one expert keeps many programs busy."""

FEW_STAGES = 3
FEW_WARPS = 4
ONE_GROUP_WARPS = 8
"""Of programs that sum a token's rows before they multiply: fewer numbers a thread, or some go to local memory."""


def few_tile(transposed: bool) -> tuple[int, int]:
    """(BN, BK) of a product of single rows."""
    return (FEW_COLUMNS_TRANSPOSED, FEW_DEPTH_TRANSPOSED) if transposed else (FEW_COLUMNS, FEW_DEPTH)


def tile_for(rows: int, groups: int, *, gathered: bool = False, exact: bool = False) -> Tile:
    """The tile for `rows` rows that lie in at most `groups` groups, of which each that is hit has as many."""
    if exact:
        return EXACT
    if gathered:
        return GATHERED
    mean = rows / max(1, min(groups, rows))
    return next(tile for tile in reversed(TILES) if mean >= tile.from_rows)


def fitted(tile: Tile, architecture: int, *, gated: bool) -> Tile:
    """The tile as an architecture (90: compute capability 9.0) wants it; its rows stay as they are.

    A wide tile reads less from the L2 cache for each product, where there are registers for it. More warps on sm_100 and a
    shallower tile on sm_120 keep registers from being spilled.
    """
    if tile is LARGE and architecture == 90 and not gated:
        return replace(tile, columns=2 * tile.columns)
    if tile is MEDIUM and 100 <= architecture < 120:
        return replace(tile, warps=8)
    if tile in (MEDIUM, LARGE) and architecture >= 120:
        return replace(tile, depth=tile.depth // 2, stages=tile.stages + 1)
    return tile


def programs_for(tile: Tile, rows: int, groups: int, columns: int, gated: bool, multiprocessors: int) -> int:
    """How many persistent programs to launch: never more than there can be tiles."""
    tiles = (-(-rows // tile.rows) + min(groups, rows)) * -(-columns // tile.columns_of(gated))
    return max(1, min(tiles, multiprocessors * tile.resident))


def steps_for(rank: int) -> int:
    """Halvings that find a place among `rank` pivots."""
    return rank.bit_length()


def bins_for(experts: int) -> int:
    """Bins of the histogram: the experts and one for slots of none, as a power of two of at least 16."""
    return max(16, 1 << experts.bit_length())
