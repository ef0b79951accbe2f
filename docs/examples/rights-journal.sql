-- In the database of the journal, which is not that of a service's ledger, by the owner of its tables, once they are there.
GRANT USAGE ON SCHEMA metered_billing TO app;
GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA metered_billing TO app;
-- And on what a later release adds.
ALTER DEFAULT PRIVILEGES IN SCHEMA metered_billing GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO app;
