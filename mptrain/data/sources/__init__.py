"""Where rows come from: files (`tables`), packages, the hub; `read` picks one, `splits` makes those that lack."""
