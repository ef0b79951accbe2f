"""Every span, attribute, metric and log event by its name: `telemetry` and the service emit nothing else.

What each means, its type, its unit and an example: docs/reference/telemetry.md. Where OpenTelemetry's semantic
conventions have a name for something, it is theirs.
"""

from typing import Final

SCOPE: Final = "metered_billing"
SERVICE_SCOPE: Final = "metered_billing.service"

# Spans.
SPAN_CHARGE: Final = "metered_billing.charge"
SPAN_DEDUCT: Final = "metered_billing.deduct"
SPAN_REFUND: Final = "metered_billing.refund"
SPAN_VOID: Final = "metered_billing.void"
SPAN_RECOVER: Final = "metered_billing.recover"
SPAN_LEDGER_DEDUCT: Final = "metered_billing.ledger.deduct"
SPAN_LEDGER_REFUND: Final = "metered_billing.ledger.refund"
SPAN_LEDGER_VOID: Final = "metered_billing.ledger.void"
SPAN_LEDGER_GRANT: Final = "metered_billing.ledger.grant"

# Attributes of spans and metrics: ours.
CHARGE_ID: Final = "metered_billing.charge.id"
CHARGE_STATE: Final = "metered_billing.charge.state"
TENANT_ID: Final = "metered_billing.tenant.id"
USER_ID: Final = "metered_billing.user.id"
REQUEST_ID: Final = "metered_billing.request.id"
TRANSACTION_ID: Final = "metered_billing.transaction.id"
AMOUNT: Final = "metered_billing.amount"
UNITS: Final = "metered_billing.units"
KEPT: Final = "metered_billing.kept"
REFUNDED: Final = "metered_billing.refunded"
BALANCE: Final = "metered_billing.balance"
ITEMS: Final = "metered_billing.items"
OUTCOME: Final = "metered_billing.outcome"
REASON: Final = "metered_billing.reason"
TRIES: Final = "metered_billing.tries"
MISMATCH: Final = "metered_billing.outcomes_mismatch"
UNREADABLE: Final = "metered_billing.outcomes_unreadable"
OPERATION: Final = "metered_billing.operation"
STATUS_CODE: Final = "metered_billing.status_code"
REPLAYED: Final = "metered_billing.replayed"
KIND: Final = "metered_billing.kind"
EVENT: Final = "metered_billing.event"
BREAKER_STATE: Final = "metered_billing.breaker.state"
BATCH_SIZE: Final = "metered_billing.batch.size"
STORE: Final = "metered_billing.store"

# And OpenTelemetry's.
ERROR_TYPE: Final = "error.type"
HTTP_METHOD: Final = "http.request.method"
HTTP_RESEND_COUNT: Final = "http.request.resend_count"
HTTP_STATUS_CODE: Final = "http.response.status_code"
SERVER_ADDRESS: Final = "server.address"
SERVER_PORT: Final = "server.port"
URL_FULL: Final = "url.full"

# Metrics.
METRIC_DURATION: Final = "metered_billing.operation.duration"
METRIC_CREDITS: Final = "metered_billing.credits"
METRIC_RETRIES: Final = "metered_billing.retries"
METRIC_ANOMALIES: Final = "metered_billing.anomalies"
METRIC_BATCH_SIZE: Final = "metered_billing.batch.size"
METRIC_CROWDED_OUT: Final = "metered_billing.crowded_out"
METRIC_BREAKER_STATE: Final = "metered_billing.breaker.state"
METRIC_BREAKER_CHANGES: Final = "metered_billing.breaker.changes"
METRIC_UNSETTLED: Final = "metered_billing.unsettled"
METRIC_UNSETTLED_AGE: Final = "metered_billing.unsettled.age"
METRIC_RECOVERY_ROUNDS: Final = "metered_billing.recovery.rounds"
METRIC_COMMIT_DURATION: Final = "metered_billing.commit.duration"
METRIC_COMMIT_SIZE: Final = "metered_billing.commit.size"
METRIC_LEDGER_DURATION: Final = "metered_billing.ledger.operation.duration"
METRIC_LEDGER_BATCH_SIZE: Final = "metered_billing.ledger.batch.size"

# The values that a metric's attribute may have.
KINDS: Final = ("deducted", "kept", "refunded", "voided")
RETRIED: Final = ("deduct", "refund", "void")
ROUNDS: Final = ("ok", "failed")
BREAKER_STATES: Final = ("closed", "half-open", "open")
"""A state's place in it is its number."""

OUTCOMES: Final = frozenset(
    {
        "ok",
        "declined",
        "notsent",
        "unknown",
        "unanswered",
        "refused",
        "journal",
        "ownership_lost",
        "cancelled",
        "4xx",
        "5xx",
        "timeout",
        "error",
    }
)
"""Of an operation, as a metric has it; a span says `error.type` in full."""

SECONDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
SIZES: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
"""The buckets of histograms; the SDK's own are made for milliseconds."""

# Log events.
LOG_COST_COMPUTED: Final = "credits.cost_computed"
LOG_DEDUCTED: Final = "credits.deducted"
LOG_DECLINED: Final = "credits.declined"
LOG_UNAVAILABLE: Final = "credits.unavailable"
LOG_REFUNDED: Final = "credits.refunded"
LOG_VOIDED: Final = "credits.voided"
LOG_POSTPONED: Final = "credits.postponed"
LOG_REJECTED: Final = "credits.token_rejected"
LOG_ROTATED: Final = "credits.token_rotated"
LOG_STALE: Final = "credits.token_stale"
LOG_SETTLED: Final = "charge.settled"
LOG_ABANDONED: Final = "charge.abandoned"
LOG_DISPUTED: Final = "charge.disputed"
LOG_RECOVERED: Final = "charge.recovered"
LOG_OWNERSHIP_LOST: Final = "charge.ownership_lost"
LOG_MISMATCH: Final = "charge.outcomes_mismatch"
LOG_UNREADABLE: Final = "charge.outcomes_unreadable"
LOG_READER_RAISED: Final = "charge.outcomes_raised"
LOG_JOURNAL_FAILED: Final = "journal.failed"
LOG_RESUMED: Final = "recovery.resumed"
LOG_MISCONFIGURED: Final = "billing.misconfigured"
LOG_BUG: Final = "billing.bug"

ANOMALIES: Final = (
    LOG_DISPUTED,
    LOG_MISMATCH,
    LOG_UNREADABLE,
    LOG_READER_RAISED,
    LOG_OWNERSHIP_LOST,
    LOG_UNAVAILABLE,
    LOG_REJECTED,
    LOG_JOURNAL_FAILED,
    LOG_MISCONFIGURED,
    LOG_BUG,
)
"""Events that are counted, because somebody should look at them."""

ITEMS_SHOWN: Final = 20
"""How many of the failed items a span or a log line names."""
