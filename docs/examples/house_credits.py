"""The mapping: which calls our credits service is asked, and what its answers mean."""

from typing import Any

from metered_billing.credits.contract import (
    Account,
    Call,
    Contract,
    Declined,
    DeductAnswer,
    Deducted,
    Record,
    RefundAnswer,
    Refunded,
    Refused,
    Reply,
)


class HouseCredits(Contract):
    auth_header = "X-API-Key"
    auth_scheme = ""  # the token stands alone
    remembers_declines = False  # a reference that was declined is paid for once there are credits

    def deduction(self, record: Record) -> Call:
        body = {**who(record.account), "credits": record.amount_credits, "reference": record.id}
        return Call("POST", "/api/credits/deduct", body)

    def read_deduction(self, record: Record, reply: Reply) -> DeductAnswer:
        said = members(reply)
        if reply.status == 200 and "transactionId" in said:
            return Deducted(said["transactionId"], said.get("remainingCredits"))
        if said.get("error") == "INSUFFICIENT_CREDITS":
            return Declined(said.get("available"))
        return super().read_deduction(record, reply)  # 5xx, 401, 429, what is broken …

    def refund(self, record: Record) -> Call:
        body = {"transactionId": record.transaction_id, "credits": record.refund_credits, "reason": record.reason}
        return Call("POST", "/api/credits/refund", body)

    def read_refund(self, record: Record, reply: Reply) -> RefundAnswer:
        said = members(reply)
        if reply.status == 200 and "refundId" in said:
            return Refunded(said["refundId"], said.get("remainingCredits"))
        if said.get("error") == "ALREADY_REFUNDED" and said.get("credits") == record.refund_credits:
            return Refunded(said["refundId"])  # ours, whose answer was lost: a charge has one refund
        if said.get("error") in ("ALREADY_REFUNDED", "TOO_MUCH", "UNKNOWN_TRANSACTION"):
            return Refused(said["error"])  # for good: a person has to look
        return super().read_refund(record, reply)

    def void(self, record: Record) -> None:
        return None  # there are no voids

    def transactions(self, tenant_id: str, user_id: str | None, cursor: str | None, limit: int) -> None:
        return None  # nor a list to look in

    def balance(self, account: Account) -> Call:
        return Call("GET", "/api/credits/balance", params=who(account))

    def read_balance(self, reply: Reply) -> int | None:
        return members(reply).get("credits") if reply.status == 200 else None


def who(account: Account) -> dict[str, str]:
    user = {} if account.user_id is None else {"userId": account.user_id}
    return {"tenantId": account.tenant_id, **user}


def members(reply: Reply) -> dict[str, Any]:
    return reply.body if isinstance(reply.body, dict) else {}
