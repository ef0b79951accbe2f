"""What docs/make_monitoring.py makes the dashboard and the alert rules of."""
