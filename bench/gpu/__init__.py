"""The check of everything on one GPU: ``python -m bench gpu-check``.

``check`` runs the steps and writes one report; ``steps`` are what runs, each in a process of its own; ``cases`` is what
is timed and what must be reached; ``timing`` measures; ``report`` is the JSON and the table.
"""
