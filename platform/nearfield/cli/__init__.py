"""The command line and the local region it runs."""
