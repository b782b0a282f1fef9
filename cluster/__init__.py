"""Launch specs, the commands that submit them, and the checks that come first. May import trainer."""
