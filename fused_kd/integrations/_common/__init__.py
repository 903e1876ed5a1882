"""Helpers that the modules of the frameworks share; private."""
