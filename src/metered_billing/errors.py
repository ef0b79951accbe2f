"""Every error that a client of a metered route can see.

    BillingError                  (a Starlette HTTPException)
    ├── AccountRequired       401  nobody to charge
    ├── InsufficientCredits   402  the account holds too little
    ├── TooManyUnits          413  more units than the route allows
    ├── CreditsUnavailable    503  no answer from the credits service
    └── BillingMisconfigured  500  our side's bug
        └── InvalidCost       500  cost, price or account gave something that is not a price

With each of them the route did not run, and nothing stays charged. An app may register a handler for any
of them; otherwise they are answered as RFC 9457 problems, whose `type` is `urn:metered-billing:NAME`.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from starlette.exceptions import HTTPException

TYPE_PREFIX = "urn:metered-billing:"


class BillingError(HTTPException):
    """The request was not charged, and its route did not run.

    Attributes:
        type: The problem's type, a URN.
        title: The same for every problem of this type.
        extra: Further members of the problem, JSON values.
    """

    status: ClassVar[int] = 500
    name: ClassVar[str] = "billing-error"
    title: ClassVar[str] = "Billing error"

    def __init__(self, detail: str, *, headers: Mapping[str, str] | None = None, **extra: Any) -> None:
        super().__init__(self.status, detail, dict(headers) if headers else None)
        self.extra = extra

    @property
    def type(self) -> str:
        return TYPE_PREFIX + self.name

    def problem(self) -> dict[str, Any]:
        """The RFC 9457 document."""
        return {
            "type": self.type,
            "title": self.title,
            "status": self.status_code,
            "detail": self.detail,
            **self.extra,
        }


class AccountRequired(BillingError):
    """`account` returned None: the request names nobody to charge."""

    status = 401
    name = "account-required"
    title = "No account to charge"

    def __init__(self) -> None:
        super().__init__(
            "This request names no account to charge. Nothing was charged.",
            headers={"WWW-Authenticate": "Bearer"},
        )


class InsufficientCredits(BillingError):
    """The account holds too few credits.

    Attributes:
        required: Credits that the request costs.
        balance: Credits that the account holds, or None where the service did not say.
        shortfall: Credits that are missing, or None likewise.
    """

    status = 402
    name = "insufficient-credits"
    title = "Too few credits"

    def __init__(self, required: int, balance: int | None) -> None:
        self.required = required
        self.balance = balance
        self.shortfall: int | None = None if balance is None else max(required - balance, 0)
        has = "fewer" if balance is None else str(balance)
        credits_ = "1 credit" if required == 1 else f"{required} credits"
        super().__init__(
            f"This request costs {credits_} and the account has {has}. Nothing was charged.",
            required=required,
            balance=balance,
            shortfall=self.shortfall,
        )


class TooManyUnits(BillingError):
    """The request asks for more units than `max_units` of its route."""

    status = 413
    name = "too-many-units"
    title = "Too many units"

    def __init__(self, units: int, max_units: int) -> None:
        super().__init__(
            f"This request asks for {units} units; at most {max_units} go into one. Nothing was charged.",
            units=units,
            max_units=max_units,
        )


class CreditsUnavailable(BillingError):
    """The credits service gave no answer that counts. Whatever it may have taken is given back.

    Attributes:
        retry_after_s: Whole seconds after which it is worth trying again.
    """

    status = 503
    name = "credits-unavailable"
    title = "Credits service unavailable"

    def __init__(self, retry_after_s: int) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(
            "Credits cannot be deducted at the moment. The request was not run; nothing stays charged.",
            headers={"Retry-After": str(retry_after_s)},
        )


class BillingMisconfigured(BillingError):
    """A bug on our side of the contract: in the app's billing functions or its credits settings.

    The client gets a general sentence; `why` is for the log.
    """

    status = 500
    name = "billing-misconfigured"
    title = "Billing is misconfigured"

    def __init__(self, why: str) -> None:
        self.why = why
        super().__init__("This request could not be priced or charged. It was not run; nothing stays charged.")

    def __str__(self) -> str:
        return self.why


class InvalidCost(BillingMisconfigured):
    """`cost`, `price` or `account` raised, or returned something that is not what it should be."""
