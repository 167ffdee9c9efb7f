"""Whole models, from pixels to an answer: tokens, flops, time and memory of FlashSloth and of what it competes with."""
