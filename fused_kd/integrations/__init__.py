"""Losses and trainers for the frameworks in which people distil; import the one that you use.

Nothing is imported here. A module that calls or subclasses its framework asks for it at its import;
one that only has a framework's signature (frameworks.py says which) works without it.
"""
