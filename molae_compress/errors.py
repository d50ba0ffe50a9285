"""Every refusal of the package is a `MolaeError`: what happened, why, and what to do about it.

Subclasses say which part of the work refused, so that a program can tell them apart; the message is for people and always
holds the offending value. `assert` is used in this package for invariants of our own only, never for input.
"""

from __future__ import annotations


def human_bytes(count: int) -> str:
    """`12.34 GB`, in powers of 1000: sizes as messages and tables show them."""
    for unit, scale in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count} B"


class MolaeError(Exception):
    """Base of all errors that a user can meet.

    Args:
        what: one sentence, with the offending value in it.
        why: the reason, if it is not plain from `what`.
        remedy: what the reader can do now.
    """

    def __init__(self, what: str, *, why: str = "", remedy: str = "") -> None:
        self.what, self.why, self.remedy = what, why, remedy
        super().__init__(" ".join(part for part in (what, why, remedy) if part))


class RecipeError(MolaeError):
    """The recipe cannot be read, or asks for something impossible."""


class ModelError(MolaeError):
    """The model has no routed experts we understand, or differs from its configuration."""


class CheckpointError(MolaeError):
    """Files on disk are missing, damaged, of an unsupported format, or cannot be written."""


class DataError(MolaeError):
    """Calibration or evaluation text cannot be used."""


class ResumeError(MolaeError):
    """A work directory or output folder belongs to another run."""


class QualityGateError(MolaeError):
    """A quality gate of the recipe failed; the artifact is complete (exit code 3)."""


class ExportError(MolaeError):
    """The model cannot be exported, its export differs from it, or an exported model cannot be run."""


class KernelError(MolaeError):
    """The operator library is missing, out of date, or cannot be compiled or loaded."""
