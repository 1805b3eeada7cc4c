-- The side tables of the CDR API, in a schema of their own, and the role that
-- the service logs in as. Run it as a superuser in FusionPBX's database:
--
--     sudo -u postgres psql -v ON_ERROR_STOP=1 -d fusionpbx -f schema.sql
--
-- It may be run again at any time (after an upgrade of this program it should
-- be): it changes only what is missing. It touches nothing of FusionPBX's but
-- the rights to read two of its tables, and some columns of its extensions. Needs PostgreSQL 11 or newer.
--
-- The side tables may be in a database of their own (CDR_API_ACCOUNTS_DSN). What is to
-- be made is then said before, in the same session, by -c "SET cdr_api.side_tables = 'WORD'":
--     only    in that database: the side tables, and nothing of FusionPBX's is needed
--     none    in FusionPBX's database: everything but the side tables
-- Without that word they are made beside FusionPBX's tables, unless a publication would
-- replicate them: on two nodes with rows of their own that would stop FusionPBX's replication.

BEGIN;

DO $$
BEGIN
  IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'cdr_api') THEN
    CREATE ROLE cdr_api NOLOGIN;  -- no login until it is given a password
  END IF;
END $$;

-- Compiling a statement takes longer than reading the calls of a small range.
ALTER ROLE cdr_api SET jit = off;
-- While FusionPBX's upgrade locks a table, requests are answered 503, not kept.
ALTER ROLE cdr_api SET lock_timeout = '3s';
-- The service writes its side tables wherever others are kept from writing by default.
ALTER ROLE cdr_api SET default_transaction_read_only = off;
-- A policy that hides rows from us is an error, not a shorter answer.
ALTER ROLE cdr_api SET row_security = off;

-- When a worker is killed, the statement that it had asked for ends within seconds.
DO $$
BEGIN
  IF current_setting('server_version_num')::integer >= 140000 THEN
    ALTER ROLE cdr_api SET client_connection_check_interval = '5s';
  END IF;
END $$;

CREATE SCHEMA IF NOT EXISTS cdr_api;

DO $$
DECLARE
  wanted text := coalesce(nullif(current_setting('cdr_api.side_tables', true), ''), 'beside');
  publication text := (SELECT min(pubname) FROM pg_publication WHERE puballtables);
BEGIN
  IF wanted NOT IN ('beside', 'only', 'none') THEN
    RAISE EXCEPTION 'cdr_api.side_tables must be only or none, not %', wanted;
  ELSIF wanted = 'beside' AND to_regclass('cdr_api.accounts') IS NULL AND publication IS NOT NULL THEN
    RAISE WARNING 'No side tables are made here, since the publication % takes all tables of this database.', publication
      USING HINT = 'Put them into a database of their own: docs/clusters.md.';
    RETURN;
  ELSIF wanted = 'none' THEN
    RETURN;
  END IF;

  CREATE TABLE IF NOT EXISTS cdr_api.accounts (
      account_id    integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
      name          text NOT NULL,
      email         text NOT NULL,                       -- as it was written
      email_key     text NOT NULL UNIQUE,                -- as it is compared
      password_hash text NOT NULL,
      all_domains   boolean NOT NULL DEFAULT false,
      disabled_at   timestamptz,
      created_at    timestamptz NOT NULL DEFAULT now(),
      updated_at    timestamptz NOT NULL DEFAULT now()
  );

  -- By domain_uuid: when FusionPBX renames a domain the grant goes with it, and
  -- nobody inherits a grant by taking a name that was free again.
  CREATE TABLE IF NOT EXISTS cdr_api.grants (
      account_id  integer NOT NULL REFERENCES cdr_api.accounts ON DELETE CASCADE,
      domain_uuid uuid NOT NULL,
      PRIMARY KEY (account_id, domain_uuid)
  );
  -- Grows with each grant: a cursor of the feed that knows the newest sees that one was added.
  ALTER TABLE cdr_api.grants ADD COLUMN IF NOT EXISTS grant_id bigint GENERATED ALWAYS AS IDENTITY;

  -- Only the SHA-256 digest of a token is kept.
  CREATE TABLE IF NOT EXISTS cdr_api.tokens (
      token_id     integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
      account_id   integer NOT NULL REFERENCES cdr_api.accounts ON DELETE CASCADE,
      digest       bytea NOT NULL UNIQUE,
      created_at   timestamptz NOT NULL DEFAULT now(),
      last_used_at timestamptz,                          -- true to the hour
      expires_at   timestamptz                           -- NULL: never
  );
  ALTER TABLE cdr_api.tokens ADD COLUMN IF NOT EXISTS domain_uuids uuid[];  -- NULL: all that the account may read
  ALTER TABLE cdr_api.tokens ADD COLUMN IF NOT EXISTS networks cidr[];      -- of its clients; NULL: any
  CREATE INDEX IF NOT EXISTS tokens_account_id ON cdr_api.tokens (account_id);

  -- Keys that sign what clients hand back (paging cursors).
  CREATE TABLE IF NOT EXISTS cdr_api.secrets (
      name  text PRIMARY KEY,
      value bytea NOT NULL
  );

  -- Logins by account and by client address, and registrations by client address, of
  -- which only the SHA-256 digests are kept: counted before they are made. A login is
  -- taken out again if it was right.
  CREATE TABLE IF NOT EXISTS cdr_api.attempts (
      key      bytea PRIMARY KEY,
      failures integer NOT NULL DEFAULT 1,
      next_at  timestamptz NOT NULL DEFAULT clock_timestamp()  -- no attempt before this
  );
  CREATE INDEX IF NOT EXISTS attempts_next_at ON cdr_api.attempts (next_at);

  -- That requests arrive in another way than they should, for flask check.
  DROP TABLE IF EXISTS cdr_api.notices;  -- its name before version 3
  CREATE TABLE IF NOT EXISTS cdr_api.warnings (
      name    text PRIMARY KEY,
      text    text NOT NULL,
      seen_at timestamptz NOT NULL DEFAULT now()         -- true to the hour
  );

  -- With a key, as every table here: without one PostgreSQL refuses to change it where a
  -- publication takes all tables.
  CREATE TABLE IF NOT EXISTS cdr_api.version (version integer NOT NULL);
  IF NOT EXISTS (SELECT FROM pg_constraint WHERE conrelid = 'cdr_api.version'::regclass AND contype = 'p') THEN
    ALTER TABLE cdr_api.version ADD PRIMARY KEY (version);
  END IF;
  INSERT INTO cdr_api.version VALUES (6) ON CONFLICT DO NOTHING;
  DELETE FROM cdr_api.version WHERE version <> 6;

  GRANT SELECT, INSERT, UPDATE, DELETE
     ON cdr_api.accounts, cdr_api.grants, cdr_api.tokens, cdr_api.secrets, cdr_api.attempts, cdr_api.warnings TO cdr_api;
  GRANT SELECT ON cdr_api.version TO cdr_api;
