"""Metered billing for FastAPI and Starlette: paid first, paid for what succeeded, once."""

from metered_billing.charge import Account

__all__ = ["Account"]
