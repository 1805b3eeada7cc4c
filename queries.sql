-- Every statement that the service runs.
--
-- "-- name: verb_noun" begins a statement; the ";" at a line's end closes it.
-- Values are psycopg parameters, %(name)s; a percent sign is written %%, even
-- in a comment. A name in braces, {columns}, is put in by the program from its
-- own closed lists, never from a request. v_xml_cdr and v_domains are
-- FusionPBX's tables, found by search_path; the side tables of schema.sql are
-- always written with their schema, cdr_api. They may be in another database than
-- v_domains: only grants_beside and what it is put into need both in one.


-- Calls ----------------------------------------------------------------------

-- name: begin_read
-- Opens the transaction of one answer: everything in it sees one snapshot, and
-- every value is written in one way, whatever a database or role is set to.
-- The planner's rows come in the order of an index where there is one, so that
-- the first row does not wait for a sort of all of them. Calls are stored in the
-- order of their end, so an index on the domain first reads few pages twice; the
-- planner, which judges by the domain alone, would go through the whole table.
-- A policy that hides rows from us is an error, not a shorter answer.
BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY;{lock}
SET LOCAL enable_sort = %(enable_sort)s;
SET LOCAL random_page_cost = 1.1;
SET LOCAL row_security = off;
SET LOCAL DateStyle = 'ISO';
SET LOCAL extra_float_digits = 1;
SET LOCAL TimeZone = %(time_zone)s;

-- name: set_encoding
-- Text comes as it is stored, and is decoded by us.
SET LOCAL client_encoding = {encoding}

-- name: lock_calls
-- Comes before the snapshot: to a snapshot that is older than the end of an ALTER
-- TABLE that rewrites the table, the table would look empty. PostgreSQL locks no
-- foreign table and no materialized view.
LOCK TABLE v_xml_cdr IN ACCESS SHARE MODE;

-- name: touch_calls
-- No row: by the key's index of each server that a part of v_xml_cdr is on. Not by the domain: of a view that has
-- a condition on that PostgreSQL would see that there is nothing to be looked for.
-- postgres_fdw has a snapshot and locks there from now on, for as long as the transaction here lasts.
SET LOCAL enable_partition_pruning = off;
SET LOCAL constraint_exclusion = off;
SELECT FROM (SELECT NULL::uuid AS uuid, NULL::uuid AS xml_cdr_uuid) AS absent
 CROSS JOIN LATERAL (SELECT FROM v_xml_cdr AS cdr
                      WHERE uuid = '00000000-0000-0000-0000-000000000000'
                         OR xml_cdr_uuid = '00000000-0000-0000-0000-000000000000') AS calls;
SET LOCAL enable_partition_pruning TO DEFAULT;
SET LOCAL constraint_exclusion TO DEFAULT;

-- name: begin_list
-- Opens the transaction of a list of something else than calls, in which every statement
-- has a snapshot of its own.
BEGIN ISOLATION LEVEL READ COMMITTED READ ONLY;

-- name: lock_listed
-- No row: locks what {listed} reads. COPY takes its snapshot before it locks, so a table that was
-- being rewritten would look empty to it.
SELECT FROM ({listed}) AS listed LIMIT 0;

-- name: take_stream_slot
-- One row: whether the account gets a slot for another long answer: one of its
-- advisory locks (of a server, shared by all workers), which end with the transaction.
-- 1667527680 is "cdr" as the first three bytes. And whether the snapshot may have calls without a domain_uuid
-- (nameless), for which statements else need not provide.
-- alone: an index brings the rows in their order, and one process is as fast as
-- several that go through it, which take all processors of the PBX. Without the
-- index they share the search.
SELECT has_slot,
       set_config('statement_timeout', CASE WHEN has_slot THEN %(statement_timeout)s::text ELSE '1s' END, true),
       set_config('max_parallel_workers_per_gather',
                  CASE WHEN %(alone)s THEN '0' ELSE current_setting('max_parallel_workers_per_gather') END, true),
       CASE WHEN %(probed)s THEN EXISTS (SELECT FROM v_xml_cdr WHERE domain_uuid IS NULL) ELSE true END AS nameless
  FROM (SELECT EXISTS (SELECT FROM generate_series(1, %(streams)s) AS slot
                        WHERE pg_try_advisory_xact_lock(1667527680 + slot, %(account_id)s)) AS has_slot
        OFFSET 0) AS attempt;

-- name: select_calls
-- One row is one call, in the order of the key: end_stamp and xml_cdr_uuid for
-- the part "dated", xml_cdr_uuid for the others. {backwards} is DESC, or empty.
SELECT {columns}
  FROM {matching_calls} AS calls
 ORDER BY CASE WHEN %(part)s = 'dated' THEN calls.end_at END{backwards}, calls.xml_cdr_uuid{backwards}
 LIMIT %(limit)s;

-- name: select_nothing
-- No row, with the columns of select_calls: for what no call can be, which need not be planned.
SELECT {columns} WHERE false;

-- name: select_page
-- The calls of {query}, which is select_calls with told_stamp and told_uuid, of one more than the page has
-- (page_size), and read once. Before the fields of each row stands in told whether it is a call ("false": there
-- is none, and the row is empty) and, where more calls follow, the end stamp and uuid of the page's last call
-- ("-" for none). undated: a condition, whether calls without an end follow those that have one. whole: only
-- a full page is wanted, else no call. PostgreSQL keeps the page until it is known what follows,
-- and the rows come in the order in which they are kept.
WITH page AS ({query}),
head AS (
    SELECT has_more OR NOT %(whole)s AS shown,
           CASE WHEN has_more THEN (SELECT ' ' || coalesce(told_stamp, '-') || ' ' || told_uuid
                                      FROM page OFFSET %(page_size)s - 1 LIMIT 1)
                WHEN NOT %(whole)s AND %(undated)s THEN ' - -' ELSE '' END AS following
      FROM (SELECT EXISTS (SELECT FROM page OFFSET %(page_size)s) AS has_more OFFSET 0) AS counted
    OFFSET 0
)
SELECT (page.told_uuid IS NOT NULL) || head.following AS told, {columns}
  FROM head
  LEFT JOIN page ON head.shown
 LIMIT %(page_size)s;

-- name: exists
-- No statement but a condition: {query} has a row.
EXISTS ({query})

-- name: select_links
-- One row is a leg of {matching_calls}, and the channels that it names, its own among them; with channels only a leg
-- that names one of them, and no more than most. Its domain_name leaves the database as its bytes in hex, for it may
-- not be text; a bridge_uuid may be anything. Of ends only those that are a time.
SELECT xml_cdr_uuid::text AS uuid, domain_uuid::text AS domain_uuid,
       encode(convert_to(domain_name, getdatabaseencoding()), 'hex') AS domain_name,
       array_remove(named.channels, NULL) AS channels,
       CASE WHEN end_at > '1970-01-02 00:00+00' AND end_at < '9999-01-01 00:00+00' THEN end_at END AS end
  FROM {matching_calls} AS calls
 CROSS JOIN LATERAL (
       SELECT ARRAY[xml_cdr_uuid::text, originating_leg_uuid::text, cc_member_session_uuid::text,
                    CASE WHEN bridge_uuid ~ '^[0-9a-f]{{8}}(-[0-9a-f]{{4}}){{3}}-[0-9a-f]{{12}}$' THEN bridge_uuid END
                   ] AS channels) AS named
 WHERE %(channels)s::text[] IS NULL OR named.channels && %(channels)s::text[]
 LIMIT %(most)s;

-- name: as_json
-- A row of {query} is a row here, in one column of JSON. For calls that takes four
-- times as long as COPY does, but unlike COPY this can be prepared: of few calls, to
-- parse and plan all the columns takes longest.
SELECT row_to_json(found)::text AS found FROM ({query}) AS found;

-- name: begin_short
-- Opens the transaction of a short answer. It reads by one statement, whose snapshot PostgreSQL
-- takes after it has locked the table, so it needs neither one for all nor the lock of begin_read.
-- It is given up where it turns out not to be quick.
BEGIN ISOLATION LEVEL READ COMMITTED READ ONLY;

-- name: forbid_sorts
SET LOCAL enable_sort = off;

-- name: plan_once
-- Calls as_json are planned once, for all values.
SET LOCAL plan_cache_mode = force_generic_plan;

-- name: set_timeout
SET LOCAL statement_timeout = {timeout};

-- name: set_time_zone
SET LOCAL TimeZone = {time_zone};

-- name: commit
COMMIT;

-- name: prepare
PREPARE {name} AS {query};

-- name: execute_planned
EXECUTE {name};

-- name: deallocate
DEALLOCATE {name};

