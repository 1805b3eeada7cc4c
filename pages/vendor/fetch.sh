#!/bin/sh
# make assets: what the pages bundle, anew from npm's packages, and README.md about it.
# A newer version: change it here, run make assets and make test, look at both pages.
set -eu
cd "$(dirname "$0")"
temp=$(mktemp -d)
trap 'rm -rf "$temp"' EXIT

take() {  # NAME VERSION LICENCE FILE=AS …: files of a package
  name=$1 version=$2 licence=$3
  shift 3
  archive=$(npm pack --silent --pack-destination "$temp" "$name@$version")
  mkdir "$temp/$name"
  tar -xzf "$temp/$archive" -C "$temp/$name" --strip-components 1
  for pair in "$@"; do
    cp "$temp/$name/${pair%=*}" "${pair#*=}"
    hash=$(sha256sum "${pair#*=}")
    echo "| \`${pair#*=}\` | $name $version, \`${pair%=*}\` | $licence | \`${hash%% *}\` |" >> "$temp/table"
  done
}

take chart.js 4.6.1 MIT dist/chart.umd.min.js=chart.umd.min.js LICENSE.md=chart.js.LICENSE

cat > README.md <<END
# Other people's files

Made by \`make assets\` ([fetch.sh](fetch.sh)): unchanged files out of npm's packages, which
the pages load from the service itself, so that they work where there is no internet.
[Chart.js](https://www.chartjs.org) draws the charts of \`/api/usage\`.

| file | from | licence | SHA-256 |
|---|---|---|---|
$(cat "$temp/table")
END
