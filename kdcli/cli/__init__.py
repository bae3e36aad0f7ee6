"""The command line: parse, call a step, print its result. Nothing imports this package."""
