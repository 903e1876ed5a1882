"""Losses and trainers for the frameworks used for distillation; import the one you use.

Nothing is imported here. A module that calls or subclasses its framework needs it at import. A
module that only has a framework's signatures works without it. ``python -m fused_kd.env`` prints
the tested versions.
:mod:`.loop` and :mod:`.student_teacher` are for your own training loop. Helpers that the modules
share are in ``_common/``, which is private.
"""
