"""The commands of ``python -m torus_model field``.

Each module has ``HELP``, ``add_arguments(parser)`` and ``prepare(options)``, which checks the options and returns a
function that does the work.
"""