-- name: matching_calls
-- No statement but what all that read calls read from: one row is one call (one
-- row of v_xml_cdr) that the parameters ask for, in no order. {own_calls} are the
-- calls of the domains asked for, {written} is a condition of the feed, or empty; {more} are those
-- below that few requests have, so that the others need not parse them.
-- part: "dated" are the calls that have an end, after the key (after_stamp,
-- after_uuid); "undated" those that have none, after after_uuid; "both" is all.
-- by: from and to mean the "start" or the "end"; "" is no range. from_epoch and
-- to_epoch are bounds of the end in whole epoch seconds, wider if need be.
-- possible: false where a filter holds what the database's encoding cannot.
--
-- "absent" lists every column that some FusionPBX from 4.2 to master lacks. A
-- name that v_xml_cdr does not have resolves to the NULL out here; a name that
-- it has hides it. So one text serves every release, and the planner folds the
-- NULLs and drops the columns nobody asked for. The casts repair the types of
-- 4.x and cost nothing where the type is right.
--
-- conversation_uuid is the leg that a leg was made for, or else its own uuid. A queue's
-- caller is the member of the agents' legs.
-- {start_at}, {answer_at} and {end_at} are an instant each. Where {end_is_zoned} is not
-- so, bounds of the epoch let an index on that find the calls of a range.
-- IS TRUE keeps -infinity from the index, whose scan would begin there instead of at the key.
-- The comparison of end_at with after_stamp alone adds nothing but this: by it
-- PostgreSQL leaves out the partitions of earlier months, by that of the key not.
-- scale(x) is NULL for NaN and Infinity, and 0 for what is whole, as it nearly always
-- is: then nothing needs rounding, which takes longer than to ask.
(SELECT calls.*
  FROM (SELECT NULL::uuid AS uuid, NULL::uuid AS xml_cdr_uuid,
               NULL::text AS sip_call_id, NULL::text AS caller_destination,
               NULL::text AS record_path, NULL::text AS record_name,
               NULL::uuid AS originating_leg_uuid, NULL::boolean AS voicemail_message,
               NULL::boolean AS missed_call, NULL::uuid AS call_center_queue_uuid,
               NULL::uuid AS cc_agent_uuid, NULL::text AS cc_agent_bridged,
               NULL::numeric AS cc_queue_answered_epoch, NULL::numeric AS cc_queue_terminated_epoch,
               NULL::numeric AS cc_queue_canceled_epoch, NULL::text AS cc_cancel_reason,
               NULL::text AS cc_cause, NULL::text AS status, NULL::timestamptz AS insert_date,
               NULL::timestamptz AS update_date, NULL::numeric AS record_length,
               NULL::numeric AS hold_accum_seconds, NULL::uuid AS provider_uuid,
               NULL::uuid AS ring_group_uuid, NULL::uuid AS ivr_menu_uuid,
               NULL::text AS call_disposition) AS absent
 CROSS JOIN LATERAL (
       SELECT at.key AS xml_cdr_uuid,
              domain_uuid, extension_uuid, sip_call_id, cdr.present_name AS domain_name, accountcode, direction,
              default_language, context, caller_id_name, caller_id_number, caller_destination,
              source_number, destination_number,
              CASE WHEN scale(start_epoch::numeric) = 0 THEN start_epoch
                   WHEN scale(start_epoch::numeric) > 0 THEN trunc(start_epoch) END AS start_epoch,
              to_jsonb(at.start_at) #>> '{{}}' AS start_stamp,
              CASE WHEN at.answer_at > '1970-01-02 00:00+00' THEN to_jsonb(at.answer_at) #>> '{{}}' END AS answer_stamp,
              CASE WHEN scale(answer_epoch::numeric) = 0 THEN answer_epoch
                   WHEN scale(answer_epoch::numeric) > 0 THEN trunc(answer_epoch) END AS answer_epoch,
              CASE WHEN scale(end_epoch::numeric) = 0 THEN end_epoch
                   WHEN scale(end_epoch::numeric) > 0 THEN trunc(end_epoch) END AS end_epoch,
              CASE WHEN at.end_at > '-infinity' THEN to_jsonb(at.end_at) #>> '{{}}' END AS end_stamp,
              CASE WHEN duration IS NULL THEN 0
                   WHEN scale(duration::numeric) = 0 THEN duration
                   WHEN scale(duration::numeric) > 0 THEN round(duration) END AS duration,
              CASE WHEN mduration IS NULL THEN 0
                   WHEN scale(mduration::numeric) = 0 THEN mduration
                   WHEN scale(mduration::numeric) > 0 THEN round(mduration) END AS mduration,
              CASE WHEN billsec IS NULL THEN 0
                   WHEN scale(billsec::numeric) = 0 THEN billsec
                   WHEN scale(billsec::numeric) > 0 THEN round(billsec) END AS billsec,
              CASE WHEN billmsec IS NULL THEN 0
                   WHEN scale(billmsec::numeric) = 0 THEN billmsec
                   WHEN scale(billmsec::numeric) > 0 THEN round(billmsec) END AS billmsec,
              bridge_uuid, read_codec, read_rate, write_codec, write_rate, remote_media_ip,
              network_addr, record_path, record_name, leg, originating_leg_uuid,
              coalesce(originating_leg_uuid::text, CASE WHEN cc_side = 'agent' THEN cc_member_session_uuid::text END,
                       at.key::text) AS conversation_uuid,
              CASE WHEN scale(pdd_ms::numeric) = 0 THEN pdd_ms
                   WHEN scale(pdd_ms::numeric) > 0 THEN round(pdd_ms) END AS pdd_ms,
              CASE WHEN scale(rtp_audio_in_mos::numeric) >= 0 THEN rtp_audio_in_mos END AS rtp_audio_in_mos,
              last_app, last_arg,
              voicemail_message::text AS voicemail_message, missed_call::text AS missed_call,
              call_center_queue_uuid, cc_side, cc_member_uuid,
              CASE WHEN cc_queue_joined_epoch::text NOT IN ('NaN', 'Infinity', '-Infinity')
                   THEN split_part(cc_queue_joined_epoch::text, '.', 1) END AS cc_queue_joined_epoch,
              cc_queue, cc_member_session_uuid, cc_agent_uuid, cc_agent, cc_agent_type, cc_agent_bridged,
              CASE WHEN scale(cc_queue_answered_epoch::numeric) >= 0 THEN trunc(cc_queue_answered_epoch) END AS cc_queue_answered_epoch,
              CASE WHEN scale(cc_queue_terminated_epoch::numeric) >= 0 THEN trunc(cc_queue_terminated_epoch) END AS cc_queue_terminated_epoch,
              CASE WHEN scale(cc_queue_canceled_epoch::numeric) >= 0 THEN trunc(cc_queue_canceled_epoch) END AS cc_queue_canceled_epoch,
              cc_cancel_reason, cc_cause,
              CASE WHEN scale(waitsec::numeric) = 0 THEN waitsec
                   WHEN scale(waitsec::numeric) > 0 THEN round(waitsec) END AS waitsec,
              conference_name, conference_uuid, conference_member_id, digits_dialed, pin_number,
              hangup_cause,
              CASE WHEN scale(hangup_cause_q850::numeric) = 0 THEN hangup_cause_q850
                   WHEN scale(hangup_cause_q850::numeric) > 0 THEN trunc(hangup_cause_q850) END AS hangup_cause_q850,
              sip_hangup_disposition, xml, status,
              to_jsonb(insert_date::timestamptz) #>> '{{}}' AS insert_date,
              to_jsonb(update_date::timestamptz) #>> '{{}}' AS update_date,
              CASE WHEN scale(record_length::numeric) >= 0 THEN round(record_length::numeric) END AS record_length,
              CASE WHEN scale(hold_accum_seconds::numeric) >= 0
                   THEN round(hold_accum_seconds::numeric) END AS hold_accum_seconds,
              provider_uuid, ring_group_uuid, ivr_menu_uuid, call_disposition,
              at.start_at, at.end_at
         FROM {own_calls} AS cdr
        CROSS JOIN LATERAL (
              SELECT CASE WHEN uuid IS NULL THEN xml_cdr_uuid ELSE uuid END AS key,
                     {start_at} AS start_at, {answer_at} AS answer_at, {end_at} AS end_at) AS at
        WHERE %(possible)s
          AND (%(by)s <> 'start'
               OR at.start_at >= %(from)s::timestamptz AND at.start_at < %(to)s::timestamptz)
          AND (%(part)s <> 'dated'
               OR (at.end_at > '-infinity') IS TRUE
              AND at.end_at >= %(after_stamp)s::timestamptz
              AND (at.end_at, at.key) > (%(after_stamp)s::timestamptz, %(after_uuid)s::uuid)
              AND (%(by)s <> 'end' OR at.end_at < %(to)s::timestamptz)
              AND ({end_is_zoned}
                   OR cdr.end_epoch >= %(from_epoch)s AND cdr.end_epoch <= %(to_epoch)s
                   OR cdr.end_epoch <= 0 OR cdr.end_epoch >= 253402300800 OR cdr.end_epoch IS NULL))
          AND (%(part)s <> 'undated'
               OR (at.end_at IS NULL OR at.end_at = '-infinity')
              AND (%(after_uuid)s::uuid IS NULL OR at.key > %(after_uuid)s::uuid))
          AND (%(direction)s::text IS NULL OR cdr.direction = %(direction)s::text)
          AND (%(leg)s::text IS NULL OR cdr.leg::text = %(leg)s::text)
          AND (%(accountcode)s::text IS NULL OR cdr.accountcode = %(accountcode)s::text)
          AND (%(extension_uuid)s::uuid IS NULL OR cdr.extension_uuid = %(extension_uuid)s::uuid)
          AND (%(caller_id_name)s::text IS NULL OR cdr.caller_id_name = %(caller_id_name)s::text)
          AND (%(caller_id_number)s::text IS NULL OR cdr.caller_id_number = %(caller_id_number)s::text)
          AND (%(source_number)s::text IS NULL OR cdr.source_number = %(source_number)s::text)
          AND (%(destination_number)s::text IS NULL OR cdr.destination_number = %(destination_number)s::text)
          AND (%(hangup_cause)s::text IS NULL OR cdr.hangup_cause = %(hangup_cause)s::text)
          AND (%(status)s::text IS NULL OR status = %(status)s::text)
          AND (%(uuids)s::uuid[] IS NULL OR at.key = ANY(%(uuids)s::uuid[])){written}{more}) AS calls
 WHERE (%(answered)s::boolean IS NULL OR (coalesce(calls.billsec, 0) > 0) = %(answered)s::boolean)
   AND (%(min_billsec)s::bigint IS NULL OR coalesce(calls.billsec, 0) >= %(min_billsec)s::bigint)
   AND (%(billable_only)s::boolean IS DISTINCT FROM true
        OR coalesce(calls.leg::text, 'a') = 'a'
       AND calls.hangup_cause IS DISTINCT FROM 'LOSE_RACE'
       AND ((calls.cc_side IS DISTINCT FROM 'agent' AND calls.originating_leg_uuid IS NULL)
            OR (calls.direction = 'outbound' AND calls.billsec > 0))));

-- name: directions
-- No statement but a condition, as are those that follow: the direction is one of several.
          AND cdr.direction = ANY(%(directions)s::text[])

-- name: destination_prefix
          AND starts_with(cdr.destination_number::text, %(destination_prefix)s::text)

-- name: source_prefix
          AND starts_with(cdr.source_number::text, %(source_prefix)s::text)

-- name: before_key
-- For the part "dated" in reverse order: calls before the one that a page ended with. Of two comparisons
-- for the reason that matching_calls tells.
          AND at.end_at <= %(before_stamp)s::timestamptz
          AND (at.end_at, at.key) < (%(before_stamp)s::timestamptz, %(before_uuid)s::uuid)

