#!/usr/bin/env bash
# The calls of a domain that ended in a month, as CSV for a spreadsheet:
#
#     export CDR_URL=https://pbx.example.com/api CDR_TOKEN=cdr_…
#     month.sh alpha.example.com 2026-01 calls.csv
#
# The file is there whole or not at all: every page came to its end, and calls and
# seconds are those that call_totals counts. Needs curl, jq and GNU date.
set -euo pipefail
umask 077
fields=xml_cdr_uuid,start_stamp,end_stamp,direction,accountcode,caller_id_number,destination_number,billsec

fail() {
  printf '%s\n' "$1" >&2
  exit 1
}

header() {  # header NAME, of the last answer
  tr -d '\r' <"$work/head" | awk -v name="$1:" 'tolower($1) == name { sub(/^[^ ]* /, ""); print }'
}

ask() {  # ask URL DATA…: the answer in $work/body; waits while the service is busy
  local status seconds
  for _ in {1..10}; do
    : >"$work/body"  # curl leaves it alone if nothing comes
    # The token goes through a pipe: a command line can be read by everyone on this machine, and a URL stands in logs.
    status=$(printf 'Authorization: Bearer %s\n' "$CDR_TOKEN" |
      curl -sS --header @- --get "$@" --dump-header "$work/head" --output "$work/body" --write-out '%{http_code}' \
        --connect-timeout 10 --speed-time 600 --speed-limit 1)  # curl fails if the answer breaks off, and this with it
    [[ $status != 200 ]] || return 0
    [[ $status == 429 || $status == 503 ]] || fail "$status: $(jq -r .message "$work/body" 2>/dev/null)"
    seconds=$(header retry-after)
    echo "$status: waiting ${seconds:=30} s." >&2
    sleep "$seconds"
  done
  fail "The service is busy: try again later."
}

[[ $# == 3 && ${CDR_URL:-} && ${CDR_TOKEN:-} ]] || fail "usage: CDR_URL=… CDR_TOKEN=… $0 DOMAIN YYYY-MM FILE"
work=$(mktemp -d "$3.XXXXXX")
trap 'rm -rf "$work"' EXIT
last=$(date -d "$2-01 +1 month -1 day" +%F)
query=(--data-urlencode "domain_name=$1" --data "from=$2-01&to=$last&billable_only=true")

echo "$fields" >"$work/calls"
ask "$CDR_URL/call_range" "${query[@]}" --data "fields=$fields&format=csv&csv_safe=true&limit=10000"
while
  [[ $(head -n 1 "$work/body") == "$fields" ]] || fail "The answer is not whole: nothing of it is kept."
  tail -n +2 "$work/body" >>"$work/calls"
  next=$(header link | sed -n 's/^<\(.*\)>; rel="next"$/\1/p')
  [[ $next ]]
do
  [[ $next == "$CDR_URL"/* ]] || fail "The next page is elsewhere, at $next: is CDR_API_PROXIES right?"
  ask "$next"
done

# Without what stands in quotes a line is a call, and its last cell the seconds.
found=$(awk -v RS='"' -v ORS= 'NR % 2' "$work/calls" |
  awk -F, 'NR > 1 { seconds += $NF } END { printf "%d calls, %d seconds", NR - 1, seconds }')
ask "$CDR_URL/call_totals" "${query[@]}"
total=$(jq -r '.[0] | "\(.calls) calls, \(.billsec) seconds"' "$work/body")
[[ $found == "$total" ]] || fail "Read $found, but there are $total: run this again."
mv -f "$work/calls" "$3"
echo "$found"
