"""Checks for a machine with an NVIDIA GPU: python -m pytest tests/gpu

A package, so that its conftest.py is not taken for the one that other tests import names from.
"""
