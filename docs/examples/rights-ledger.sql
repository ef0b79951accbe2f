-- In the database of the ledger, by the owner of its tables, once they are there.
GRANT USAGE ON SCHEMA metered_billing TO credits;
GRANT SELECT, INSERT ON ALL TABLES IN SCHEMA metered_billing TO credits;
GRANT UPDATE ON metered_billing.accounts TO credits;
-- And on what a later release adds.
ALTER DEFAULT PRIVILEGES IN SCHEMA metered_billing GRANT SELECT, INSERT ON TABLES TO credits;
