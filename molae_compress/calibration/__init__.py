"""Calibration: from text to token windows, from windows to what each expert sees."""
