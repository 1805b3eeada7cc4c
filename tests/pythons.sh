#!/usr/bin/env bash
# Runs what may differ from one Python to the next on 3.13 and 3.14, which Debian's next release has: in a root of its
# own that debootstrap makes once, under DEB_CACHE (a minute, 700 MB). It takes root and the right to mount.
set -euo pipefail
cd "$(dirname "$0")/.."
root=${DEB_CACHE:-/var/tmp/cdr-api-debian}/pythons
if [ "${1:-}" != mounted ]; then
  unshare --mount true 2>/dev/null || { echo "SKIPPED: it takes root and the right to mount"; exit 0; }
  exec unshare --mount "$0" mounted
fi

if [ ! -e "$root/done" ]; then
  rm -rf "$root" && mkdir -p "$root"
  mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Origin: Debian' 'Identifier: Packages' | grep -vm 1 security)
  packages=curl,gcc,libc6-dev,python3.13-dev,python3.13-venv,python3.14-dev,python3.14-venv
  # The debootstrap of Debian 12 has no script of forky's name, and sid's is the same.
  debootstrap --variant=minbase --include=$packages forky "$root" "$mirror" /usr/share/debootstrap/scripts/sid \
    >"$root.log" 2>&1 || { tail -n 5 "$root.log" && exit 1; }
  mkdir "$root/src" && touch "$root/done"
fi
# These end with this process.
mount --bind . "$root/src"
mount --rbind /dev "$root/dev"
mount -t proc proc "$root/proc"
mount --bind /etc/ssl "$root/etc/ssl"
cp -L /etc/resolv.conf "$root/etc/resolv.conf"

for version in 3.13 3.14; do
  echo "Python $version"
  PATH=/usr/sbin:/usr/bin:/sbin:/bin chroot "$root" sh -eu -c "
    cd /src
    [ -x /venv/$version/bin/python ] || python$version -m venv /venv/$version
    /venv/$version/bin/python -m pip install -qq --require-hashes -r tests/requirements.txt
    /venv/$version/bin/python speedups/build.py
    /venv/$version/bin/python -m pytest -q -n 2 --dist loadfile tests/test_versions.py tests/test_encoder.py \
      tests/test_few.py tests/test_stream.py tests/test_restarts.py"
done
