-- One row is one invented call, in the columns of FusionPBX's newest release
-- plus ring_seconds; demo/__init__.py gives them the habits of older releases.
-- Numbers i from %(first)s to %(last)s of %(total)s calls that end, in the order
-- of i, within %(days)s days before %(until)s (epoch seconds). Everything follows
-- from i: the same call comes out the same in every release.
WITH dice AS (
    SELECT i,
           (hashint8extended(i, 1) & 65535) / 65536.0 AS kind,
           (hashint8extended(i, 2) & 65535) / 65536.0 AS outcome,
           (hashint8extended(i, 3) & 65535) / 65536.0 AS length,
           (hashint8extended(i, 4) & 65535)::int AS person,
           (hashint8extended(i, 5) & 1048575)::int AS number,
           (hashint8extended(i, 6) & 65535)::int AS extension,
           (hashint8extended(i, 7) & 65535) / 65536.0 AS way,
           (hashint8extended(i, 8) & 65535)::int AS wait,
           %(days)s * (i - 1) / %(total)s::float8 AS day
      FROM generate_series(%(first)s::bigint, %(last)s::bigint) AS i
), timed AS (
    SELECT dice.*,
           -- Most calls end in the ten working hours.
           trunc(%(until)s - 86400 * (%(days)s - trunc(day))
                 + CASE WHEN day - trunc(day) < 0.06 THEN (day - trunc(day)) / 0.06 * 28800
                        WHEN day - trunc(day) < 0.92 THEN 28800 + (day - trunc(day) - 0.06) / 0.86 * 36000
                        ELSE 64800 + (day - trunc(day) - 0.92) / 0.08 * 21600 END)::bigint AS end_epoch,
           CASE WHEN kind < 0.45 THEN 'inbound' WHEN kind < 0.80 THEN 'outbound' ELSE 'local' END AS direction,
           CASE WHEN way >= 0.96 THEN 'lose_race' WHEN way >= 0.92 THEN 'agent' WHEN way >= 0.88 THEN 'member'
                WHEN way >= 0.875 THEN 'b' ELSE 'plain' END AS part,
           CASE WHEN way >= 0.96 OR outcome >= 0.68 THEN
                CASE WHEN way >= 0.96 THEN 'lose_race' WHEN outcome < 0.83 THEN 'no_answer'
                     WHEN outcome < 0.91 THEN 'voicemail' WHEN outcome < 0.97 THEN 'busy' ELSE 'failed' END
                ELSE 'answered' END AS result,
           2 + wait %% 28 AS ring_seconds,
           (%(domains)s::text[])[1 + CASE WHEN person %% 10 < 6 THEN 0 WHEN person %% 10 < 9 THEN 1 ELSE 2 END
                                     %% cardinality(%(domains)s::text[])] AS domain_name,
           md5('call ' || i)::uuid AS xml_cdr_uuid,
           (100 + extension %% 40)::text AS inside,
           '+1555' || lpad((number %% 10000000)::text, 7, '0') AS outside,
           (ARRAY['Alice Example', 'Zoë Müller', 'O''Brien, "Bob" & Sons', 'Łukasz Nowak', 'Παπαδόπουλος', 'Иван Петров',
                  '山田太郎', 'محمد علي', 'נועה לוי', 'Müller \\ Söhne', '김민수', 'Café 📞', 'Anonymous', '', 'WIRELESS CALLER',
                  'Ngô Thị Ánh'])[1 + (person / 16) %% 16] AS person_name
      FROM dice
), talked AS (
    SELECT timed.*,
           CASE result WHEN 'answered' THEN least(7200, 1 + trunc(-170 * ln(1 - length))::int)
                       WHEN 'voicemail' THEN 4 + trunc(length * 56)::int ELSE 0 END AS talk_seconds,
           (hashint8extended(i, 9) & 1023)::int %% 1000 AS fraction
      FROM timed
)
SELECT xml_cdr_uuid,
       md5('domain ' || domain_name)::uuid AS domain_uuid,
       CASE WHEN direction <> 'inbound' OR result = 'answered'
            THEN md5('extension ' || domain_name || inside)::uuid END AS extension_uuid,
       xml_cdr_uuid || '@10.0.0.1' AS sip_call_id,
       domain_name,
       domain_name AS accountcode,
       direction,
       'en' AS default_language,
       person_name AS caller_id_name,
       CASE direction WHEN 'inbound' THEN CASE person_name WHEN 'Anonymous' THEN 'anonymous' ELSE outside END
                      ELSE inside END AS caller_id_number,
       CASE WHEN direction = 'inbound' THEN '18005550100' END AS caller_destination,
       CASE direction WHEN 'inbound' THEN outside ELSE inside END AS source_number,
       CASE direction WHEN 'outbound' THEN ltrim(outside, '+') WHEN 'inbound' THEN inside
                      ELSE (100 + number %% 40)::text END AS destination_number,
       end_epoch - talk_seconds - ring_seconds AS start_epoch,
       CASE WHEN talk_seconds > 0 THEN end_epoch - talk_seconds ELSE 0 END AS answer_epoch,
       end_epoch,
       talk_seconds AS billsec,
       CASE WHEN talk_seconds > 0 THEN talk_seconds * 1000 + fraction ELSE 0 END AS billmsec,
       ring_seconds,
       CASE WHEN result = 'answered' THEN md5('bridge ' || i)::uuid::text END AS bridge_uuid,
       CASE WHEN talk_seconds > 0 THEN (ARRAY['PCMU', 'PCMA', 'opus', 'G722'])[1 + number %% 4] END AS read_codec,
       CASE WHEN talk_seconds > 0 THEN (ARRAY['8000', '8000', '48000', '16000'])[1 + number %% 4] END AS read_rate,
       CASE WHEN talk_seconds > 0 THEN 'PCMU' END AS write_codec,
       CASE WHEN talk_seconds > 0 THEN '8000' END AS write_rate,
       '203.0.113.' || number %% 250 AS remote_media_ip,
       '198.51.100.' || number %% 250 AS network_addr,
       CASE WHEN result = 'answered' AND extension %% 5 = 0
            THEN '/var/lib/freeswitch/recordings/' || domain_name || '/archive' END AS record_path,
       CASE WHEN result = 'answered' AND extension %% 5 = 0 THEN xml_cdr_uuid || '.wav' END AS record_name,
       CASE WHEN result = 'answered' AND extension %% 5 = 0 THEN talk_seconds END AS record_length,
       CASE part WHEN 'b' THEN 'b' ELSE 'a' END AS leg,
       CASE WHEN part = 'lose_race' THEN md5('call ' || i - 1)::uuid END AS originating_leg_uuid,
       100 + wait %% 3900 AS pdd_ms,
       CASE WHEN talk_seconds > 0 THEN round(3.5 + number %% 101 / 100.0, 2) END AS rtp_audio_in_mos,
       CASE WHEN result = 'voicemail' THEN 'voicemail' WHEN part = 'member' THEN 'callcenter' ELSE 'bridge' END AS last_app,
       CASE WHEN result = 'voicemail' THEN 'default ' || domain_name || ' ' || inside
            WHEN part = 'member' THEN 'support@' || domain_name
            ELSE 'user/' || inside || '@' || domain_name END AS last_arg,
       result = 'voicemail' AS voicemail_message,
       direction = 'inbound' AND result IN ('no_answer', 'voicemail') AS missed_call,
       CASE WHEN part IN ('member', 'agent') THEN md5('queue ' || domain_name)::uuid END AS call_center_queue_uuid,
       CASE WHEN part IN ('member', 'agent') THEN part END AS cc_side,
       CASE WHEN part IN ('member', 'agent') THEN md5('member ' || i)::uuid END AS cc_member_uuid,
       CASE WHEN part = 'member' THEN end_epoch - talk_seconds - ring_seconds END AS cc_queue_joined_epoch,
       CASE WHEN part IN ('member', 'agent') THEN 'support@' || domain_name END AS cc_queue,
       CASE WHEN part IN ('member', 'agent') THEN md5('session ' || i)::uuid END AS cc_member_session_uuid,
       CASE WHEN part = 'agent' THEN md5('agent ' || inside)::uuid END AS cc_agent_uuid,
       CASE WHEN part = 'agent' THEN inside || '@' || domain_name END AS cc_agent,
       CASE WHEN part = 'agent' THEN 'callback' END AS cc_agent_type,
       CASE WHEN part = 'member' AND result = 'answered' THEN 'true' END AS cc_agent_bridged,
       CASE WHEN part = 'member' AND result = 'answered' THEN end_epoch - talk_seconds END AS cc_queue_answered_epoch,
       CASE WHEN part = 'member' AND result = 'answered' THEN end_epoch END AS cc_queue_terminated_epoch,
       CASE WHEN part = 'member' AND result <> 'answered' THEN end_epoch END AS cc_queue_canceled_epoch,
       CASE WHEN part = 'member' AND result <> 'answered' THEN 'BREAK_OUT' END AS cc_cancel_reason,
       CASE WHEN part = 'member' THEN CASE result WHEN 'answered' THEN 'answered' ELSE 'cancel' END END AS cc_cause,
       CASE WHEN talk_seconds > 0 THEN ring_seconds ELSE 0 END AS waitsec,
       CASE result WHEN 'lose_race' THEN 'no_answer' WHEN 'no_answer' THEN
            CASE direction WHEN 'inbound' THEN 'missed' ELSE 'no_answer' END ELSE result END AS status,
       CASE result WHEN 'lose_race' THEN 'LOSE_RACE' WHEN 'busy' THEN 'USER_BUSY' WHEN 'failed' THEN 'UNALLOCATED_NUMBER'
                   WHEN 'no_answer' THEN CASE wait %% 2 WHEN 0 THEN 'NO_ANSWER' ELSE 'ORIGINATOR_CANCEL' END
                   ELSE 'NORMAL_CLEARING' END AS hangup_cause,
       CASE result WHEN 'lose_race' THEN 502 WHEN 'busy' THEN 17 WHEN 'failed' THEN 1
                   WHEN 'no_answer' THEN CASE wait %% 2 WHEN 0 THEN 19 ELSE 487 END ELSE 16 END AS hangup_cause_q850,
       CASE WHEN talk_seconds = 0 THEN 'send_refuse' WHEN number %% 2 = 0 THEN 'recv_bye' ELSE 'send_bye' END AS sip_hangup_disposition,
       CASE WHEN %(xml_bytes)s > 0
            THEN left(repeat('<?xml version="1.0"?>' || E'\n<cdr core-uuid="' || md5('xml ' || i) || E'">\n\t<variable>'
                             || md5('v' || i) || md5('w' || i) || E'</variable>\n', %(xml_bytes)s / 80 + 1), %(xml_bytes)s) END AS xml,
       to_timestamp(end_epoch + 1) AS insert_date
  FROM talked
