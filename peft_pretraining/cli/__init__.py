"""The command line: flags, their checks, presets."""
