"""``flashsloth ablate``: what each way to compress, and the embedded queries, are worth at the same budget."""
