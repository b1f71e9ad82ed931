"""A file to each command of `mptrain`."""
