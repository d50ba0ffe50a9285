"""Tests of molae_compress."""
