"""The commands of ``python -m torus_model`` for language models.

Each module has ``HELP``, ``add_arguments(parser)`` and ``prepare(options)``, which checks the options and returns a
function that does the work.
"""
