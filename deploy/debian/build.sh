#!/bin/sh
# make deb: the package cdr-api for the Debian that this runs on, and its Python.
# The libraries are those of requirements.txt, by their hashes. VERSION= names another
# version than the program's own, TARGET= another folder than dist/.
set -eu
umask 022
here=$(cd "$(dirname "$0")/../.." && pwd)
target=${TARGET:-$here/dist}
python=${DEBIAN_PYTHON:-/usr/bin/python3}

fail() { echo "make deb: $*" >&2; exit 1; }
command -v dpkg-deb >/dev/null || fail "dpkg-deb is missing: this must run on Debian"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "Python 3.11 or newer is needed: Debian 12 or newer"
"$python" -c 'import ensurepip' 2>/dev/null || fail "venv is missing; run: apt install python3-venv"

version=${VERSION:-$(sed -n 's/^__version__ = "\(.*\)"/\1/p' "$here/cdr/__init__.py")}
version=$version~deb$(. /etc/os-release && echo "$VERSION_ID")
minor=$("$python" -c 'import sys; print(sys.version_info.minor)')
arch=$(dpkg --print-architecture)
maintainer=${MAINTAINER:-The authors of the CDR API for FusionPBX <cdr-api@pbx.example.com>}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
stage=$work/stage
opt=$stage/opt/cdr-api
doc=$stage/usr/share/doc/cdr-api
export SOURCE_DATE_EPOCH="${SOURCE_DATE_EPOCH:-$(git -C "$here" log -1 --format=%ct 2>/dev/null || date +%s)}"

put() { install -D -m "$1" "$2" "$3"; }  # mode, file, place

# The program.
mkdir -p "$opt"
cd "$here"
for name in ./*.py cdr cdr_setup pages deploy docs bench/README.md queries.sql schema.sql openapi.json ./*.md; do
  find "$name" -type f ! -path '*/__pycache__/*' ! -path 'deploy/debian/*' ! -path '*/vendor/fetch.sh' |
    while read -r file; do put 0644 "$here/$file" "$opt/$file"; done
done

# Its libraries, without what only builds or activates.
"$python" -m venv "$work/tool"
"$python" -m venv --without-pip "$opt/.venv"
"$work/tool/bin/python" -m pip --python "$opt/.venv/bin/python" install --quiet --disable-pip-version-check \
  --no-compile --only-binary :all: --require-hashes -r "$here/requirements.txt"
# Also the C encoder, if there are a C compiler and Python.h; a package without it does the same, in more time.
"$opt/.venv/bin/python" "$here/speedups/build.py" >&2 || :
rm -f "$opt/.venv/bin/"[Aa]ctivate* "$opt/.venv/.gitignore"
find "$opt/.venv/bin" -type f -exec sed -i "1s|^#!$opt|#!/opt/cdr-api|" {} +
sed -i "s|$stage||; s|^command = .*|command = /usr/bin/python3 -m venv /opt/cdr-api/.venv|" "$opt/.venv/pyvenv.cfg"
find "$opt/.venv" -name RECORD -exec sed -i '/^\.\.\/\.\.\/\.\.\/bin\//d' {} +
find "$opt/.venv" -type f ! -path '*/bin/*' -exec chmod 0644 {} +

# What the system reads.
put 0640 "$here/deploy/env" "$stage/etc/cdr-api/env"
put 0644 "$here/deploy/nginx-http.conf" "$stage/etc/nginx/conf.d/cdr-api.conf"
put 0644 "$here/deploy/nginx-path.conf" "$stage/etc/nginx/snippets/cdr-api.conf"
put 0644 "$here/deploy/nginx-server.conf" "$stage/etc/nginx/sites-available/cdr-api"
put 0644 "$here/deploy/cdr-api.service" "$stage/usr/lib/systemd/system/cdr-api.service"
put 0755 "$here/deploy/cdr-api" "$stage/usr/bin/cdr-api"
put 0644 "$here/deploy/debian/copyright" "$doc/copyright"
sed '1,4d; s/^$/./; s/^/ /' "$here/LICENSE" >> "$doc/copyright"
put 0644 "$here/deploy/debian/lintian-overrides" "$stage/usr/share/lintian/overrides/cdr-api"
printf 'cdr-api (%s) unstable; urgency=medium\n\n  * What changed for users is in /opt/cdr-api/CHANGELOG.md.\n\n -- %s  %s\n' \
  "$version" "$maintainer" "$(LC_ALL=C date -u -R -d "@$SOURCE_DATE_EPOCH")" > "$doc/changelog"
gzip -9n "$doc/changelog"

# What the program says of itself.
completion=$stage/usr/share/bash-completion/completions/cdr-api
manual=$stage/usr/share/man/man1/cdr-api.1
mkdir -p "$(dirname "$completion")" "$(dirname "$manual")"
(cd "$opt" && PYTHONDONTWRITEBYTECODE=1 _CDR_API_COMPLETE=bash_source .venv/bin/python -m cdr_command > "$completion")
(cd "$opt" && PYTHONDONTWRITEBYTECODE=1 .venv/bin/python "$here/deploy/debian/manual.py" > "$manual")
gzip -9n "$manual"

# The package.
mkdir "$stage/DEBIAN"
for name in postinst prerm postrm; do put 0755 "$here/deploy/debian/$name" "$stage/DEBIAN/$name"; done
(cd "$stage" && find etc -type f -printf '/%p\n' | sort) > "$stage/DEBIAN/conffiles"
(cd "$stage" && find usr opt -type f -print0 | sort -z | xargs -0 md5sum) > "$stage/DEBIAN/md5sums"
sed -e "s/@MAINTAINER@/$maintainer/; s/@VERSION@/$version/; s/@ARCH@/$arch/; s/@MINOR@/$minor/; s/@NEXT@/$((minor + 1))/" \
  -e "s/@SIZE@/$(du -sk --exclude=DEBIAN "$stage" | cut -f1)/" "$here/deploy/debian/control" > "$stage/DEBIAN/control"
chmod 0644 "$stage/DEBIAN/control" "$stage/DEBIAN/conffiles" "$stage/DEBIAN/md5sums"
find "$stage" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +
mkdir -p "$target"
dpkg-deb --root-owner-group -Zxz --build "$stage" "$target/cdr-api_${version}_$arch.deb" >/dev/null
echo "$target/cdr-api_${version}_$arch.deb"
