"""What a run and a recipe look like to a reader: reports, model cards, reference pages."""

from molae_compress.report.card import model_card, scratch_card
from molae_compress.report.report import (
    CalibrationReport,
    LayerReport,
    Report,
    file_hashes,
    installed_versions,
    warnings_for,
)

__all__ = [
    "CalibrationReport",
    "LayerReport",
    "Report",
    "file_hashes",
    "installed_versions",
    "model_card",
    "scratch_card",
    "warnings_for",
]
