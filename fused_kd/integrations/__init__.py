"""Losses and trainers for the frameworks used for distillation; import the one you use.

Nothing is imported here. A module that calls or subclasses its framework requires it at import. One
that only has a framework's signature (``_common/frameworks.py`` lists them) works without it.
:mod:`.loop` and :mod:`.student_teacher` are for a training loop of your own. Helpers that the
modules share are in ``_common/``, which is private.
"""
