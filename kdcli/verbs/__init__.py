"""The commands as functions of Python; what they do, they do as on the command line, without printing results."""
