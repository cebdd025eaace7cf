"""The command line: `ptrain`."""