-- name: before_uuid
-- The same for the part "undated".
          AND at.key < %(before_uuid)s::uuid

-- name: zoned
-- No statement but a condition, which is folded before anything is read: the column {stamp}
-- is timestamptz. The CASE, whose first arm never runs, gives the text after it the
-- column's own type; only with zones are these two the same instant.
(CASE WHEN false THEN cdr.{stamp} ELSE '2000-01-01 00:00+00' END) = '2000-01-01 01:00+01'

-- name: instant
-- No statement but a value: the instant that {stamp} and {epoch} of a call say. A stamp with
-- a zone counts; else (in 4.x, and where an upgrade left the old type) the epoch, which has
-- one meaning in all releases, where it is greater than 0; else the stamp, if it is a time
-- that a cast reads, in the service's zone if it names none. 253402300800 is the year 10000; NaN is greater than all numbers.
CASE WHEN {zoned} THEN cdr.{stamp}::timestamptz
     WHEN cdr.{epoch} > 0 AND cdr.{epoch} < 253402300800 THEN to_timestamp(cdr.{epoch}::float8)
     WHEN {readable}
     THEN (cdr.{stamp}::text || CASE WHEN cdr.{stamp}::text ~ ':.*[Z+-]' THEN ''
                                     WHEN cdr.{stamp}::text ~ ':' THEN ' ' || %(zone)s::text
                                     ELSE ' 00:00 ' || %(zone)s::text END)::timestamptz END

-- name: zoned_instant
-- No statement but a value: the same where the column is known to be timestamptz.
cdr.{stamp}

-- name: readable
-- No statement but a condition: a text is a date or a datetime that exists. Without a
-- backslash, which some databases read in another way.
(cdr.{stamp}::text !~ '^ *0000' AND cdr.{stamp}::text
  ~ ('^ *((([0-9]{{4}}-(0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|[0-9]{{4}}-(0[469]|11)-(0[1-9]|[12][0-9]|30)'
     || '|[0-9]{{4}}-02-(0[1-9]|1[0-9]|2[0-8]))'
     || '|([0-9]{{2}}(0[48]|[2468][048]|[13579][26])|([02468][048]|[13579][26])00)-02-29))'
     || '([T ]([01][0-9]|2[0-3]):[0-5][0-9](:([0-5][0-9]([.][0-9]+)?|60))?'
     || ' *(Z|[+-](0[0-9]|1[0-5])(:?[0-5][0-9])?)?)? *$'))

-- name: calls_with_uuid
-- What matching_calls reads from, for one domain, where no row lacks a domain_uuid.
-- {columns} are those of the table, with xmin for the feed.
(SELECT {columns}, (%(domain_names)s::text[])[1] AS present_name
   FROM v_xml_cdr AS cdr
  WHERE cdr.domain_uuid = %(domain_uuid)s::uuid)

-- name: calls_of_domain
-- The rows that bear its uuid, and of those without a uuid the ones that bear its name
-- (lone_name: if no other domain bears it too).
(SELECT {columns}, (%(domain_names)s::text[])[1] AS present_name
   FROM v_xml_cdr AS cdr
  WHERE cdr.domain_uuid = %(domain_uuid)s::uuid
     OR cdr.domain_uuid IS NULL AND cdr.domain_name = %(lone_name)s::text)

-- name: calls_in_parts
-- The same where an index is on domain_uuid. {order} is in_order where it brings the
-- first part so: then the two are merged, and the second, of few rows, alone is sorted.
((SELECT {columns}, (%(domain_names)s::text[])[1] AS present_name
    FROM v_xml_cdr AS cdr
   WHERE cdr.domain_uuid = %(domain_uuid)s::uuid{order})
  UNION ALL
 (SELECT {columns}, cdr.domain_name
    FROM v_xml_cdr AS cdr
   WHERE cdr.domain_uuid IS NULL AND cdr.domain_name = %(lone_name)s::text{order}))

-- name: in_order
-- No statement but the order of the key, in which the index brings a domain's calls, or its reverse.
   ORDER BY cdr.end_stamp{backwards}, CASE WHEN uuid IS NULL THEN xml_cdr_uuid ELSE uuid END{backwards}

-- name: calls_of_domains
-- The same for several: domain_names are the names of domain_uuids.
(SELECT {columns}, domains.name AS present_name
   FROM unnest(%(domain_uuids)s::uuid[], %(domain_names)s::text[]) AS domains (uuid, name)
   JOIN v_xml_cdr AS cdr ON cdr.domain_uuid = domains.uuid
  UNION ALL
 SELECT {columns}, cdr.domain_name
   FROM v_xml_cdr AS cdr
  WHERE cdr.domain_uuid IS NULL AND cdr.domain_name = ANY(%(lone_names)s::text[]))

-- name: calls_of_all
-- Every row, those of no domain too, under the name that it bears.
(SELECT {columns}, coalesce(domains.name, cdr.domain_name) AS present_name
   FROM v_xml_cdr AS cdr
   LEFT JOIN unnest(%(domain_uuids)s::uuid[], %(domain_names)s::text[]) AS domains (uuid, name)
     ON domains.uuid = cdr.domain_uuid)

-- name: calls_of_all_in_parts
-- The same by an index on domain_uuid: domain_uuids are all that any row has.
(SELECT {columns}, coalesce(domains.name, cdr.domain_name) AS present_name
   FROM unnest(%(domain_uuids)s::uuid[], %(domain_names)s::text[]) AS domains (uuid, name)
   JOIN v_xml_cdr AS cdr ON cdr.domain_uuid = domains.uuid
  UNION ALL
 SELECT {columns}, cdr.domain_name
   FROM v_xml_cdr AS cdr
  WHERE cdr.domain_uuid IS NULL)

-- name: each_domain_uuid
-- No statement but a table of one: found, each domain_uuid of a call and a NULL, by an index that is
-- looked into once for each.
WITH RECURSIVE found AS (
    (SELECT domain_uuid FROM v_xml_cdr WHERE domain_uuid IS NOT NULL ORDER BY domain_uuid LIMIT 1)
     UNION ALL
    SELECT (SELECT cdr.domain_uuid FROM v_xml_cdr AS cdr
             WHERE cdr.domain_uuid > found.domain_uuid ORDER BY cdr.domain_uuid LIMIT 1)
      FROM found
     WHERE found.domain_uuid IS NOT NULL
)

-- name: find_strays
-- One row: the domain_uuids of calls that no domain of known has, by an index that is looked
-- into once for each.
{each_domain_uuid}
SELECT coalesce(array_agg(domain_uuid::text), '{{}}') AS uuids
  FROM found
 WHERE domain_uuid <> ALL(%(known)s::uuid[]);

-- name: distinct_calls
-- The rows of {own_calls} where nothing keeps a key from being stored twice: one of each
-- key, the one that ends last, or is the longest of those. So lists, pages and sums speak of the same calls.
-- It sorts the whole domain before its first row, for in the order of the ends, in which an index would bring
-- them, a row of the same key that ends later comes only after the one that it takes the place of.
(SELECT DISTINCT ON (CASE WHEN uuid IS NULL THEN xml_cdr_uuid ELSE uuid END) cdr.*
   FROM {own_calls} AS cdr
  WHERE true{written}
  ORDER BY CASE WHEN uuid IS NULL THEN xml_cdr_uuid ELSE uuid END, cdr.end_stamp DESC NULLS LAST, cdr.end_epoch DESC,
           cdr.billsec DESC NULLS LAST, cdr.billmsec DESC NULLS LAST)

-- name: written
-- No statement but a condition of the feed: only what transactions in [low, high) wrote
-- (32 bits of their ids as text), or in [deep, high) of what ended before a boundary, if there is one;
-- low NULL: in all but those from high on.
  AND CASE WHEN %(low)s::text IS NULL
         THEN age(cdr.written_by) NOT BETWEEN 0 AND age(%(high)s::text::xid)
         WHEN %(boundary)s::timestamptz IS NOT NULL
          AND {end_at} < %(boundary)s::timestamptz AND {end_at} > '-infinity'
         THEN age(cdr.written_by) <= age(%(deep)s::text::xid) AND age(cdr.written_by) > age(%(high)s::text::xid)
         ELSE age(cdr.written_by) <= age(%(low)s::text::xid) AND age(cdr.written_by) > age(%(high)s::text::xid) END

-- name: copy_json
-- PostgreSQL's CSV writer writes JSON values: strings quoted and escaped, NULL
-- as null, cells divided by DEL, which text hardly ever holds. What CSV does not
-- escape (control characters) cdr/stream.py escapes per batch.
COPY ({query}) TO STDOUT
  (FORMAT csv, DELIMITER E'\x7f', QUOTE '"', ESCAPE E'\\', NULL 'null'{force_quote});

-- name: copy_csv
-- A line per call, the first part with a header line; NULL is empty, an empty string is "".
COPY ({query}) TO STDOUT (FORMAT csv, HEADER %(header)s);

