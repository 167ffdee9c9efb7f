"""Training: ``flashsloth train --config FILE``, the two stages of the paper by transformers' Trainer."""
