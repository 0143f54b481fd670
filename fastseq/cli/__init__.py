"""The command line, ``python -m fastseq info | check | bench | demo | lm``: one module per command.

Each command module has ``add_parser(commands)``, which declares its arguments, and ``run(args)``, which returns the
exit status. ``fastseq.cli.console`` holds what they share.
"""
