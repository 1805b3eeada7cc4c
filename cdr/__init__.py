"""The engine of the CDR API: reads calls out of FusionPBX's PostgreSQL and writes them as JSON, NDJSON or CSV.

It knows no web framework: whoever uses it makes a Service from Settings and hands
it on. Each file is one subject, and imports only those before it in this list:

    errors       ApiError, and which one a failure of the database is
    parsing      text of a request or a setting to values
    ranges       from and to, in a time zone
    settings     the CDR_API_* environment
    remedies     what mends a connection that fails, as lines for a root shell
    statements   queries.sql by name; placeholders and literals
    clients      who takes an answer: whether they are there, and how slow they may be
    database     connection pools, prepared statements, everything at libpq's level
    cursors      signed texts that a client hands back
    passwords    their hashes, of which few are computed at once
    requestlog   the log entry of each request; failed logins in syslog
    rates        how many requests a token may make
    service      what a worker holds, and the transaction of an answer
    selection    which calls are asked for, and their statement
    legs         which calls belong together
    accounts     accounts, tokens and the domains they open, attempts at a login
    stream       rows of COPY as a format, batch by batch
    short        few calls by a prepared statement, in one round trip
    feed         what a cursor of the feed holds
    check_calls  what flask check looks at where the calls are
    check        flask check: what an operator should know

"FACTS" in a comment stands for what FusionPBX is known to store, collected in
demo/README.md.
"""

__version__ = "1.0.0"
