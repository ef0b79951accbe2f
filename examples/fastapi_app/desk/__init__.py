"""The desk: where the demo's traces arrive, its switches are, and its books are read.

It runs in the supervisor's process, so that what it knows outlives an app that is killed:

- `otlp`, `collector`: the spans that app and credits service send, kept by trace, within bounds;
- `traces`, `story`: what a trace shows and tells, from its spans alone;
- `faults`: a proxy between app and service that breaks calls on demand;
- `books`: the service's ledger and the app's journal, read past the faults;
- `forwarding`: the same spans, passed on to the user's own backend;
- `routes`, `desk`: all of it over HTTP.
"""