END $$;

-- Who holds the feed back: the transaction that was the first of those still
-- running to write. As its owner, since others may not see whose it is; it tells
-- no more than this.
CREATE OR REPLACE FUNCTION cdr_api.oldest_writer(OUT holder text, OUT seconds double precision)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
SELECT holder, extract(epoch FROM clock_timestamp() - begun)::double precision
  FROM (SELECT format('pid %s, role %s, %s', pid, usename, coalesce(nullif(application_name, ''), 'no name')) AS holder,
               xact_start AS begun, age(backend_xid) AS age
          FROM pg_stat_activity
         WHERE backend_xid IS NOT NULL
         UNION ALL
        SELECT format('prepared transaction %s of %s', gid, owner), prepared, age(transaction) FROM pg_prepared_xacts) AS t
 ORDER BY age DESC
 LIMIT 1
$$;
REVOKE ALL ON FUNCTION cdr_api.oldest_writer() FROM PUBLIC;
GRANT EXECUTE ON FUNCTION cdr_api.oldest_writer() TO cdr_api;

-- On which timeline the server is: the number grows with each promotion and each restore to
-- a point in time, after which transaction ids are given out again. As its owner, since others
-- may not look at files and receivers. A standby is on the newest of which it knows.
CREATE OR REPLACE FUNCTION cdr_api.timeline() RETURNS integer
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
SELECT CASE WHEN NOT pg_is_in_recovery()
            THEN ('x' || left(pg_walfile_name(pg_current_wal_insert_lsn()), 8))::bit(32)::integer
            ELSE greatest((SELECT timeline_id FROM pg_control_checkpoint()),
                          (SELECT min_recovery_end_timeline FROM pg_control_recovery()),
                          (SELECT max(received_tli) FROM pg_stat_wal_receiver),
                          (SELECT max(('x' || left(name, 8))::bit(32)::integer)
                             FROM pg_ls_waldir() WHERE name ~ '^[0-9A-F]{8}\.history$')) END
$$;

-- Where the history of a timeline left an older one, of its history file that one number;
-- NULL: nowhere, or the file is not there.
CREATE OR REPLACE FUNCTION cdr_api.timeline_end(present integer, past integer) RETURNS pg_lsn
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
SELECT split_part(line, E'\t', 2)::pg_lsn
  FROM regexp_split_to_table(
           pg_read_file('pg_wal/' || lpad(upper(to_hex(present)), 8, '0') || '.history', 0, 1048576, true), '\n') AS line
 WHERE split_part(line, E'\t', 1) = past::text
$$;
REVOKE ALL ON FUNCTION cdr_api.timeline(), cdr_api.timeline_end(integer, integer) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION cdr_api.timeline(), cdr_api.timeline_end(integer, integer) TO cdr_api;

REVOKE ALL ON SCHEMA cdr_api FROM PUBLIC;
GRANT USAGE ON SCHEMA cdr_api TO cdr_api;

-- Of FusionPBX's own tables: reading these two and some columns of a third, none of which is
-- a password, and nothing else. A CDR archive need have but the first.
DO $$
BEGIN
  IF current_setting('cdr_api.side_tables', true) = 'only' THEN
    RETURN;
  END IF;
  GRANT SELECT ON v_xml_cdr TO cdr_api;
  IF to_regclass('v_domains') IS NOT NULL THEN
    GRANT SELECT ON v_domains TO cdr_api;
  ELSE
    RAISE NOTICE 'There is no v_domains here: this database can be an archive of calls, not that of accounts.';
  END IF;
  IF to_regclass('v_extensions') IS NOT NULL THEN
    GRANT SELECT (extension_uuid, domain_uuid, extension, number_alias, effective_caller_id_name) ON v_extensions TO cdr_api;
  END IF;
END $$;

COMMIT;
