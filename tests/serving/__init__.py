"""Tests of serving with a real vLLM: `make test-serving` runs them in an environment of their own.

Where vLLM is not installed they are not collected.
"""
