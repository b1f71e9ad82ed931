"""The ground that everything stands on; imports nothing of ours.

errors (what a user sees, and exit statuses), disk (whole folders, JSON, locks, hashes, the cache folder), host (CPU,
threads, memory), native (C code compiled on first use), patch and pins (other packages' private parts, fenced),
silence and console (what is printed), hooks (forward hooks of compressors), signature (names and axes of inputs).
"""
