#!/usr/bin/env bash
# Reads the feed of the CDR API into files. One run, from cron, brings what is new:
#
#     export CDR_URL=https://pbx.example.com/api CDR_TOKEN=cdr_… FROM=2026-01-01
#     poll_feed.sh /var/spool/cdr            # FROM counts the first time only
#     poll_feed.sh --resync /var/spool/cdr   # may start again if the cursor cannot be continued
#
# FOLDER/spool/000000000001.ndjson and so on hold the calls, one JSON object a line. Take
# the files in the order of their names, and the calls by their xml_cdr_uuid: one
# that comes again replaces the former. FOLDER/cursor says where the next poll
# begins; a spool file is final once its number is below the one that stands there.
#
# Optional: CDR_DOMAIN, CDR_FIELDS, CDR_LIMIT (calls of a file, 10000), CDR_PATIENCE
# (seconds to wait for a busy service, 300). Needs Linux, curl and jq.
#
# Exit status: 0 all is well, 2 wrong use, 3 the cursor cannot be continued, 4 the
# token may not, 5 try again later, 6 the service refuses the request.
set -euo pipefail
umask 077

fail() {  # fail STATUS SENTENCE
  printf '%s\n' "$2" >&2
  exit "$1"
}

put() {  # put FILE PLACE: on the disk under its name there, or not at all
  sync "$1"
  mv -f "$1" "$2"
  sync "$(dirname "$2")"
}

remember() {  # remember NUMBER PARAMETER VALUE: the next file, and where its calls begin
  printf '%s %s %s\n' "$@" >"$work/cursor"
  put "$work/cursor" "$folder/cursor"
  number=$1 parameter=$2 value=$3
}

ask() {  # one page: $status, $work/calls and $work/head
  local optional=() curl=0
  [[ -z ${CDR_DOMAIN:-} ]] || optional+=(--data-urlencode "domain_name=$CDR_DOMAIN")
  [[ -z ${CDR_FIELDS:-} ]] || optional+=(--data-urlencode "fields=$CDR_FIELDS")
  : >"$work/calls"
  # The token goes through a pipe: a command line can be read by everyone on this machine.
  # The lock (9) is not handed on: a curl that outlives this script must not hold it.
  status=$(
    exec 9>&-
    printf 'Authorization: Bearer %s\n' "$CDR_TOKEN" |
      curl --silent --show-error --http1.1 --header @- --get "$CDR_URL/call_feed" --data-urlencode "$parameter=$value" \
        --data "format=ndjson&limit=$limit" ${optional[@]+"${optional[@]}"} \
        --connect-timeout 10 --speed-time 600 --speed-limit 1 \
        --output "$work/calls" --dump-header "$work/head" --write-out '%{http_code}'
  ) || curl=$?
  ((curl == 0)) || fail 5 "No whole answer (curl's exit status is $curl): nothing of it is kept."
  # curl takes a head that was cut for a whole one, and without a length every body.
  [[ -z $(tail -n 1 "$work/head" | tr -d '\r') && $(header content-length)$(header transfer-encoding) ]] ||
    fail 5 "The answer's head is not whole: nothing of it is kept."
}

header() {  # header NAME, of the last answer
  tr -d '\r' <"$work/head" |
    awk -v name="$1:" 'tolower($1) == name { sub(/^[^:]*: */, ""); found = $0 } END { print found }'
}

problem() {  # the service's sentence; a proxy's own page has none
  printf '%s: %s' "$status" "$(jq -r .message "$work/calls" 2>/dev/null || echo 'no reason given')"
}

begin_again() {  # after 410
  local start
  start=$(jq -r '.data | fromjson | .from // empty' "$work/calls" 2>/dev/null) || true
  start=${start:-${FROM:-}}
  [[ $resync && $start ]] ||
    fail 3 "$(problem) Run this with --resync (and FROM, if it asks for it); calls that you have come again."
  printf '%s Beginning again with %s.\n' "$(problem)" "$start" >&2
  resync=
  # Not under the same number: the file of a poll that crashed may hold calls that do not come again.
  remember "$((number + 1))" from "$start"
}

wait_a_while() {  # after 429 and 503
  local seconds
  seconds=$(header retry-after)
  [[ $seconds =~ ^[0-9]{1,6}$ ]] || seconds=30
  ((10#$seconds <= patience)) || fail 5 "$(problem)"
  patience=$((patience - 10#$seconds))
  printf '%s Waiting %s s.\n' "$(problem)" "$seconds" >&2
  sleep "$seconds" 9>&-
}

keep() {  # the page, and only then the cursor behind it: a crash between the two repeats the file
  local cursor through file
  cursor=$(header x-next-cursor) through=$(header x-complete-through)
  file=$folder/spool/$(printf %012d "$number").ndjson
  [[ $cursor ]] || fail 5 "The answer has no X-Next-Cursor: is CDR_URL right?"
  [[ -z $(tail -c 1 "$work/calls") ]] || fail 5 "The answer ends in the middle of a line: nothing of it is kept."
  calls=$(wc -l <"$work/calls")
  if ((calls > 0)); then put "$work/calls" "$file"; fi
  # A file may stand here without calls now: those of a poll that crashed, deleted since.
  if [[ -e $file ]]; then number=$((number + 1)); fi
  remember "$number" cursor "$cursor"
  printf '%s calls; everything stored up to %s is here.\n' "$calls" "$through"
}

resync=
if [[ ${1:-} == --resync ]]; then resync=yes && shift; fi
folder=${1:-${CDR_FOLDER:-}}
limit=${CDR_LIMIT:-10000} patience=${CDR_PATIENCE:-300}
[[ $# -le 1 && $folder && ${CDR_URL:-} && ${CDR_TOKEN:-} ]] ||
  fail 2 "usage: CDR_URL=… CDR_TOKEN=… FROM=… $0 [--resync] FOLDER"
[[ $CDR_TOKEN =~ ^[A-Za-z0-9_-]+$ ]] || fail 2 "CDR_TOKEN is not a token of the CDR API."
for program in curl jq flock; do
  command -v "$program" >/dev/null || fail 2 "$program is needed, and is not installed."
done

mkdir -p "$folder/spool"
exec 9>"$folder/lock"
flock --wait 30 9 || fail 5 "Another run is at work in $folder."
rm -rf "$folder"/tmp.* || :  # what a killed run still writes to goes next time  # of runs that crashed
work=$(mktemp -d "$folder/tmp.XXXXXX")
trap 'rm -rf "$work"' EXIT

number=1 parameter=from value=${FROM:-}
if [[ -e $folder/cursor ]]; then read -r number parameter value <"$folder/cursor"; fi
[[ $value ]] || fail 2 "The first poll needs FROM: the day that the files begin with."

# A page that is not full ends the run; if calls without an end stamp are left, the next run has them.
calls=$limit
while ((calls == limit)); do
  ask
  case $status in
    200) keep ;;
    410) begin_again ;;
    429 | 503) wait_a_while ;;
    401 | 403) fail 4 "$(problem)" ;;
    5??) fail 5 "$(problem)" ;;
    *) fail 6 "$(problem)" ;;
  esac
done
