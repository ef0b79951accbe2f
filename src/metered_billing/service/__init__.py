"""The reference credits service: the ledger over HTTP. Needs the extra `service`; knows no biller."""

from metered_billing.service.app import create_app
from metered_billing.service.token_file import TokenFile, open_tokens
from metered_billing.service.tokens import Access, InvalidTokens, Tokens

__all__ = ["Access", "InvalidTokens", "TokenFile", "Tokens", "create_app", "open_tokens"]
