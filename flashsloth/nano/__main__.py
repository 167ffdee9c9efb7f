"""``python -m flashsloth.nano``: see :mod:`flashsloth.nano.recipe`."""

import argparse

from flashsloth.nano import recipe

parser = argparse.ArgumentParser(prog="python -m flashsloth.nano", description="Train flashsloth-nano from nothing.")
recipe.add_arguments(parser)
recipe.main(parser.parse_args())
