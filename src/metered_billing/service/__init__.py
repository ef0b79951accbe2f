"""The reference credits service: the ledger over HTTP. Needs the extra `service`; knows no biller."""

from metered_billing.service.app import create_app
from metered_billing.service.tokens import Access, InvalidTokens, Tokens

__all__ = ["Access", "InvalidTokens", "Tokens", "create_app"]
