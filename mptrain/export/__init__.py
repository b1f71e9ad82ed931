"""A folder to each format. `base` is the contract (Format, Runner, Facts), `formats` the table of them."""
