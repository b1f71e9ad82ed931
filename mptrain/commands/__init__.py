"""A light file to each command of `mptrain`: HELP, add(parser), run(options), heavy imports inside `run`.

Work that is heavy stands beside it, without a command line: inspect, verify, export (whose commands are run_inspect,
run_verify, run_export), dry_run and sweep (of `recipe`). `options` are those that several commands have.
"""
