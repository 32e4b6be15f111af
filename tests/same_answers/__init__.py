"""Whether two checkouts answer alike, byte for byte: `python -m tests.same_answers --help`."""