-- name: escape_formula
-- No statement but a column of it: text that a spreadsheet would take for a
-- formula, with an apostrophe before it.
CASE WHEN {column}::text ~ '^[=+@\t\r\n-]' THEN '''' || {column} ELSE {column}::text END AS {name};

-- name: escape_rows
-- The rows of {query}, with {columns} escaped.
SELECT {columns} FROM ({query}) AS calls;

-- name: examine_session
-- One row: pid, the process that serves us; whether an index brings the calls of a
-- domain in the order of the key, or those of a range by its epochs; probed, whether it
-- does so for all of the table (a part that is a foreign table, or that inherits, has none of its indexes);
-- isolated, whether the role is set to transactions of one snapshot for all their statements; and
-- loose, whether a key may be in two parts of the table, or twice with other values of what
-- its index has besides, or whether there is a view or a foreign table, which tells no key.
WITH indexes AS (
    SELECT i.indisvalid, i.indisunique, i.indpred,
           (SELECT array_agg(a.attname::text ORDER BY a.attnum)
              FROM pg_attribute AS a
             WHERE a.attrelid = i.indexrelid AND a.attnum <= i.indnkeyatts) AS columns
      FROM pg_index AS i
     WHERE i.indrelid = to_regclass('v_xml_cdr')
), served AS (
    SELECT EXISTS (SELECT FROM indexes WHERE indisvalid AND indpred IS NULL
                      AND columns[1:3] = ARRAY['domain_uuid', 'end_stamp', 'xml_cdr_uuid']) AS indexed,
           EXISTS (SELECT FROM indexes WHERE indisvalid AND indpred IS NULL
                      AND columns[1:2] = ARRAY['domain_uuid', 'end_epoch']) AS epochs_indexed
)
SELECT pg_backend_pid() AS pid, indexed, epochs_indexed,
       (indexed OR epochs_indexed)
           AND NOT EXISTS (SELECT FROM pg_inherits AS i
                             JOIN pg_class AS part ON part.oid = i.inhrelid
                             JOIN pg_class AS whole ON whole.oid = i.inhparent
                            WHERE i.inhparent = to_regclass('v_xml_cdr')
                              AND (part.relkind = 'f' OR whole.relkind <> 'p')) AS probed,
       EXISTS (SELECT FROM indexes WHERE indisvalid AND columns[1:2] = ARRAY['domain_name', 'end_stamp']) AS nameless_indexed,
       current_setting('default_transaction_isolation') NOT IN ('read committed', 'read uncommitted') AS isolated,
       EXISTS (SELECT FROM pg_inherits WHERE inhparent = to_regclass('v_xml_cdr'))
           OR NOT EXISTS (SELECT FROM indexes
                           WHERE indisunique AND indisvalid AND indpred IS NULL
                             AND columns IN (ARRAY['uuid'], ARRAY['xml_cdr_uuid'])) AS loose
  FROM served;

-- name: examine_tables
-- One row: lockable, whether LOCK TABLE takes v_xml_cdr;
-- foreign, whether calls may be where LOCK TABLE does not reach: in a foreign table, which a view may hide, or in
-- what a function reads that a view calls (from 16384 on objects are not PostgreSQL's own);
-- keyless, the name of a plain table, or of a partition or other child of this server, that nothing keeps from
-- holding a key twice (NULL: there is none), for which no partition is looked at that has the key of the whole; and
-- zoned, whether stamps are known to be instants.
WITH RECURSIVE root AS (
    SELECT oid, relkind FROM pg_class WHERE oid = to_regclass('v_xml_cdr')
), parts AS (
    SELECT oid, relkind FROM root
     UNION ALL
    SELECT c.oid, c.relkind
      FROM parts
      JOIN pg_inherits AS p ON p.inhparent = parts.oid
      JOIN pg_class AS c ON c.oid = p.inhrelid
     WHERE parts.relkind <> 'p'
        OR NOT EXISTS (SELECT FROM pg_index AS i
                         JOIN pg_attribute AS a ON a.attrelid = i.indexrelid AND a.attnum <= i.indnkeyatts
                        WHERE i.indrelid = parts.oid AND i.indisunique AND i.indisvalid AND i.indpred IS NULL
                          AND a.attname IN ('uuid', 'xml_cdr_uuid'))
)
SELECT coalesce((SELECT relkind IN ('r', 'p', 'v') FROM root), true) AS lockable,
       EXISTS (SELECT FROM root
                 JOIN pg_foreign_table AS f
                   ON f.ftrelid = root.oid OR root.relkind = 'v' OR f.ftrelid IN (SELECT inhrelid FROM pg_inherits))
           OR coalesce((SELECT CASE WHEN relkind = 'v'  -- else nothing is looked for
                                    THEN EXISTS (SELECT FROM pg_depend
                                                  WHERE classid = 'pg_rewrite'::regclass
                                                    AND refclassid = 'pg_proc'::regclass
                                                    AND refobjid >= 16384) END FROM root), false) AS "foreign",
       (SELECT min(oid::regclass::text)
          FROM parts
         WHERE relkind = 'r'
           AND NOT EXISTS (SELECT FROM pg_index AS i
                             JOIN pg_attribute AS a ON a.attrelid = i.indexrelid AND a.attnum <= i.indnkeyatts
                            WHERE i.indrelid = parts.oid AND i.indisunique AND i.indisvalid AND i.indpred IS NULL
                              AND a.attname IN ('uuid', 'xml_cdr_uuid'))) AS keyless,
       (SELECT count(*) = 3
          FROM root
          JOIN pg_attribute ON attrelid = root.oid
         WHERE attname IN ('start_stamp', 'answer_stamp', 'end_stamp') AND atttypid = 'timestamptz'::regtype) AS zoned;

-- name: confirm_plain
-- A row if v_xml_cdr is a plain table without children that cannot hold a key twice, as it nearly always is: then
-- examine_tables, which takes longer, has nothing to tell.
SELECT true
  FROM pg_class AS c
  JOIN pg_index AS i ON i.indrelid = c.oid
  JOIN pg_attribute AS a ON a.attrelid = i.indexrelid AND a.attnum <= i.indnkeyatts
 WHERE c.oid = to_regclass('v_xml_cdr') AND c.relkind = 'r' AND NOT c.relhassubclass
   AND i.indisunique AND i.indisvalid AND i.indpred IS NULL
   AND a.attname IN ('uuid', 'xml_cdr_uuid');

-- name: set_session
-- For as long as a connection has a server process of its own: what begin_read sets for others.
-- Not what would change the plans of other statements.
SELECT set_config('default_transaction_isolation', 'read committed', false),
       set_config('random_page_cost', '1.1', false),
       set_config('row_security', 'off', false),
       set_config('DateStyle', 'ISO', false),
       set_config('extra_float_digits', '1', false);

-- name: probe_calls
-- No row; an error where calls cannot be read.
SELECT FROM v_xml_cdr LIMIT 0;


-- Feed -----------------------------------------------------------------------

-- name: find_horizon
-- One row: every transaction below horizon has ended. durable: the WAL that says
-- so is on disk. Else a crash may forget a rollback and give its id to another
-- transaction, whose calls would then lie below a horizon that was passed.
-- position: of the WAL, after the ends of all of them; with the timeline it is on.
SELECT horizon, position::text, timeline,
       pg_is_in_recovery() OR pg_current_wal_flush_lsn() >= position AS durable
  FROM (SELECT txid_snapshot_xmin(txid_current_snapshot()) AS horizon,
               CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn()
                    ELSE pg_current_wal_insert_lsn() END AS position,
               cdr_api.timeline() AS timeline
        OFFSET 0) AS found;

-- name: flush_wal
-- Brings all WAL so far to disk: a record of a few bytes, committed synchronously.
BEGIN;
SET LOCAL synchronous_commit = 'local';
SELECT pg_logical_emit_message(true, 'cdr_api', '');
COMMIT;

-- name: find_snapshot
-- One row: what the transaction's snapshot sees. Every transaction below horizon
-- has ended; next is the id that no transaction had yet (a snapshot's own xmax
-- may be the id of one that runs). seen is the instant of what is seen: on a
-- standby, that of the last commit that arrived. The functions with txid in
-- their names are those that every PostgreSQL from 11 on has.
SELECT horizon,
       horizon + age((horizon %% 4294967296)::text::xid) AS next,
       (SELECT system_identifier FROM pg_control_system())
           || '.' || (SELECT oid FROM pg_database WHERE datname = current_database()) AS cluster,
       pg_is_in_recovery() AS in_recovery,
       clock_timestamp() AS now,
       CASE WHEN pg_is_in_recovery() THEN coalesce(pg_last_xact_replay_timestamp(), 'epoch') ELSE now() END AS seen,
       cdr_api.timeline() AS timeline,
       (CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn()
             ELSE pg_current_wal_insert_lsn() END)::text AS position
  FROM txid_snapshot_xmin(txid_current_snapshot()) AS horizon;

-- name: find_timeline_end
-- One row: where in the WAL the history of the present timeline left a past one; NULL
-- where it did not, or where that is not known.
SELECT cdr_api.timeline_end(%(present)s, %(past)s)::text AS position;

-- name: find_tables
-- One row: root, v_xml_cdr; members, that and its partitions or other children; odd,
-- one of them whose rows do not tell which transaction of this server wrote them; and
-- whether there are tables of an extension that keeps the rows elsewhere (Citus).
WITH RECURSIVE members AS (
    SELECT to_regclass('v_xml_cdr')::oid AS oid
     UNION
    SELECT i.inhrelid FROM pg_inherits AS i JOIN members AS m ON i.inhparent = m.oid
)
SELECT to_regclass('v_xml_cdr')::oid::bigint AS root,
       array_agg(m.oid::bigint) AS members,
       min(CASE c.relkind WHEN 'f' THEN c.relname || ' is a foreign table'
                          WHEN 'v' THEN c.relname || ' is a view'
                          WHEN 'm' THEN c.relname || ' is a materialized view'
                          WHEN 'r' THEN CASE WHEN a.amname <> 'heap'
                                             THEN c.relname || ' is a table of access method ' || a.amname END END) AS odd,
       to_regclass('pg_dist_partition') IS NOT NULL AS has_distributed
  FROM members AS m
  LEFT JOIN pg_class AS c ON c.oid = m.oid
  LEFT JOIN pg_am AS a ON a.oid = c.relam;

-- name: find_distributed
-- One row: odd, as above. pg_dist_partition is where Citus lists the tables that it distributes.
SELECT min(d.logicalrelid::text || ' is a distributed table') AS odd
  FROM pg_dist_partition AS d
 WHERE d.logicalrelid::oid = ANY(%(members)s::oid[]);

-- name: find_attached
-- One row: those of the members that were made a part of the table by transactions from low on, and their own parts.
WITH RECURSIVE attached AS (
    SELECT i.inhrelid
      FROM pg_inherits AS i
     WHERE i.inhrelid = ANY(%(members)s::oid[]) AND age(i.xmin) BETWEEN 0 AND age(%(low)s::text::xid)
     UNION
    SELECT i.inhrelid FROM pg_inherits AS i JOIN attached AS a ON i.inhparent = a.inhrelid
)
SELECT array_agg(inhrelid::bigint) AS attached
  FROM attached;

-- name: find_older_rows
-- One row: whether some tables hold a row that transactions before low wrote.
SELECT EXISTS (SELECT FROM v_xml_cdr AS cdr
                WHERE cdr.tableoid = ANY(%(tables)s::oid[])
                  AND age(cdr.xmin) NOT BETWEEN 0 AND age(%(low)s::text::xid)) AS found;

-- name: find_older_calls
-- One row: whether some domains have calls that transactions before low wrote.
SELECT EXISTS (SELECT FROM v_xml_cdr AS cdr
                WHERE cdr.domain_uuid = ANY(%(domain_uuids)s::uuid[])
                  AND age(cdr.xmin) NOT BETWEEN 0 AND age(%(low)s::text::xid)) AS found;

-- name: find_nameless
-- One row: whether some names stand in calls without a domain_uuid.
SELECT EXISTS (SELECT FROM v_xml_cdr AS cdr
                WHERE cdr.domain_uuid IS NULL AND cdr.domain_name = ANY(%(names)s::text[])) AS found;

-- name: find_subscriptions
-- One row: how many subscriptions fill the members; known, whether each of them runs and has
-- ended its first copy; and the instant up to which the slowest has applied its publisher's
-- changes (its last message has been applied when the next is read), and seconds since.
SELECT count(DISTINCT r.srsubid) AS subscriptions,
       bool_and(r.srsubstate IN ('r', 's') AND s.pid IS NOT NULL) AS known,
       min(s.latest_end_time)::text AS applied,
       extract(epoch FROM clock_timestamp() - min(s.latest_end_time))::double precision AS lag
  FROM pg_subscription_rel AS r
  LEFT JOIN pg_stat_subscription AS s ON s.subid = r.srsubid AND s.relid IS NULL
 WHERE r.srrelid = ANY(%(members)s::oid[]);


-- name: find_oldest_writer
-- One row: who of the running transactions was the first to write, and since how
-- many seconds it has run (NULL: nobody). It holds the feed back.
SELECT holder, seconds FROM cdr_api.oldest_writer();


-- Totals ---------------------------------------------------------------------

-- name: select_totals
-- One row is a group: the keys, and what its calls come to. {group_by} groups
-- and orders by {keys}, or is empty. The README tells what digest is.
SELECT {keys}
       count(*) AS calls,
       count(*) FILTER (WHERE billsec > 0) AS answered,
       coalesce(sum(billsec), 0) AS billsec,
       coalesce(sum(billmsec), 0) AS billmsec,
       lpad(to_hex((coalesce(sum(('x' || substr(md5(xml_cdr_uuid || ' ' || coalesce(billsec, 0)), 1, 12))::bit(48)::bigint), 0)
                    %% 281474976710656)::bigint), 12, '0') AS digest
  FROM {matching_calls} AS calls
 CROSS JOIN LATERAL (SELECT CASE %(by)s WHEN 'start' THEN start_at ELSE end_at END AS moment) AS chosen
 CROSS JOIN LATERAL (
       SELECT trim('"' FROM to_json(date_trunc('hour', moment))::text) AS hour,
              to_char(moment, 'YYYY-MM-DD') AS day,
              to_char(moment, 'YYYY-MM') AS month) AS calendar
{group_by};

-- name: first_digits
-- No statement but a key of select_totals: the first prefix_length digits of the destination, with a "+" before them
-- if it is stored; fewer where it has fewer, NULL where it begins with something else.
substring(calls.destination_number::text FROM '^[+]?[0-9]{{1,' || %(prefix_length)s || '}}') AS destination_prefix

-- name: select_peaks
-- One row is an interval of a domain with its highest number of simultaneous
-- calls. A sweep: a call adds one at its start and takes it away at its end, an
-- interval's own beginning adds nothing and carries the level in. At the same
-- moment ends come before starts, and starts before the beginning. The order by i, which
-- is that by moment, is the order of the groups too: one sort serves both. active_only: only
-- intervals in which there was a call; then the others are not even made.
WITH spans AS (
    SELECT domain_name, greatest(start_at, %(from)s::timestamptz) AS first, end_at AS last
      FROM {matching_calls} AS calls
     WHERE start_at < %(until)s::timestamptz AND end_at > start_at
       AND %(from)s::timestamptz < %(until)s::timestamptz
), events AS (
    SELECT domain_name, first AS moment, 1 AS change FROM spans
     UNION ALL
    SELECT domain_name, last, -1 FROM spans WHERE last < %(until)s::timestamptz
     UNION ALL
    SELECT domain_name, beginning, 0
      FROM (SELECT unnest(%(domain_names)s::text[]) AS domain_name UNION SELECT domain_name FROM spans) AS names
     CROSS JOIN generate_series(%(from)s::timestamptz, %(until)s::timestamptz - interval '1 us',
                                %(step)s * interval '1 s') AS beginning
     WHERE NOT %(active_only)s
     UNION ALL
    SELECT DISTINCT domain_name, %(from)s::timestamptz + i * %(step)s * interval '1 s', 0
      FROM spans
     CROSS JOIN LATERAL generate_series(
           floor(extract(epoch FROM first - %(from)s::timestamptz) / %(step)s)::int,
           ceil(extract(epoch FROM least(last, %(until)s::timestamptz) - %(from)s::timestamptz) / %(step)s)::int - 1) AS i
     WHERE %(active_only)s
), levels AS (
    SELECT domain_name, i, change,
           sum(change) OVER (PARTITION BY domain_name ORDER BY i, moment, change = 0, change
                              ROWS UNBOUNDED PRECEDING) AS level
      FROM events
     CROSS JOIN LATERAL (SELECT floor(extract(epoch FROM moment - %(from)s::timestamptz) / %(step)s)::int AS i) AS interval
)
SELECT domain_name,
       trim('"' FROM to_json(%(from)s::timestamptz + i * %(step)s * interval '1 s')::text) AS start_interval,
       trim('"' FROM to_json(least(%(from)s::timestamptz + (i + 1) * %(step)s * interval '1 s',
                                   %(until)s::timestamptz))::text) AS end_interval,
       max(level)::bigint AS active_calls
  FROM levels
 WHERE change >= 0
 GROUP BY domain_name, i
HAVING NOT %(active_only)s OR max(level) > 0
 ORDER BY domain_name, i;

-- name: select_activity
-- One row is an interval of a domain with the calls that overlap it, by
-- direction. A call counts from its first interval to its last: added in the
-- first, taken away after the last. One that ends where it starts is in one.
-- active_only as above.
WITH spans AS (
    SELECT domain_name, direction,
           floor(extract(epoch FROM greatest(start_at, %(from)s::timestamptz) - %(from)s::timestamptz) / %(step)s)::int AS first,
           ceil(extract(epoch FROM end_at - %(from)s::timestamptz) / %(step)s)::int - 1 AS last
      FROM {matching_calls} AS calls
     WHERE start_at < %(until)s::timestamptz
       AND (end_at > %(from)s::timestamptz OR start_at >= %(from)s::timestamptz)
), changes AS (
    SELECT domain_name, first AS i, direction, 1 AS change FROM spans
     UNION ALL
    SELECT domain_name, greatest(first, last) + 1, direction, -1 FROM spans
     UNION ALL
    SELECT domain_name, i, NULL, 0
      FROM (SELECT unnest(%(domain_names)s::text[]) AS domain_name UNION SELECT domain_name FROM spans) AS names
     CROSS JOIN generate_series(0, ceil(extract(epoch FROM %(until)s::timestamptz - %(from)s::timestamptz) / %(step)s)::int - 1) AS i
     WHERE NOT %(active_only)s
     UNION ALL
    SELECT DISTINCT domain_name, i, NULL, 0
      FROM spans
     CROSS JOIN LATERAL generate_series(
           first, least(greatest(first, last),
                        ceil(extract(epoch FROM %(until)s::timestamptz - %(from)s::timestamptz) / %(step)s)::int - 1)) AS i
     WHERE %(active_only)s
), counts AS (
    SELECT domain_name, i,
           sum(sum(change) FILTER (WHERE direction = 'inbound')) OVER along AS inbound,
           sum(sum(change) FILTER (WHERE direction = 'outbound')) OVER along AS outbound,
           sum(sum(change) FILTER (WHERE direction = 'local')) OVER along AS internal,
           sum(sum(change)) OVER along AS total
      FROM changes
     GROUP BY domain_name, i
    WINDOW along AS (PARTITION BY domain_name ORDER BY i)
)
SELECT trim('"' FROM to_json(%(from)s::timestamptz + i * %(step)s * interval '1 s')::text) AS start_interval,
       trim('"' FROM to_json(least(%(from)s::timestamptz + (i + 1) * %(step)s * interval '1 s',
                                   %(until)s::timestamptz))::text) AS end_interval,
       domain_name AS domain,
       coalesce(inbound, 0)::bigint AS inbound, coalesce(outbound, 0)::bigint AS outbound,
       coalesce(internal, 0)::bigint AS internal, total::bigint AS total
  FROM counts
 WHERE %(from)s::timestamptz + i * %(step)s * interval '1 s' < %(until)s::timestamptz
   AND (NOT %(active_only)s OR total > 0)
 ORDER BY domain_name, i;


-- Domains --------------------------------------------------------------------

-- name: grants_beside
-- No statement but a table: the grants of an account, where the side tables are in the database of v_domains.
(SELECT domain_uuid, grant_id FROM cdr_api.grants WHERE account_id = {account_id})

-- name: grants_given
-- The same where they are in another database, which has been asked before (by authenticate_apart).
(SELECT domain_uuid, %(newest_grant)s::bigint AS grant_id
   FROM unnest(%(granted)s::uuid[]) AS granted (domain_uuid))

-- name: readable_domains
-- No statement but a table: the domains that the account may read, with a token that was made for some
-- (chosen_uuids) no others. By its {grants}: an account of a few does not pay for all domains.
(SELECT domain_uuid, domain_name
   FROM (SELECT domain_uuid, domain_name FROM v_domains WHERE %(all_domains)s
          UNION ALL
         SELECT d.domain_uuid, d.domain_name
           FROM {grants} AS g
           JOIN v_domains AS d ON d.domain_uuid = g.domain_uuid
          WHERE NOT %(all_domains)s) AS granted
  WHERE %(chosen_uuids)s::uuid[] IS NULL OR domain_uuid = ANY(%(chosen_uuids)s::uuid[]))

-- name: find_domains
-- One row: the domains that are {readable}, as uuids and their names; of the names those that no other
-- domain bears (is_lone); and the newest of the account's {grants}. Names leave the database as their
-- bytes in hex, for they may not be text.
SELECT array_agg(domain_uuid::text ORDER BY domain_uuid) FILTER (WHERE place = 1) AS uuids,
       array_agg(name ORDER BY domain_uuid) FILTER (WHERE place = 1) AS names,
       array_agg(name ORDER BY domain_uuid) FILTER (WHERE is_lone) AS lone_names,
       (SELECT max(g.grant_id) FROM {grants} AS g) AS newest_grant,
       (SELECT array_agg(given.domain_uuid::text)
          FROM (SELECT domain_uuid FROM {grants} AS g UNION SELECT unnest(%(chosen_uuids)s::uuid[])) AS given
         WHERE NOT EXISTS (SELECT FROM v_domains AS d WHERE d.domain_uuid = given.domain_uuid)) AS absent
  FROM (SELECT d.domain_uuid, encode(convert_to(d.domain_name, getdatabaseencoding()), 'hex') AS name,
               bool_and(other.domain_uuid IS NULL) AS is_lone,
               row_number() OVER (PARTITION BY d.domain_uuid ORDER BY d.domain_name) AS place
          FROM {readable} AS d
          LEFT JOIN v_domains AS other
            ON other.domain_name = d.domain_name AND other.domain_uuid <> d.domain_uuid
         GROUP BY d.domain_uuid, d.domain_name) AS domains;

-- name: find_named_domains
-- One row: the domains of a name (FusionPBX does not keep it unique), as a list of
-- uuid, name (its bytes in hex), and whether it is among the account's {grants}.
SELECT coalesce(json_agg(json_build_object('uuid', d.domain_uuid,
                                           'name', encode(convert_to(d.domain_name, getdatabaseencoding()), 'hex'),
                                           'granted', g.domain_uuid IS NOT NULL)), '[]') AS named
  FROM (SELECT DISTINCT domain_uuid, domain_name FROM v_domains) AS d
  LEFT JOIN {grants} AS g
    ON g.domain_uuid = d.domain_uuid
 WHERE d.domain_name = {name}

-- name: name_of_domain
-- No statement but a value: the name of the domain that has a uuid; of two, the first.
(SELECT min(domain_name) FROM v_domains WHERE domain_uuid = %(domain_uuid)s::uuid)

-- name: select_domains
-- One row is a domain of those that are {readable}, by name.
SELECT d.domain_uuid::text AS domain_uuid, d.domain_name
  FROM {readable} AS d
 ORDER BY d.domain_name, d.domain_uuid;

-- name: select_extensions
-- One row is an extension of the domains that are {readable}, or of those of domain_uuids among them, by domain and number.
SELECT e.extension_uuid::text AS extension_uuid, d.domain_uuid::text AS domain_uuid, d.domain_name,
       e.extension, e.number_alias, e.effective_caller_id_name
  FROM {readable} AS d
  JOIN v_extensions AS e ON e.domain_uuid = d.domain_uuid
 WHERE %(domain_uuids)s::uuid[] IS NULL OR d.domain_uuid = ANY(%(domain_uuids)s::uuid[])
 ORDER BY d.domain_name, e.extension, e.extension_uuid;

-- name: find_uuids
-- One row is a domain that has one of some names, or one of them as its uuid.
SELECT DISTINCT domain_uuid::text AS domain_uuid
  FROM v_domains
 WHERE domain_name = ANY(%(domain_names)s) OR domain_uuid::text = ANY(%(domain_names)s);

-- name: find_names
-- One row is a domain of some uuids; its name as its bytes in hex.
SELECT domain_uuid::text AS domain_uuid, encode(convert_to(domain_name, getdatabaseencoding()), 'hex') AS name
  FROM v_domains
 WHERE domain_uuid = ANY(%(domain_uuids)s::uuid[]);

-- name: probe_domains
-- No row; an error where domains cannot be read.
SELECT FROM v_domains LIMIT 0;


-- Accounts and tokens --------------------------------------------------------

-- name: insert_account
-- One row, the new account; none if the address is taken (also by a
-- registration that runs at the same time).
INSERT INTO cdr_api.accounts (name, email, email_key, password_hash, all_domains)
VALUES (%(name)s, %(email)s, %(email_key)s, %(password_hash)s, %(all_domains)s)
    ON CONFLICT (email_key) DO NOTHING
RETURNING account_id, name, email, all_domains,
          to_char(created_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') AS created_at,
          to_char(updated_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') AS updated_at;

-- name: upsert_grants
-- One row is a domain that is now granted. The account is locked before a grant gets its id: else of two
-- at once the later id might be seen first, and a cursor of the feed that knows it would not miss the other.
WITH account AS (
    SELECT account_id FROM cdr_api.accounts WHERE account_id = %(account_id)s FOR NO KEY UPDATE
)
INSERT INTO cdr_api.grants (account_id, domain_uuid)
SELECT account.account_id, granted.domain_uuid
  FROM account
 CROSS JOIN unnest(%(domain_uuids)s::uuid[]) AS granted (domain_uuid)
    ON CONFLICT (account_id, domain_uuid) DO UPDATE SET domain_uuid = EXCLUDED.domain_uuid
RETURNING domain_uuid;

-- name: find_grants
-- One row: the uuids of an account's domains, and the newest of its grants.
SELECT coalesce(array_agg(domain_uuid::text ORDER BY domain_uuid), '{{}}') AS granted, max(grant_id) AS newest_grant
  FROM cdr_api.grants
 WHERE account_id = {account_id};

-- name: find_account
-- The account of an address, or no row.
SELECT account_id, name, email, password_hash, all_domains, disabled_at IS NOT NULL AS disabled,
       to_char(created_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') AS created_at,
       to_char(updated_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') AS updated_at
  FROM cdr_api.accounts
 WHERE email_key = %(email_key)s;

-- name: insert_token
-- One row, the new token's id. days 0 is a token that never expires.
INSERT INTO cdr_api.tokens (account_id, digest, expires_at, domain_uuids, networks)
SELECT a.account_id, %(digest)s,
       CASE WHEN %(days)s > 0 THEN now() + %(days)s * interval '1 day' END,
       %(domain_uuids)s::uuid[], %(networks)s::cidr[]
  FROM cdr_api.accounts AS a
 WHERE a.account_id = %(account_id)s AND a.disabled_at IS NULL
   FOR SHARE OF a
RETURNING token_id;

-- name: delete_expired_tokens
DELETE FROM cdr_api.tokens
 WHERE account_id = %(account_id)s AND expires_at <= now();

-- name: authenticate
-- The live token of a digest with its account, or no row. stale: its last use
-- was not written down for an hour. chosen_uuids, networks: see the table.
SELECT t.token_id, t.account_id, a.all_domains, t.domain_uuids AS chosen_uuids, t.networks,
       coalesce(t.last_used_at < now() - interval '1 hour', true) AS stale
  FROM cdr_api.tokens AS t
  JOIN cdr_api.accounts AS a USING (account_id)
 WHERE t.digest = %(digest)s
   AND a.disabled_at IS NULL
   AND (t.expires_at IS NULL OR t.expires_at > now());

-- name: authenticate_for_domain
-- The row of {authenticate}, and the domains of a name by {find_named_domains}.
SELECT token.*, named.named
  FROM ({authenticate}) AS token
 CROSS JOIN LATERAL ({find_named_domains}) AS named;

-- name: authenticate_apart
-- The row of {authenticate}, and the account's grants by {find_grants}.
SELECT token.*, grants.*
  FROM ({authenticate}) AS token
 CROSS JOIN LATERAL ({find_grants}) AS grants;

-- name: touch_token
UPDATE cdr_api.tokens SET last_used_at = now() WHERE token_id = %(token_id)s;

-- name: delete_token
DELETE FROM cdr_api.tokens WHERE token_id = %(token_id)s RETURNING token_id;

-- name: delete_tokens
DELETE FROM cdr_api.tokens WHERE account_id = %(account_id)s RETURNING token_id;

-- name: count_attempt
-- One row is a key that may try a password now; of one that has to wait there is
-- none. Ten failures are free (so may be as many right logins at once); then it
-- takes a second, two, four, up to a minute until the next attempt. What failed an hour ago is forgotten.
-- Every registration counts like a failed login, by its address.
-- Rows are locked in the order of their keys, as by all that locks more than one.
INSERT INTO cdr_api.attempts AS a (key)
SELECT key FROM unnest(%(keys)s::bytea[]) AS key ORDER BY key
    ON CONFLICT (key) DO UPDATE
   SET failures = CASE WHEN a.next_at < clock_timestamp() - interval '1 hour' THEN 1 ELSE a.failures + 1 END,
       next_at = clock_timestamp()
                 + CASE WHEN a.failures < 9 OR a.next_at < clock_timestamp() - interval '1 hour' THEN interval '0'
                        ELSE least(2 ^ least(a.failures - 9, 10), 60) * interval '1 s' END
 WHERE a.next_at <= clock_timestamp()
RETURNING key, (extract(epoch FROM next_at) * 1000000)::bigint AS next_at;

-- name: find_wait
-- One row: the seconds until all of the keys may try again.
SELECT greatest(1, ceil(extract(epoch FROM max(next_at) - clock_timestamp())))::integer AS seconds
  FROM cdr_api.attempts
 WHERE key = ANY(%(keys)s);

-- name: delete_attempts
DELETE FROM cdr_api.attempts WHERE key = %(key)s;

-- name: undo_attempt
-- With the delay that it caused (next_at, in microseconds, is what count_attempt gave); that of a later one stays.
UPDATE cdr_api.attempts
   SET failures = greatest(failures - 1, 0),
       next_at = CASE WHEN (extract(epoch FROM next_at) * 1000000)::bigint = %(next_at)s THEN clock_timestamp()
                      ELSE next_at END
 WHERE key = %(key)s;

-- name: delete_old_attempts
-- Rows that another login holds are left to the next one.
DELETE FROM cdr_api.attempts
 WHERE key IN (SELECT key FROM cdr_api.attempts
                WHERE next_at < clock_timestamp() - interval '1 hour'
                  FOR UPDATE SKIP LOCKED);

-- name: upsert_warning
INSERT INTO cdr_api.warnings (name, text) VALUES (%(name)s, %(text)s)
    ON CONFLICT (name) DO UPDATE SET text = EXCLUDED.text, seen_at = now();

-- name: delete_warning
DELETE FROM cdr_api.warnings WHERE name = %(name)s;

-- name: probe_accounts
-- No row; an error where the side tables cannot be read.
SELECT FROM cdr_api.tokens LIMIT 0;

-- name: insert_secret
-- The first worker that needs the secret makes it; all others read it.
INSERT INTO cdr_api.secrets (name, value) VALUES (%(name)s, %(value)s)
    ON CONFLICT (name) DO NOTHING;

-- name: find_secret
SELECT value FROM cdr_api.secrets WHERE name = %(name)s;


-- Commands -------------------------------------------------------------------

-- name: select_accounts
-- One row is an account with the uuids of its domains and the number of its live tokens.
SELECT a.account_id, a.email, a.name, a.all_domains, a.disabled_at IS NOT NULL AS disabled,
       ARRAY(SELECT g.domain_uuid::text FROM cdr_api.grants AS g WHERE g.account_id = a.account_id) AS domain_uuids,
       (SELECT count(*)
          FROM cdr_api.tokens AS t
         WHERE t.account_id = a.account_id
           AND (t.expires_at IS NULL OR t.expires_at > now())) AS tokens
  FROM cdr_api.accounts AS a
 ORDER BY a.account_id;

-- name: set_all_domains
UPDATE cdr_api.accounts SET all_domains = %(all_domains)s, updated_at = now() WHERE account_id = %(account_id)s;

-- name: delete_grants
-- One row is a grant that is gone.
DELETE FROM cdr_api.grants
 WHERE account_id = %(account_id)s AND domain_uuid::text = ANY(%(domain_uuids)s)
RETURNING domain_uuid;

-- name: delete_all_grants
DELETE FROM cdr_api.grants WHERE account_id = %(account_id)s;

-- name: set_password
UPDATE cdr_api.accounts SET password_hash = %(password_hash)s, updated_at = now() WHERE account_id = %(account_id)s;

-- name: set_disabled
UPDATE cdr_api.accounts
   SET disabled_at = CASE WHEN %(disabled)s THEN coalesce(disabled_at, now()) END, updated_at = now()
 WHERE account_id = %(account_id)s;

-- name: delete_account
DELETE FROM cdr_api.accounts WHERE account_id = %(account_id)s;

-- name: select_tokens
-- One row is a token of an account, or of any account (NULL); domain_uuids: those that it was made for.
SELECT t.token_id, a.email, t.networks::text[] AS networks, t.domain_uuids::text[] AS domain_uuids,
       to_char(t.created_at, 'YYYY-MM-DD HH24:MI:SSTZH:TZM') AS created_at,
       to_char(t.last_used_at, 'YYYY-MM-DD HH24:MI:SSTZH:TZM') AS last_used_at,
       to_char(t.expires_at, 'YYYY-MM-DD HH24:MI:SSTZH:TZM') AS expires_at
  FROM cdr_api.tokens AS t
  JOIN cdr_api.accounts AS a USING (account_id)
 WHERE %(account_id)s::integer IS NULL OR t.account_id = %(account_id)s::integer
 ORDER BY t.token_id;


-- Check ----------------------------------------------------------------------

-- name: find_schemas
-- One row is a table of FusionPBX's that we read, by its schema: whether our role may use that, and whether it finds it.
SELECT n.nspname AS schema, has_schema_privilege(n.oid, 'USAGE') AS usable,
       c.oid = to_regclass(c.relname::text) IS TRUE AS found
  FROM pg_class AS c
  JOIN pg_namespace AS n ON n.oid = c.relnamespace
 WHERE c.relname IN ('v_xml_cdr', 'v_domains') AND c.relkind IN ('r', 'p', 'v', 'm', 'f')
 ORDER BY c.relname DESC, n.nspname = 'public' DESC;

-- name: check_role
-- One row: who we are, which of FusionPBX's two tables there are, and what we may do with them.
SELECT current_user AS role,
       (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) AS superuser,
       coalesce(array_agg(name), '{}') AS tables,
       bool_or(has_table_privilege(name, 'INSERT, UPDATE, DELETE, TRUNCATE')
               OR has_any_column_privilege(name, 'INSERT, UPDATE')) AS may_write,
       bool_and(has_table_privilege(name, 'SELECT')) AS may_read
  FROM unnest(ARRAY['v_xml_cdr', 'v_domains']) AS name
 WHERE to_regclass(name) IS NOT NULL;

-- name: examine_domains
-- One row: how many domains there are, how many more rows than these, whether they are on another server (far), and
-- whether an index finds one by its name, which FusionPBX does not make.
SELECT (SELECT count(DISTINCT domain_uuid) FROM v_domains) AS domains,
       (SELECT count(*) - count(DISTINCT domain_uuid) FROM v_domains) AS doubles,
       (SELECT relkind = 'f' FROM pg_class WHERE oid = to_regclass('v_domains')) AS far,
       EXISTS (SELECT FROM pg_index AS i
                 JOIN pg_attribute AS a ON a.attrelid = i.indexrelid AND a.attnum = 1
                WHERE i.indrelid = to_regclass('v_domains') AND i.indisvalid AND i.indpred IS NULL
                  AND a.attname = 'domain_name') AS indexed;

-- name: find_connection_limits
-- One row: how many connections our role may have, and how many there are for all roles that are not superusers.
SELECT CASE WHEN r.rolconnlimit < 0 OR r.rolsuper THEN found.server ELSE r.rolconnlimit END AS role, found.server
  FROM pg_roles AS r
 CROSS JOIN (SELECT current_setting('max_connections')::integer
                    - current_setting('superuser_reserved_connections')::integer AS server) AS found
 WHERE r.rolname = current_user;

-- name: find_row_security
-- One row is a table of which policies may hide rows from us.
SELECT name
  FROM unnest(ARRAY['v_xml_cdr', 'v_domains']) AS name
 WHERE to_regclass(name) IS NOT NULL AND row_security_active(to_regclass(name)::oid);

-- name: count_doubles
-- One row: the keys that are stored more than once.
SELECT count(*) AS calls
  FROM (SELECT FROM (SELECT NULL::uuid AS uuid, NULL::uuid AS xml_cdr_uuid) AS absent
         CROSS JOIN LATERAL (SELECT CASE WHEN uuid IS NULL THEN xml_cdr_uuid ELSE uuid END AS key FROM v_xml_cdr AS cdr) AS calls
         GROUP BY key HAVING count(*) > 1) AS doubles;

-- name: examine_calls
-- One row, of one pass over every call: those without a domain_uuid; those that belong to no domain (of domain_uuids,
-- or without a uuid by a name of lone_names); those that were stored so many days after
-- they ended that the feed did not find them (releases before 5.1 do not say when that was);
-- those with a billsec that cannot be; and the seconds since the newest call, now and at
-- this hour of the last eight weeks.
SELECT count(*) FILTER (WHERE domain_uuid IS NULL) AS nameless,
       count(*) FILTER (WHERE CASE WHEN domain_uuid IS NULL THEN domain_name = ANY(%(lone_names)s::text[])
                                   ELSE domain_uuid = ANY(%(domain_uuids)s::uuid[]) END IS NOT TRUE) AS of_no_domain,
       count(*) FILTER (WHERE CASE WHEN ended < '9999-01-01' THEN calls.stored > ended + %(days)s * interval '1 day' END) AS late,
       count(*) FILTER (WHERE billsec < 0 OR billsec > 31 * 86400) AS odd,
       ARRAY[extract(epoch FROM now() - max(ended) FILTER (WHERE ended > 'epoch' AND ended <= now())),
             extract(epoch FROM now() - interval '1 week' - max(ended) FILTER (WHERE ended > 'epoch' AND ended <= now() - interval '1 week')),
             extract(epoch FROM now() - interval '2 weeks' - max(ended) FILTER (WHERE ended > 'epoch' AND ended <= now() - interval '2 weeks')),
             extract(epoch FROM now() - interval '3 weeks' - max(ended) FILTER (WHERE ended > 'epoch' AND ended <= now() - interval '3 weeks')),
             extract(epoch FROM now() - interval '4 weeks' - max(ended) FILTER (WHERE ended > 'epoch' AND ended <= now() - interval '4 weeks')),
             extract(epoch FROM now() - interval '5 weeks' - max(ended) FILTER (WHERE ended > 'epoch' AND ended <= now() - interval '5 weeks')),
             extract(epoch FROM now() - interval '6 weeks' - max(ended) FILTER (WHERE ended > 'epoch' AND ended <= now() - interval '6 weeks')),
             extract(epoch FROM now() - interval '7 weeks' - max(ended) FILTER (WHERE ended > 'epoch' AND ended <= now() - interval '7 weeks')),
             extract(epoch FROM now() - interval '8 weeks' - max(ended) FILTER (WHERE ended > 'epoch' AND ended <= now() - interval '8 weeks'))
            ]::double precision[] AS gaps
  FROM (SELECT NULL::timestamptz AS insert_date) AS absent
 CROSS JOIN LATERAL (
       SELECT cdr.domain_uuid, cdr.domain_name, insert_date::timestamptz AS stored, cdr.billsec,
              {end_at} AS ended
         FROM v_xml_cdr AS cdr) AS calls;

-- name: sample
-- No statement but a table of one row: share, how much of the table some rows are, in per cent, by
-- what ANALYZE has found. Where it has not been run that is all, so who uses it adds a LIMIT.
(SELECT least(100, 100 * %(rows)s / greatest(sum(c.reltuples), 1))::real AS share
   FROM pg_class AS c
  WHERE c.oid = to_regclass('v_xml_cdr')
     OR c.oid IN (SELECT inhrelid FROM pg_inherits WHERE inhparent = to_regclass('v_xml_cdr'))) AS sample

-- name: compare_stamps
-- One row, of a sample of some rows: how many calls have an end_epoch, of how many the
-- end_stamp is another instant (by more than a second), by how many seconds most of
-- these, and whether end_stamp is text (then in the zone of the transaction).
SELECT count(*) AS looked_at,
       count(*) FILTER (WHERE abs(difference) > 1) AS differ,
       mode() WITHIN GROUP (ORDER BY difference) FILTER (WHERE abs(difference) > 1) AS seconds,
       bool_and(zoned) IS FALSE AS is_text
  FROM (SELECT {end_is_zoned} AS zoned,
               round(extract(epoch FROM CASE WHEN {end_is_zoned} AND cdr.end_stamp::text NOT IN ('infinity', '-infinity')
                                               OR {readable} THEN cdr.end_stamp::timestamptz END)::numeric
                     - cdr.end_epoch) AS difference
          FROM {sample}
         CROSS JOIN LATERAL (SELECT * FROM v_xml_cdr TABLESAMPLE SYSTEM (share) LIMIT %(rows)s) AS cdr
         WHERE cdr.end_epoch > 0 AND cdr.end_epoch < 253402300800) AS compared;

-- name: count_broken_text
-- One row, of a sample of some rows: how many of them hold text that is not UTF-8 in some
-- of {columns}. For SQL_ASCII, where a character is a byte to the expression. RFC 3629.
SELECT count(*) AS looked_at,
       count(*) FILTER (WHERE text !~ ('^([\x01-\x7f]|[\xc2-\xdf][\x80-\xbf]'
           || '|\xe0[\xa0-\xbf][\x80-\xbf]|[\xe1-\xec\xee\xef][\x80-\xbf][\x80-\xbf]|\xed[\x80-\x9f][\x80-\xbf]'
           || '|\xf0[\x90-\xbf][\x80-\xbf][\x80-\xbf]|[\xf1-\xf3][\x80-\xbf][\x80-\xbf][\x80-\xbf]'
           || '|\xf4[\x80-\x8f][\x80-\xbf][\x80-\xbf])*$')) AS broken
  FROM {sample}
 CROSS JOIN LATERAL (SELECT concat_ws(' ', {columns}) AS text
                       FROM v_xml_cdr AS cdr TABLESAMPLE SYSTEM (share) LIMIT %(rows)s) AS calls;

-- name: find_timeline
SELECT cdr_api.timeline() AS timeline;

-- name: select_warnings
-- One row is something that the service saw in the last day.
SELECT name, text, to_char(seen_at, 'YYYY-MM-DD HH24:MI:SSTZH:TZM') AS seen_at
  FROM cdr_api.warnings
 WHERE seen_at > now() - interval '1 day'
 ORDER BY name;

-- name: find_newest_call
-- One row: seconds since the end of the newest call that has ended (NULL: there is none), by the
-- index on the domain and the end, which is looked into twice for each domain_uuid.
{each_domain_uuid}
SELECT extract(epoch FROM now() - max(newest.end_stamp))::double precision AS seconds
  FROM found
 CROSS JOIN LATERAL (SELECT cdr.end_stamp FROM v_xml_cdr AS cdr
                      WHERE cdr.domain_uuid = found.domain_uuid AND cdr.end_stamp <= now()
                      ORDER BY cdr.end_stamp DESC LIMIT 1) AS newest;

-- name: find_standby_lag
-- One row: seconds since the last transaction that arrived, if there is more to
-- replay or the primary is not heard.
SELECT pg_is_in_recovery() AS in_recovery,
       CASE WHEN NOT pg_is_in_recovery() THEN 0
            WHEN pg_last_wal_receive_lsn() = pg_last_wal_replay_lsn() THEN 0
            ELSE extract(epoch FROM clock_timestamp() - pg_last_xact_replay_timestamp()) END::double precision AS seconds;

-- name: try_time_zone
SELECT set_config('TimeZone', %(time_zone)s, true);

-- name: select_offsets
-- One row is an instant of each day from three years ago to the next year, in epoch seconds, and by how many seconds
-- the clocks of a zone are ahead of UTC then.
SELECT extract(epoch FROM instant)::float8 AS epoch,
       extract(epoch FROM (instant AT TIME ZONE %(time_zone)s::text) - (instant AT TIME ZONE 'UTC'))::integer AS seconds
  FROM generate_series(now() - interval '3 years', now() + interval '1 year', interval '1 day') AS instant;

-- name: find_publications
-- One row is a publication or subscription that replicates side tables of this database, or
-- would; are_here: whether it has any.
SELECT format('publication %%s', p.pubname) AS name, to_regclass('cdr_api.accounts') IS NOT NULL AS are_here
  FROM pg_publication AS p
 WHERE p.puballtables
    OR EXISTS (SELECT FROM pg_publication_tables AS t WHERE t.pubname = p.pubname AND t.schemaname = 'cdr_api')
 UNION ALL
SELECT DISTINCT format('subscription %%s', s.subname), true
  FROM pg_stat_subscription AS s
  JOIN pg_subscription_rel AS r ON r.srsubid = s.subid
  JOIN pg_class AS c ON c.oid = r.srrelid AND c.relnamespace = to_regnamespace('cdr_api');

-- name: find_version
-- One row, made by schema.sql.
SELECT version FROM cdr_api.version;

-- name: count_accounts
SELECT (SELECT count(*) FROM cdr_api.accounts) AS accounts,
       count(*) AS tokens,
       count(*) FILTER (WHERE expires_at < now() + interval '30 days') AS expiring
  FROM cdr_api.tokens
 WHERE expires_at IS NULL OR expires_at > now();

-- name: select_columns
-- One row is a column of the v_xml_cdr that search_path finds.
SELECT a.attname AS column_name, format_type(a.atttypid, NULL) AS data_type
  FROM pg_attribute AS a
 WHERE a.attrelid = to_regclass('v_xml_cdr') AND a.attnum > 0 AND NOT a.attisdropped;

-- name: select_invalid_indexes
-- One row is an index of v_xml_cdr that CREATE INDEX CONCURRENTLY left unfinished.
SELECT indexrelid::regclass::text AS index_name
  FROM pg_index
 WHERE indrelid = to_regclass('v_xml_cdr') AND NOT indisvalid;

-- name: find_parts
-- One row: partitioned and viewed, whether v_xml_cdr is partitioned or a view; far, those of it and its parts that
-- are on other servers (the table itself alone, where it is one).
WITH RECURSIVE members AS (
    SELECT to_regclass('v_xml_cdr')::oid AS oid
     UNION
    SELECT i.inhrelid FROM pg_inherits AS i JOIN members AS m ON i.inhparent = m.oid
)
SELECT coalesce(bool_or(c.oid = to_regclass('v_xml_cdr') AND c.relkind = 'p'), false) AS partitioned,
       coalesce(bool_or(c.oid = to_regclass('v_xml_cdr') AND c.relkind = 'v'), false) AS viewed,
       coalesce(array_agg(c.relname::text ORDER BY c.relname) FILTER (WHERE c.relkind = 'f'), '{}') AS far
  FROM members AS m
  JOIN pg_class AS c ON c.oid = m.oid;

-- name: forbid_scans
-- For explain: its answer must not depend on how small the table is today.
SET LOCAL enable_seqscan = off;

-- name: explain
-- One row: the plan, as JSON, of the statement that is put after it.
EXPLAIN (FORMAT JSON);

-- name: read_clock
SELECT extract(epoch FROM clock_timestamp()) AS epoch;


-- Setup ----------------------------------------------------------------------
-- What cdr-api setup runs, as a superuser.

-- name: examine_server
-- One row: who we are, and what of ours there is; mb: about how large the index will be.
SELECT current_user AS role,
       (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) AS superuser,
       (SELECT rolcanlogin FROM pg_roles WHERE rolname = 'cdr_api') AS may_log_in,
       to_regclass('v_xml_cdr') IS NOT NULL AS has_calls,
       to_regclass('v_domains') IS NOT NULL AS has_domains,
       to_regnamespace('cdr_api') IS NOT NULL AS has_schema,
       to_regclass('cdr_api_calls') IS NOT NULL AS has_index,
       to_regclass('cdr_api.accounts') IS NOT NULL AS has_side_tables,
       (SELECT min(pubname) FROM pg_publication WHERE puballtables) AS publication,
       (SELECT ceil(greatest(reltuples, 0) * 67 / 1e6)::integer FROM pg_class WHERE oid = to_regclass('v_xml_cdr')) AS mb;

-- name: select_domain_names
-- One row is the name of a domain, as its bytes in hex, in their order.
SELECT encode(convert_to(domain_name, getdatabaseencoding()), 'hex') AS name
  FROM v_domains WHERE domain_name IS NOT NULL ORDER BY domain_name;

-- name: choose_side_tables
-- Tells schema.sql, in the same session, which tables to make: its head has the words.
SELECT set_config('cdr_api.side_tables', %(where)s, false) AS chosen;

-- name: find_database
SELECT datname FROM pg_database WHERE datname = %(name)s;

-- name: create_database
CREATE DATABASE {name};

-- name: set_role_password
-- The limit leaves connections for FusionPBX and FreeSWITCH: the server has 100 unless it is told otherwise.
ALTER ROLE cdr_api LOGIN CONNECTION LIMIT 40 PASSWORD {secret};

-- name: find_index_progress
-- One row is an index of v_xml_cdr that is being built: in which phase that is, and how much of it is done.
SELECT phase, coalesce(100 * blocks_done / nullif(blocks_total, 0), 0) AS percent
  FROM pg_stat_progress_create_index
 WHERE relid = to_regclass('v_xml_cdr');

-- name: drop_index
DROP INDEX CONCURRENTLY IF EXISTS cdr_api_calls;

-- name: drop_nameless_index
DROP INDEX CONCURRENTLY IF EXISTS cdr_api_nameless;

-- name: drop_domains_index
DROP INDEX CONCURRENTLY IF EXISTS cdr_api_domains;

-- name: drop_database
-- That of the side tables, where they are not beside FusionPBX's.
DROP DATABASE IF EXISTS cdr_api;

-- name: drop_schema
DROP SCHEMA IF EXISTS cdr_api CASCADE;

-- name: drop_rights
DROP OWNED BY cdr_api;

-- name: drop_role
DROP ROLE cdr_api;
