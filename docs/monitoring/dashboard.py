"""The Grafana dashboard: is anybody's money not where it belongs, does the service work, what does it cost?"""

from collections.abc import Iterator
from dataclasses import dataclass

from grafana_foundation_sdk.builders import common, prometheus, stat, timeseries
from grafana_foundation_sdk.builders import dashboard as build
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as display
from grafana_foundation_sdk.models import dashboard as model

_JOB = 'job=~"$job"'
_EVERY = "$__rate_interval"


@dataclass(frozen=True)
class Panel:
    """One question, and its answer.

    Attributes:
        about: What it means, in a sentence or two.
        queries: PromQL, and the name of what comes out.
        limits: A number (`stat`) from which on it is orange, and one from which on it is red.
        stacked: Whether what comes out adds up to something.
    """

    title: str
    about: str
    queries: dict[str, str]
    unit: str = "short"
    width: int = 8
    limits: tuple[float, float] | None = None
    stacked: bool = False
    decimals: int | None = None


def _m(metric: str, **labels: str) -> str:
    """A metric of ours, of the chosen jobs; a value with a bar in it is a choice."""
    chosen = [_JOB]
    chosen += [f'metered_billing_{name}{"=~" if "|" in value else "="}"{value}"' for name, value in labels.items()]
    return f"metered_billing_{metric}{{{', '.join(chosen)}}}"


def _rate(metric: str, by: str, **labels: str) -> str:
    names = ", ".join(name if name == "le" else f"metered_billing_{name}" for name in by.split())
    summed = f"sum by ({names})" if by else "sum"
    return f"{summed} (rate({_m(metric, **labels)}[{_EVERY}]))"


def _quantiles(metric: str, by: str, **labels: str) -> dict[str, str]:
    """The median, and what one in a hundred takes longer than."""
    legend = " ".join(f"{{{{metered_billing_{name}}}}}" for name in by.split())
    rates = _rate(metric, f"{by} le", **labels)
    return {f"p{name} {legend}": f"histogram_quantile({share}, {rates})" for name, share in ((50, 0.5), (99, 0.99))}


def _in_range(event: str) -> str:
    return f"sum(increase({_m('anomalies_total', event=event)}[$__range]))"


MONEY_NOW = [
    Panel(
        "Oldest refund or void that is due",
        "How long a customer has been waiting for credits.",
        {"age": f"max({_m('unsettled_age_seconds', charge_state='refunding|voiding')})"},
        unit="s",
        width=4,
        limits=(300, 3_600),
    ),
    Panel(
        "Refunds and voids due",
        "Charges whose credits are on their way back. A few that come and go are what billing looks like.",
        {"due": f"sum({_m('unsettled', charge_state='refunding|voiding')})"},
        width=4,
    ),
    Panel(
        "Disputed",
        "Charges that only a person can decide, new in the time shown.",
        {"disputed": _in_range("charge.disputed")},
        width=4,
        limits=(0.5, 10),
        decimals=0,
    ),
    Panel(
        "Drift",
        "Differences between the journal and the credits service, at the last comparison. Should be 0.",
        {"differences": "sum(metered_billing_reconcile_differences)"},
        width=4,
        limits=(1, 1),
    ),
    Panel(
        "Last comparison",
        "How long ago `reconcile` has last compared all of it. It should run every hour.",
        {"ago": "time() - min(metered_billing_reconcile_timestamp_seconds)"},
        unit="s",
        width=4,
        limits=(7_200, 10_800),
    ),
    Panel(
        "Mismatches",
        "Responses that did not report what was paid for, in the time shown.",
        {"mismatches": _in_range("charge.outcomes_mismatch|charge.outcomes_unreadable|charge.outcomes_raised")},
        width=4,
        limits=(0.5, 10),
        decimals=0,
    ),
]

MONEY = [
    Panel(
        "Charges that are not final",
        "`deducted` is work under way. `refunding` and `voiding` are credits on their way back.",
        {"{{metered_billing_charge_state}}": f"sum by (metered_billing_charge_state) ({_m('unsettled')})"},
        stacked=True,
    ),
    Panel(
        "Age of the oldest",
        "What grows steadily gets no answer.",
        {"{{metered_billing_charge_state}}": f"max by (metered_billing_charge_state) ({_m('unsettled_age_seconds')})"},
        unit="s",
    ),
    Panel(
        "Drift and what needs a person",
        "From `metered-billing reconcile --metrics`.",
        {
            "differences": "sum(metered_billing_reconcile_differences)",
            "for somebody to see to": "sum(metered_billing_reconcile_attention)",
        },
    ),
    Panel(
        "Events about money",
        "How often: a charge was disputed, a response did not report what was paid for, or could not be read, "
        "a charge was taken over from a living process.",
        {
            "{{metered_billing_event}}": "sum by (metered_billing_event) "
            f"(increase({_m('anomalies_total', event='charge[.].+|journal.failed|billing.bug')}[{_EVERY}]))"
        },
        width=12,
        stacked=True,
    ),
    Panel(
        "Rounds of recovery",
        "How often the journal is looked through for what is due. Each process does it every 10 s.",
        {"{{metered_billing_outcome}}": _rate("recovery_rounds_total", "outcome")},
        unit="ops",
        width=12,
    ),
]

