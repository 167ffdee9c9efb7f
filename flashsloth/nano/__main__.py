"""``python -m flashsloth.nano``: see :mod:`flashsloth.nano.recipe`."""

import argparse

import torch

from flashsloth.nano import recipe

torch.set_flush_denormal(True)  # as `flashsloth train` does, before there are threads

parser = argparse.ArgumentParser(prog="python -m flashsloth.nano", description="Train flashsloth-nano from nothing.")
recipe.add_arguments(parser)
recipe.main(parser.parse_args())
