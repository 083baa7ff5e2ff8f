"""One module per command or pair of commands; imported only when run."""