SERVICE = [
    Panel(
        "Operations",
        "Deductions, refunds and voids a second, by how they went.",
        {
            "{{metered_billing_operation}} {{metered_billing_outcome}}": _rate(
                "operation_duration_seconds_count", "operation outcome", operation="deduct|refund|void|recover"
            )
        },
        unit="ops",
    ),
    Panel(
        "How long operations take",
        "A metered request waits for its deduction.",
        _quantiles("operation_duration_seconds_bucket", "operation", operation="deduct|refund|void"),
        unit="s",
    ),
    Panel(
        "Deductions without an answer",
        "The share of deductions that ended with 503.",
        {
            "share": f"{_rate('anomalies_total', '', event='credits.unavailable')} / "
            f"{_rate('operation_duration_seconds_count', '', operation='deduct')}"
        },
        unit="percentunit",
    ),
    Panel(
        "How long deductions take, by outcome",
        "`unknown`: no answer in time. `notsent`: never sent, as while the circuit is open.",
        _quantiles("operation_duration_seconds_bucket", "outcome", operation="deduct"),
        unit="s",
    ),
    Panel(
        "HTTP calls",
        "Single calls to the credits service, by how they went.",
        {"{{metered_billing_outcome}}": _rate("operation_duration_seconds_count", "outcome", operation="attempt")},
        unit="ops",
    ),
    Panel(
        "Retries",
        "Calls after the first.",
        {"{{metered_billing_operation}}": _rate("retries_total", "operation")},
        unit="ops",
    ),
    Panel(
        "Circuit",
        "0 closed, 1 half-open, 2 open: while it is open metered routes answer 503 at once.",
        {"{{job}} {{instance}}": f"max by (job, instance) ({_m('breaker_state')})"},
    ),
    Panel(
        "Changes of the circuit",
        "How often it became open, half-open or closed.",
        {
            "{{metered_billing_breaker_state}}": "sum by (metered_billing_breaker_state) "
            f"(increase({_m('breaker_changes_total')}[{_EVERY}]))"
        },
        stacked=True,
    ),
    Panel(
        "Token, configuration, crowds",
        "How often the service refused the token, the app's own billing functions were wrong, or too many were waiting"
        " for the service.",
        {
            "{{metered_billing_event}}": "sum by (metered_billing_event) "
            f"(increase({_m('anomalies_total', event='credits.token_rejected|billing.misconfigured')}[{_EVERY}]))",
            "crowded out": f"sum (increase({_m('crowded_out_total')}[{_EVERY}]))",
        },
        stacked=True,
    ),
    Panel(
        "How long commits take",
        "Commits that were synced to disk, of the journal and of the ledger. Two of the journal's are in each request.",
        _quantiles("commit_duration_seconds_bucket", "store"),
        unit="s",
    ),
    Panel(
        "Size of commits",
        "Operations that one such commit carries, on average: it grows with the load.",
        {"{{metered_billing_store}}": f"{_rate('commit_size_sum', 'store')} / {_rate('commit_size_count', 'store')}"},
    ),
    Panel(
        "Size of batches",
        "Operations that come to the credits service in one batch, and that one call of an app carries, on average.",
        {
            "in a batch": f"{_rate('ledger_batch_size_sum', '')} / {_rate('ledger_batch_size_count', '')}",
            "in a call": f"{_rate('batch_size_sum', '')} / {_rate('batch_size_count', '')}",
        },
    ),
    Panel(
        "Ledger operations",
        "What the credits service did, by how it went.",
        {
            "{{metered_billing_operation}} {{metered_billing_outcome}}": _rate(
                "ledger_operation_duration_seconds_count", "operation outcome"
            )
        },
        unit="ops",
        width=12,
    ),
    Panel(
        "How long ledger operations take",
        "Until they are decided and committed.",
        _quantiles("ledger_operation_duration_seconds_bucket", "operation"),
        unit="s",
        width=12,
    ),
]

COST = [
    Panel(
        "Credits in the time shown",
        "Deducted = kept + refunded + pending. Voided is what had been deducted without an answer.",
        {"{{metered_billing_kind}}": f"sum by (metered_billing_kind) (increase({_m('credits_total')}[$__range]))"},
        width=12,
        decimals=0,
    ),
    Panel(
        "Share refunded, in the time shown",
        "What customers got back because it failed.",
        {
            "refunded": f"sum(increase({_m('credits_total', kind='refunded')}[$__range])) / "
            f"sum(increase({_m('credits_total', kind='deducted')}[$__range]))"
        },
        unit="percentunit",
        width=6,
        limits=(0.1, 0.3),
    ),
    Panel(
        "402s in the time shown",
        "Requests that were refused because the account held too little.",
        {
            "402": "sum(increase("
            f"{_m('operation_duration_seconds_count', operation='deduct', outcome='declined')}[$__range])) or vector(0)"
        },
        width=6,
        decimals=0,
    ),
]

