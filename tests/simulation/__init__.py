"""The whole system in one process under virtual time, with everything going wrong: see `world`, and `make simulate`."""
