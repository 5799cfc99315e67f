"""The commands of the shell, one module each: `run(args)` parses its arguments and does the work."""
