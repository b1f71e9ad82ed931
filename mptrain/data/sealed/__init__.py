"""Encrypted data: keys, the cipher, the folder of shards, and what a run keeps of private examples."""