COST_OVER_TIME = [
    Panel(
        "Credits a second",
        "Deducted, kept, refunded and voided.",
        {"{{metered_billing_kind}}": _rate("credits_total", "kind")},
    ),
    Panel(
        "Share refunded",
        "Of what is deducted. After an outage it is above what fails: refunds that had to wait go out together.",
        {"refunded": f"{_rate('credits_total', '', kind='refunded')} / {_rate('credits_total', '', kind='deducted')}"},
        unit="percentunit",
    ),
    Panel(
        "402s a second",
        "Requests that were refused because the account held too little: customers who would buy more.",
        {
            "402": f"{_rate('operation_duration_seconds_count', '', operation='deduct', outcome='declined')} "
            "or vector(0)"
        },
        unit="ops",
    ),
]


def text() -> str:
    """The dashboard as JSON."""
    ids = iter(range(1, 1_000))
    board = (
        build.Dashboard("Metered billing")
        .uid("metered-billing")
        .description("Credits: whose money is not where it belongs, does the service work, what does it cost.")
        .tags(["metered-billing"])
        .editable()
        .refresh("30s")
        .time("now-6h", "now")
        .tooltip(model.DashboardCursorSync.CROSSHAIR)
        .with_variable(build.DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(_jobs())
    )
    for title, numbers, curves in (
        ("Money", MONEY_NOW, MONEY),
        ("Service", [], SERVICE),
        ("Cost", COST, COST_OVER_TIME),
    ):
        board = board.with_row(build.Row(title).id(next(ids)))
        for panel in numbers:
            board = board.with_panel(_stat(panel).id(next(ids)))
        for panel in curves:
            board = board.with_panel(_curves(panel).id(next(ids)))
    return JSONEncoder(sort_keys=True, indent=2).encode(board.build()) + "\n"


def _jobs() -> build.QueryVariable:
    return (
        build.QueryVariable("job")
        .label("Job")
        .query('label_values({__name__=~"metered_billing_.+"}, job)')
        .datasource(_source())
        .refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(model.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(model.VariableOption(text="All", value="$__all", selected=True))
    )


def _source() -> model.DataSourceRef:
    return model.DataSourceRef(type_val="prometheus", uid="${datasource}")


def _queries(panel: Panel) -> Iterator[prometheus.Dataquery]:
    for letter, (legend, expr) in zip("ABCDEF", panel.queries.items(), strict=False):
        yield prometheus.Dataquery().ref_id(letter).expr(expr).legend_format(legend).datasource(_source())


def _limits(panel: Panel) -> build.ThresholdsConfig:
    steps = [model.Threshold(value=None, color="green" if panel.limits else "text")]
    if panel.limits is not None:
        orange, red = panel.limits
        steps += [model.Threshold(value=orange, color="orange")] if orange < red else []
        steps += [model.Threshold(value=red, color="red")]
    return build.ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE).steps(steps)


def _stat(panel: Panel) -> stat.Panel:
    made = (
        stat.Panel()
        .title(panel.title)
        .description(panel.about)
        .datasource(_source())
        .unit(panel.unit)
        .no_value("no data")
        .height(4)
        .span(panel.width)
        .thresholds(_limits(panel))
        .color_mode(display.BigValueColorMode.VALUE)
        .graph_mode(display.BigValueGraphMode.NONE)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    )
    for query in _queries(panel):
        made = made.with_target(query.instant())
    return made if panel.decimals is None else made.decimals(panel.decimals)


def _curves(panel: Panel) -> timeseries.Panel:
    stacking = display.StackingMode.NORMAL if panel.stacked else display.StackingMode.NONE
    made = (
        timeseries.Panel()
        .title(panel.title)
        .description(panel.about)
        .datasource(_source())
        .unit(panel.unit)
        .min(0)
        .height(8)
        .span(panel.width)
        .fill_opacity(25 if panel.stacked else 8)
        .show_points(display.VisibilityMode.NEVER)
        .stacking(common.StackingConfig().mode(stacking))
        .legend(
            common.VizLegendOptions()
            .show_legend(True)
            .display_mode(display.LegendDisplayMode.LIST)
            .placement(display.LegendPlacement.BOTTOM)
        )
        .tooltip(common.VizTooltipOptions().mode(display.TooltipDisplayMode.MULTI))
    )
    for query in _queries(panel):
        made = made.with_target(query.range())
    return made
