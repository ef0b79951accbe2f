"""`make bench`: how fast it is, next to what people write by hand. Real processes on two cores; see `__main__`."""
