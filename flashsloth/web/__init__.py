"""``flashsloth serve``: a page on which people ask about their pictures and see where the model looks."""
