"""Launch specs and what only they need. May import trainer."""
